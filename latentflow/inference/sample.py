"""Sampling one image for each seed: what a checkpoint can do, its conditions, the checks of a program."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import SamplingConfig
from ..errors import UserError, few, finite, plural, printable, whole
from ..utils.files import (
    check_types,
    read_settings,
    unfinished_run,
)
from .images import check_format, check_writable
from .opening import check_checkpoint, resolve, settings_folder

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..families import FlowModel

#: Condition of one image, as keywords of a pipeline's call.
Condition = dict[str, Any]
# Images per call of the pipeline. Each has its own generator, so the batch size changes an image by rounding only:
# matrix products round differently in a batch of another size, by at most one level of 255.
BATCH = 16
LARGEST_SEED = 2**64 - 1


def check_sampling(config: SamplingConfig) -> None:
    """Refuse at once what would fail after the images are generated, or once torch is imported.

    Raises:
        UserError: a number below 1, out of range or not finite; a file name without an image format, or where nothing
            can be written; no checkpoint there.
    """
    check_checkpoint(config.checkpoint, config.checkpoint_config)
    for flag, value in (("-n", config.n), ("--steps", config.steps), ("--scale", config.scale)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, not {value}")
    whole("--seed", config.seed, 0, LARGEST_SEED)
    if config.guidance is not None:
        finite("--guidance", config.guidance)
    check_format(config.output)
    check_writable(config.output)


# ---------------------------------------------------------------- what a checkpoint takes

# Types of the settings that `read_capabilities` reads.
_TYPES: dict[str, Any] = {
    "id2label": dict[str, str] | None,
    "num_classes": int | None,
    "text_dim": int | None,
    "condition_channels": int,
    "step_counts": list[int] | None,
    "average": bool,
    "folded_guidance": float,
    "usual_guidance": float | None,
    "control": dict[str, Any] | None,
}


@dataclass(frozen=True)
class Capabilities:
    """Conditions that a checkpoint takes, and the settings that it is usually sampled with.

    Attributes:
        text: it takes prompts.
        labels: names of its classes, or their numbers where they have no names.
        masks: it was trained to inpaint.
        steps: usual number of steps.
        distilled_guidance: the network takes no guidance scale: it draws without, or has learned one.
        negative: it takes negative prompts.
        guidance: usual guidance scale of an image without a source.
        edit_guidance, edit_strength: usual ones of an edit.
        image_input, needs_images, has_velocity: as of a ``FlowModel``.
        control: kinds of the control images that it takes; it draws without them, unless they are its image input.
        jump_settings: as of a ``FlowModel``.
    """

    text: bool
    labels: tuple[str, ...]
    masks: bool
    steps: int = 16
    distilled_guidance: bool = False
    negative: bool = True
    guidance: float = 4.0
    edit_guidance: float = 2.0
    edit_strength: float = 0.9
    image_input: str = "none"
    needs_images: bool = False
    has_velocity: bool = True
    control: tuple[str, ...] = ()
    jump_settings: tuple[str, ...] = ()

    @property
    def condition(self) -> bool:
        """Return whether there is a condition to guide by."""
        return self.text or bool(self.labels)

    @property
    def calls(self) -> tuple[str, ...]:
        """Return the programs that serve it, of generate, inpaint and edit."""
        if self.needs_images:
            return ("edit",)
        only = {"mask": ("inpaint",), "control": ("generate",)}
        return only.get(self.image_input, ("generate", "inpaint", "edit"))

    @property
    def edits_as_it_draws(self) -> bool:
        """Return whether the usual edit takes the steps and the guidance with which the checkpoint draws."""
        return self.instructions or not self.has_velocity

    @property
    def instructions(self) -> bool:
        """Return whether an edit follows an instruction."""
        return self.image_input == "reference"


def read_capabilities(checkpoint: str | None = None) -> Capabilities | None:
    """Read a pipeline folder's capabilities from its JSON files, without loading it; None for a hub id, and for
    checkpoints of other families than ours.

    Args:
        checkpoint: as for ``open_pipeline``.

    Raises:
        UserError: the JSON cannot be read, or a setting has the wrong type; a run has saved nothing yet.
    """
    source = resolve(checkpoint)
    folder = settings_folder(source) if unfinished_run(source) else Path(source)
    assert folder is not None
    files = [folder / "model_index.json", folder / "transformer" / "config.json"]
    if not all(file.is_file() for file in files):
        return None
    pipe, network = settings = [read_settings(file) for file in files]
    tokens = pipe.get("token_path") is not None
    if tokens:  # the condition is that of the network's transformer
        inner = network.get("transformer")
        network |= inner if isinstance(inner, dict) else {}
    if not str(pipe.get("_class_name", "LatentFlowPipeline")).startswith("LatentFlow"):
        return None  # of another family, which is asked once it is open
    for file, config in zip(files, settings, strict=True):
        check_types(file, config, _TYPES)
    names = (pipe.get("id2label") or {}).values()
    folded, guidance = pipe.get("folded_guidance", 1.0) != 1.0, 2.0 if tokens else Capabilities.guidance
    jumps: tuple[str, ...] = ("temperature", "corrector") if tokens else ()
    if pipe.get("prediction") == "codes":
        jumps = ("temperature",)
    if pipe.get("usual_guidance") is not None and not folded:
        guidance = pipe["usual_guidance"]
    return Capabilities(
        text=network.get("text_dim") is not None,
        labels=tuple(names) or tuple(str(number) for number in range(network.get("num_classes") or 0)),
        masks=bool(network.get("condition_channels")),
        steps=(pipe.get("step_counts") or [4 if pipe.get("average") else 16])[-1],
        distilled_guidance=folded,
        guidance=guidance,
        edit_guidance=guidance if tokens else Capabilities.edit_guidance,
        edit_strength=0.6 if tokens else Capabilities.edit_strength,
        has_velocity=not tokens,
        control=tuple(kind for kind in ("image", "labels") if (network.get("control") or {}).get(kind)),
        jump_settings=jumps,
    )


def model_capabilities(model: FlowModel) -> Capabilities:
    """Return the capabilities of an open checkpoint, of any family."""
    leads_away = model.true_guidance(model.guidance(2.0)) != 1.0
    found = Capabilities(
        text=model.takes_text,
        labels=model.classes,
        masks=model.takes_masks,
        steps=model.usual_steps,
        distilled_guidance=not (model.embeds_guidance or leads_away),
        negative=leads_away,
        guidance=Capabilities.guidance if model.few_steps.folded_guidance != 1.0 else model.usual_guidance,
        edit_guidance=model.edit_defaults.guidance,
        edit_strength=model.edit_defaults.strength if model.has_velocity else 0.6,  # of image-to-image
        image_input=model.image_input,
        needs_images=model.needs_images,
        has_velocity=model.has_velocity,
        control=model.control_kinds,
        jump_settings=model.jump_settings,
    )
    return replace(found, edit_guidance=model.usual_guidance) if found.edits_as_it_draws else found


# ---------------------------------------------------------------- sampling


def conditions(
    pipe: Any,
    prompts: Sequence[str] = (),
    classes: Sequence[str] = (),
    negative: str | None = None,
    *,
    optional: bool = False,
) -> list[Condition]:
    """Return one condition for each prompt or class.

    Args:
        classes: names, or numbers written out.
        negative: negative prompt, the same for every prompt.
        optional: use the empty prompt where nothing is given and the checkpoint takes prompts.

    Raises:
        UserError: the checkpoint does not take these, and the message names the flags that it takes; a negative prompt
            would do nothing.
    """
    if prompts and classes:
        raise UserError("a prompt and --class are both given", "Give one of them.")
    if prompts and not pipe.takes_text:
        raise UserError(f"this checkpoint takes no prompt such as '{prompts[0]}'", _instead(pipe))
    if classes and not pipe.takes_classes:
        raise UserError("this checkpoint takes no --class", _instead(pipe))
    if optional and pipe.takes_text and not prompts and not classes:
        prompts = ("",)
    if not prompts and not classes and (pipe.takes_text or pipe.takes_classes):
        raise UserError(f"a {'prompt' if pipe.takes_text else 'class'} is needed", _instead(pipe))
    if negative is not None and not prompts:
        raise UserError("a negative prompt without a prompt", "Leave it out, or give a prompt.")
    if prompts:
        extra: Condition = {} if negative is None else {"negative_prompt": negative}
        return [{"prompt": prompt} | extra for prompt in prompts]
    numbers_or_names = [
        int(name) if name.isdecimal() and name not in pipe.labels else name for name in classes
    ]
    ids = pipe.class_ids(numbers_or_names) if classes else []
    return [{"class_labels": number} for number in ids] or [{}]


def with_control(rows: list[Condition], controls: Sequence[Any]) -> list[Condition]:
    """Return the conditions with their control images, one for all of them or one for each.

    Raises:
        UserError: there are more or fewer.
    """
    if not controls:
        return rows
    if len(controls) not in (1, len(rows)):
        raise UserError(
            f"--control: {plural(len(controls), 'file')} for {plural(len(rows), 'prompt')}",
            "Give one for all prompts, or one for each.",
        )
    each = [*controls] * (len(rows) // len(controls))
    return [{**row, "control_image": image} for row, image in zip(rows, each, strict=True)]


def note_unquoted(prompts: Sequence[str]) -> None:
    """Print on stderr that several prompts of one word each are drawn apart: quotes may have been forgotten."""
    if len(prompts) > 1 and not any(" " in prompt for prompt in prompts):
        print(
            f"{len(prompts)} prompts of one word each. If they are one prompt, put it in quotes: "
            f'"{printable(" ".join(prompts))}"',
            file=sys.stderr,
        )


def warn_unknown_words(pipe: Any, *texts: str | None) -> None:
    """Print once, on stderr, the words that the checkpoint's vocabulary lacks."""
    from ..models.text import UnknownWords
    from ..pipeline.sampling import unknown_words_text

    if words := pipe.unknown_words([text for text in texts if text]):
        print(f"Warning: {unknown_words_text(pipe.tokenizer, words)}.", file=sys.stderr)
    warnings.simplefilter("ignore", UnknownWords)  # each batch would say it again


def _instead(pipe: Any) -> str:
    """Return what this checkpoint takes, as flags."""
    if pipe.takes_text:
        return 'It takes a prompt, such as "red apple"'
    if pipe.takes_classes:
        return f"It takes --class NAME: {few(pipe.labels, 10) or 'a number'}"
    return "It is unconditional: leave it out."


def check_memory(count: int, size: tuple[int, int], scale: int = 1) -> None:
    """Refuse more images, or larger ones, than fit into the machine's memory.

    Args:
        size: (height, width) of each image, which is then enlarged ``scale`` times.

    Raises:
        UserError: says how much memory would be needed.
    """
    from ..utils.memory import require_memory

    height, width = (side * scale for side in size)
    bytes_of_pillow = 4 * count * height * width
    require_memory(f"{count} images of {width} x {height} pixels", bytes_of_pillow)


def generators(seed: int, count: int) -> list[Any]:
    """Return generators for ``seed``, ``seed + 1``, ..., on the CPU: a seed gives the same noise on every device.

    Raises:
        UserError: a seed is negative, or larger than torch takes.
    """
    import torch

    whole("--seed", seed, 0, LARGEST_SEED - count + 1)
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def sample_images(pipe: Any, rows: list[Condition], seed: int, **settings: Any) -> list[Image]:
    """Sample one image for each row; image i uses ``seed + i``, whatever else is sampled with it.

    In a batch of another size it differs by rounding, at most one level of 255.

    Args:
        settings: further arguments of the pipeline's call.

    Raises:
        UserError: a seed is out of range, or the pipeline refuses its arguments.
    """
    from ..utils.memory import memory_phase

    whole("--seed", seed, 0, LARGEST_SEED - len(rows) + 1)  # so that the last image's seed is in range too
    images: list[Image] = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        condition: dict[str, Any] = {name: [row[name] for row in batch] for name in batch[0]}
        if not condition:
            condition = {"num_images_per_prompt": len(batch)}
        with memory_phase("draw"):
            images += pipe(**condition, generator=generators(seed + start, len(batch)), **settings).images
    return images
