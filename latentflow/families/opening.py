"""Opening and saving a flow model: pipeline folders, hub repositories and single files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from torch import nn

from ..errors import UserError, few, with_article
from ..utils.components import library_reads, reported_missing
from ..utils.files import FETCH_AGAIN
from ..utils.weight_files import check_weight_files
from . import FAMILIES, family_of
from .index import pipeline_class
from .left_out import LEFT_OUT, what_to_do
from .weights import fix_of, loading_options

if TYPE_CHECKING:
    from .model import FlowModel


class OpeningMixin:
    """The part of a `FlowModel` that opens and saves it."""

    pipeline: Any

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        family_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> FlowModel:
        """Open a checkpoint of any family in `FAMILIES`, or of one that another package registers.

        Args:
            name_or_path: pipeline folder or hub id.
            family_options: arguments of the stock pipeline's call in place of their defaults.
            options: of the pipeline's own ``from_pretrained`` (``dtype``, ``variant``, ``device_map``,
                ``quantization_config``, ...); ``dtype="auto"`` keeps each component as it is stored.

        Raises:
            UserError: there is no such checkpoint, or its pipeline is of no family that is known.
        """
        kind = pipeline_class(name_or_path, **options)
        family = family_of(str(kind))
        if family is None:
            unknown = f", which is none of the {len(FAMILIES)} pipelines that open"
            more = "" if str(kind) in LEFT_OUT else unknown
            raise UserError(f"{name_or_path} is {with_article(kind)}{more}", what_to_do(str(kind)))
        return family(family.open_pipeline(name_or_path, **options), **(family_options or {}))

    @classmethod
    def from_single_file(
        cls,
        file: str | os.PathLike[str],
        config: str | os.PathLike[str] | None = None,
        family_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> FlowModel:
        """Open a pretrained model in one ``.safetensors`` or ``.gguf`` file, by diffusers' own ``from_single_file``.

        Args:
            file: a whole checkpoint, or a network alone. Original weights of SiT, DiT, REPA or LightningDiT, also
                pickled ones, are opened where ``vae`` is given: their autoencoder's folder or hub id, with ``kind``
                and ``class_names`` as of `import_pipeline`.
            config: folder or hub id of its pipeline, which has what the file lacks; default: the hub repository that
                diffusers recognises the weights by.
            family_options: as for `from_pretrained`.
            options: of the pipeline's own ``from_single_file`` (``dtype``, ``cache_dir``, ...). Without ``dtype``, a
                network is float32, with "auto" as it is stored; one in a GGUF file stays quantised, and computes in
                bfloat16.

        Raises:
            UserError: there is no such file; it cannot be read, or holds something else than a model; it does not fit
                the pipeline, or that cannot be fetched; the pipeline is of no family that is known.
        """
        from .single_file import open_single_file  # which imports this class

        return open_single_file(file, config, family_options, **options)

    @staticmethod
    def open_pipeline(name_or_path: str | os.PathLike[str], **options: Any) -> Any:
        """Open the diffusers pipeline of a folder or hub id; safetensors only.

        Raises:
            UserError: a file is missing or cannot be read; a network or text encoder lacks weights.
        """
        options = loading_options(name_or_path, {"use_safetensors": True, **options})
        what, fix = f"the pipeline '{name_or_path}'", fix_of(options)
        try:
            with library_reads(what, fix=fix), reported_missing() as missing:
                pipeline = DiffusionPipeline.from_pretrained(str(name_or_path), **options)
        except UserError:
            check_weight_files(Path(name_or_path))  # which names the file, where one is damaged
            raise
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module) and type(part).__name__ in missing:
                computed = {name for name, _ in part.named_buffers()}
                if lacking := sorted(set(missing[type(part).__name__]) - computed):
                    raise UserError(
                        f"{what} cannot be read: {name} lacks weights: {few(lacking, 3)}", FETCH_AGAIN
                    )
        return pipeline

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the pipeline folder, as its own pipeline class does."""
        self.pipeline.save_pretrained(folder)
