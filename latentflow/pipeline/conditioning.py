"""What a pipeline is conditioned on: captions, classes, sizes and masks; from the arguments of a call to tensors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..autoencoder import mask_channels
from ..errors import UserError, few, lookup
from ..flow.tensors import require_finite
from ..models import Condition, encode_text
from ..models.text import UnknownWords, unknown_words
from .arguments import labels, texts
from .call import Size

ClassLabels: TypeAlias = int | str | Sequence[int | str]


def unknown_words_text(words: Sequence[str]) -> str:
    """Return a sentence for users that names the words; see ``ConditionMixin.unknown_words``."""
    named = few([f"'{word}'" for word in words], 10)
    return f"words that the checkpoint's vocabulary does not know, and that it cannot draw: {named}"


class ConditionMixin:
    """For a pipeline with a ``transformer``, whose config says what it takes, and perhaps a ``text_encoder``."""

    vae: Any
    transformer: Any
    text_encoder: Any
    tokenizer: Any
    #: class name -> id
    labels: dict[str, int]
    _execution_device: torch.device

    @property
    def takes_text(self) -> bool:
        """Whether the network is conditioned on captions."""
        return self._network_config("text_dim") is not None

    @property
    def takes_classes(self) -> bool:
        """Whether the network is conditioned on a class."""
        return self._network_config("num_classes") is not None

    @property
    def takes_masks(self) -> bool:
        """Whether the network was trained to inpaint."""
        return self.vae is not None and self._network_config("condition_channels") == mask_channels(self.vae)

    def _network_config(self, name: str, default: Any = None) -> Any:
        return default if self.transformer is None else self.transformer.config.get(name, default)

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Class ids of class names.

        Raises:
            UserError: a name is unknown (the nearest is suggested), or the checkpoint has no class names.
        """
        names = [label] if isinstance(label, str) else list(label)
        if names and not self.labels:
            raise UserError(f"class '{names[0]}': this checkpoint has no class names", self._takes())
        return [lookup(self.labels, name, "class") for name in names]

    def class_ids(self, class_labels: ClassLabels) -> list[int]:
        """Class ids of names, ids or a mixture.

        Raises:
            UserError: a name or an id is unknown, or none.
        """
        given = labels("class_labels", class_labels)
        rows = given if isinstance(given, list) else [given]
        ids = [self.get_label_ids(row)[0] if isinstance(row, str) else row for row in rows]
        for number in ids:
            if not 0 <= number < self._network_config("num_classes"):
                raise UserError(f"class id {number} does not exist", self._takes())
        return ids

    def _takes(self) -> str:
        """What the checkpoint takes, as the second half of an error."""
        count, names = self._network_config("num_classes"), list(self.labels)
        if self.takes_text and self.takes_classes:
            return "It takes a prompt, class_labels, or both."
        if self.takes_text:
            return 'It takes a prompt: pipe(prompt="..."); prompt="" draws without a condition.'
        if names:
            shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
            return f"It takes class_labels: {shown}."
        if self.takes_classes:
            return f"It takes class_labels: ids from 0 to {count - 1}."
        return "It takes no condition: num_images_per_prompt is the number of images."

    def check_condition(
        self, prompt: Any = None, negative_prompt: Any = None, class_labels: Any = None
    ) -> None:
        """Refuse a condition that the checkpoint does not take, or the lack of one (None = not given).

        Raises:
            UserError: says what the checkpoint takes.
        """
        given = {"prompt": prompt, "negative_prompt": negative_prompt, "class_labels": class_labels}
        taken = {"prompt": self.takes_text, "negative_prompt": self.takes_text}
        taken["class_labels"] = self.takes_classes
        for name, value in given.items():
            if value is not None and not taken[name]:
                raise UserError(f"this checkpoint does not take {name}", self._takes())
        needed = [name for name in ("prompt", "class_labels") if taken[name]]
        if needed and all(given[name] is None for name in needed):
            raise UserError(f"{' or '.join(needed)} is missing", self._takes())

    def _sizes_told(self, rows: int, original: Size, crop: Size, target: Size, drawn: Size) -> Tensor | None:
        """(rows, 6), see ``Condition``; None for a network that takes no sizes.

        Raises:
            UserError: other than what is drawn, for a network that takes none.
        """
        if self._network_config("size_conditioning"):
            told = [*original, *crop, *target]
            return torch.tensor([told] * rows, dtype=torch.float32, device=self._execution_device)
        if (original, crop, target) != (drawn, (0, 0), drawn):
            raise UserError(
                "this checkpoint was not trained to be told sizes and crops",
                "Leave original_size, crops_coords_top_left and target_size out.",
            )
        return None

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Token embeddings of prompts, each repeated ``num_images_per_prompt`` times in place: a, a, b, b.

        An empty prompt becomes a row without tokens (mask all False), which means the learned null. Without a
        negative prompt the negative tensors are None, and guidance starts from that same null.

        Returns:
            prompt_embeds (B, L, D), negative_prompt_embeds (B, L', D), prompt_attention_mask (B, L) bool,
            negative_prompt_attention_mask (B, L') bool; None for what is not there.

        Raises:
            UserError: no text encoder is loaded, or the numbers of prompts and negative prompts differ.
        """
        device = device or self._execution_device
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if text is not None:
                texts(name, text)
        if prompt is not None:
            prompt = [prompt] if isinstance(prompt, str) else list(prompt)
            prompt_embeds, prompt_attention_mask = self._embed(prompt, max_sequence_length)
        count = 0 if prompt_embeds is None else prompt_embeds.shape[0]
        if not do_classifier_free_guidance:
            negative_prompt_embeds = negative_prompt_attention_mask = None
        elif negative_prompt is not None:
            negative = (
                [negative_prompt] * count if isinstance(negative_prompt, str) else list(negative_prompt)
            )
            negative_prompt_embeds, negative_prompt_attention_mask = self._embed(
                negative, max_sequence_length
            )
        if negative_prompt_embeds is not None and negative_prompt_embeds.shape[0] != count:
            raise UserError(
                f"{negative_prompt_embeds.shape[0]} negative prompts for {count} prompts",
                "Pass one negative prompt for all, or one for each prompt.",
            )
        prompt_embeds, prompt_attention_mask = _repeated(
            prompt_embeds, prompt_attention_mask, num_images_per_prompt, device
        )
        negative_prompt_embeds, negative_prompt_attention_mask = _repeated(
            negative_prompt_embeds, negative_prompt_attention_mask, num_images_per_prompt, device
        )
        return prompt_embeds, negative_prompt_embeds, prompt_attention_mask, negative_prompt_attention_mask

    def unknown_words(self, prompts: str | list[str]) -> list[str]:
        """Words of prompts that the checkpoint's vocabulary does not know, each once: they cannot be drawn.

        None without a tokenizer, or with one that spells everything in bytes.
        """
        if self.tokenizer is None:
            return []
        return unknown_words(self.tokenizer, [prompts] if isinstance(prompts, str) else prompts)

    def warn_of_unknown_words(self, *prompts: str | list[str] | None, stacklevel: int = 2) -> None:
        """Warn once of all `unknown_words` of ``prompts``, as ``UnknownWords``."""
        rows = [[text] if isinstance(text, str) else text or [] for text in prompts]
        if words := self.unknown_words([text for row in rows for text in row]):
            warnings.warn(UnknownWords(unknown_words_text(words)), stacklevel=stacklevel + 1)

    def _embed(self, prompts: list[str], max_length: int | None) -> tuple[Tensor, Tensor]:
        """(P, L, D) and (P, L) bool; an empty prompt has no tokens, unless there is a class beside it."""
        if self.text_encoder is None or self.tokenizer is None:
            raise UserError(
                "a prompt was given, but the pipeline was loaded without its text encoder or tokenizer",
                "Load them, or pass prompt_embeds (from pipe.encode_prompt) instead.",
            )
        embeds, mask = encode_text(self.tokenizer, self.text_encoder, prompts, max_length)
        require_finite(
            embeds,
            "what the text encoder makes of the prompts",
            "In float16 it may overflow: load it in bfloat16 or float32. Else its weights are damaged.",
        )
        if self.takes_classes:
            return embeds, mask
        written = torch.tensor([bool(text.strip()) for text in prompts], device=mask.device)
        return embeds, mask & written[:, None]

    def condition(
        self,
        class_ids: list[int] | None,
        text: Tensor | None,
        mask: Tensor | None,
        channels: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Condition | None:
        """The network's condition of B rows, or None without any. Rows without tokens become the null."""
        if class_ids is None and text is None and channels is None and sizes is None:
            return None
        device = self._execution_device
        labels = None if class_ids is None else torch.tensor(class_ids, device=device)
        empty = None if mask is None else ~mask.any(dim=1)
        drop = empty if empty is not None and bool(empty.any()) else None
        return Condition(
            class_labels=labels, text=text, text_mask=mask, channels=channels, sizes=sizes, drop=drop
        )


def _repeated(
    embeds: Tensor | None, mask: Tensor | None, times: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Each row ``times`` times in place, on ``device``; a missing mask becomes all True."""
    if embeds is None:
        return None, None
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.to(torch.bool)
    return embeds.to(device).repeat_interleave(times, 0), mask.to(device).repeat_interleave(times, 0)
