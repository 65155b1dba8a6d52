"""Prompts of a pretrained model: encoded once, and the text encoders are gone when the network is loaded; or in each
step, by text encoders that learn.

Each encoded prompt is a file in the cache, found by the hash of its text, in a folder for all else that its values
depend on. So a run that goes on, or another one on the same captions, loads no text encoder.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from ...data.cache.store import make_room, open_folder
from ...errors import UserError, reason
from ...families import FlowModel
from ...families.model import Rows, Values
from ...families.pretrained import PretrainedModel
from ...families.text_encoders import text_encoders
from ...utils.files import replacing, save_tensors
from ...utils.progress import progress_bar
from ..losses.pretrained import CAPTIONS, encoded_captions, encoded_null, in_batch

# A key of the rows that guidance leads away from, which no caption has: captions are hashed with a "+" before them.
_NULL = "-"
_VALUES, _KEPT, _LISTS = "values", "kept", "lists"


class EncodedPrompts:
    """The rows of prompts, in the cache.

    Args:
        settings: plain values on which rows depend, beside the text.

    Raises:
        UserError: the cache cannot be written.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        try:
            self._folder, self._root, lock = open_folder("prompts", settings)
        except OSError as error:
            raise _no_cache(error) from error
        if lock is not None:
            weakref.finalize(self, os.close, lock)

    def missing(self, texts: Iterable[str]) -> list[str]:
        """Return the texts that are not encoded yet, each once."""
        return [text for text in dict.fromkeys(texts) if not self._has(f"+{text}")]

    @property
    def has_null(self) -> bool:
        """True once the row that guidance leads away from is encoded."""
        return self._has(_NULL)

    def encode(self, model: FlowModel, texts: Iterable[str], *, progress: bool = True) -> None:
        """Encode the texts that are missing, one by one, so that a row does not depend on others; and the null.

        Raises:
            UserError: see `FlowModel.encode_prompt`; the cache cannot be written.
        """
        if not self.has_null:
            self._write(_NULL, model.null(1))
        missing = self.missing(texts)
        for text in progress_bar(missing, desc="encoding prompts", hidden=not (progress and missing)):
            self._write(f"+{text}", model.encode_prompt([text]))

    def rows(self, texts: Iterable[str], model: Any = None) -> Rows:
        """Return a row for each text, on the CPU."""
        return Rows.cat([self._read(f"+{text}", model) for text in texts])

    def null(self, model: Any = None) -> Rows:
        """Return the row that guidance leads away from."""
        return self._read(_NULL, model)

    def entries(self, texts: Iterable[str]) -> Mapping[str, Values]:
        """Return the rows of the texts as entries of a batch."""
        return in_batch(self.rows(texts))

    def complete(self, model: FlowModel) -> None:
        """Complete a model without text encoders: guidance leads away from the encoded null."""
        vars(model)["null"] = self.null(model).repeat

    def _has(self, key: str) -> bool:
        """Return whether rows are kept, in a file that is whole."""
        try:
            with safetensors.safe_open(self._file(key), "pt"):
                return True
        except (OSError, safetensors.SafetensorError):
            return False

    def _file(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.rows.safetensors"

    def _write(self, key: str, rows: Rows) -> None:
        tensors: dict[str, Tensor] = {}
        lists = []
        for part, values in ((_VALUES, rows.values), (_KEPT, rows.kept)):
            for name, value in values.items():
                if isinstance(value, list):
                    lists.append(f"{part}/{name}")
                tensors[f"{part}/{name}"] = value[0] if isinstance(value, list) else value
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        try:
            make_room(self._root, sum(value.nbytes for value in tensors.values()))
            with replacing(self._file(key)) as partial:
                save_tensors(tensors, partial, metadata={_LISTS: " ".join(lists)})
        except (OSError, safetensors.SafetensorError) as error:  # the second: how a full disk is reported
            raise _no_cache(error) from error

    def _read(self, key: str, model: Any) -> Rows:
        file = self._file(key)
        try:
            with safetensors.safe_open(file, "pt") as opened:
                lists = (opened.metadata() or {}).get(_LISTS, "").split()
            tensors = load_file(file)
        except (OSError, safetensors.SafetensorError) as error:
            file.unlink(missing_ok=True)
            raise UserError(
                f"an encoded prompt in {self._folder} is damaged: {reason(error)}",
                "It has been deleted: start the same command again, which encodes it anew.",
            ) from error
        parts: dict[str, dict[str, Any]] = {_VALUES: {}, _KEPT: {}}
        for key_, value in tensors.items():
            part, _, name = key_.partition("/")
            parts[part][name] = [value] if key_ in lists else value
        return Rows(model, parts[_VALUES], parts[_KEPT])


class LivePrompts:
    """Prompts that are encoded where they are needed, by the text encoders as they are then; see `EncodedPrompts`.

    Args:
        encoders: a model with the text encoders.
    """

    def __init__(self, encoders: FlowModel) -> None:
        self._encoders = text_encoders(encoders.pipeline)

    def entries(self, texts: Iterable[str]) -> Mapping[str, list[str]]:
        """Return the texts as entries of a batch, for `PretrainedLoss` to encode."""
        return {CAPTIONS: [*texts]}

    def complete(self, model: PretrainedModel) -> None:
        """Complete a model without text encoders: it is given these."""
        for name, part in self._encoders.items():
            setattr(model.pipeline, name, part)

    def rows(self, texts: Iterable[str], model: PretrainedModel) -> Rows:
        """Return a row for each text, encoded by a model that is complete."""
        return encoded_captions([*texts], model)

    def null(self, model: PretrainedModel) -> Rows:
        return encoded_null(model)


#: where the rows of a run come from
Prompts: TypeAlias = EncodedPrompts | LivePrompts


def _no_cache(error: Exception) -> UserError:
    return UserError(
        f"encoded prompts cannot be kept: {reason(error)}",
        "Make room, or set LATENTFLOW_CACHE to a folder that can be written.",
    )
