"""Samples of a checkpoint as training data, drawn once into a folder of files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...data import Cropping, Example, LatentTable, Source, to_pil
from ...data.dataset import Kind
from ...errors import UserError, reading
from ...families import FlowModel
from ...flow import SOLVERS
from ...pipeline.adapter_files import weights_hash
from ...utils.files import replacing, save_tensors
from ...utils.memory import memory_phase
from ...utils.progress import progress_bar
from ..data import conditions_of
from ..loop.data_order import Stream, seeded
from ..loop.distributed import process_state
from ..losses.latent_data import BucketData, Conditions, LatentData
from .base import open_base

_TOGETHER = 50  # samples in a file, and drawn at once,
_PIXELS = 2**20  # unless they have more pixels in all


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Settings of the samples, and the tensors that are kept of them.

    Attributes:
        what, phase: name of one sample, and the phase of `latentflow.utils.memory.ADVICE`.
        seed: with a sample's number decides its noise.
        pixels: the images are kept as well, to be masked.
        noise: the noise that each sample came from is kept.
        guidance, steps, solver: of the pipeline; without a solver it takes its own.
    """

    what: str = "prior sample"
    phase: str = "draw prior samples"
    seed: int
    pixels: bool = False
    noise: bool = False
    guidance: float = 1.0
    steps: int = 20
    solver: str | None = None


@dataclass(frozen=True)
class TeacherSamples:
    """Samples that a checkpoint draws before training: ``count`` images of ``side`` pixels."""

    count: int
    side: int
    settings: SampleSettings

    @property
    def evaluations(self) -> int:
        """Evaluations of the network for one sample; of a solver that decides by itself one a step."""
        solver = SOLVERS.get(self.settings.solver or "")
        each = 1 if solver is None else solver.evaluations or 1
        return self.settings.steps * each * (1 if self.settings.guidance == 1.0 else 2)


@dataclass(frozen=True)
class Teacher:
    """A checkpoint that draws samples.

    Attributes:
        pipeline: one of ours over ``model``.
        call_arguments: turns prompts or classes into the condition of a call.
        identity: hash of its weights.
        together: most samples that are drawn at once; None: the usual number.
    """

    model: FlowModel
    pipeline: Any
    call_arguments: Callable[[list[str]], dict[str, Any]]
    identity: str
    together: int | None = None


@dataclass(frozen=True)
class TeacherSample(Example):
    """A sample of the checkpoint; only its latents are kept, and its pixels where masks need them."""

    pixels: Tensor | None = field(kw_only=True, default=None, compare=False, repr=False)

    def open(self) -> Image.Image:
        if self.pixels is None:
            raise UserError(f"{self.name} was drawn as latents", "Open an image of the data.")
        return to_pil(self.pixels.float() / 127.5 - 1)

    def content_key(self) -> str:
        return hashlib.sha256(f"drawn {self.name} {self.text} {self.label}".encode()).hexdigest()


def teacher_data(
    checkpoint: str,
    prompts: list[str],
    trained: FlowModel,
    folder: Path,
    settings: SampleSettings,
    *,
    trains_text: bool,
) -> LatentData:
    """Return samples as training data, drawn into ``folder`` where they are not there yet.

    Args:
        checkpoint: the pipeline that draws.
        prompts: a caption, a class or "" for each sample.
        trained: what is trained, whose tokenizer and classes are used. trains_text: with its text encoder.
        folder: where the samples are kept, as latents; a resumed run draws only what is missing.

    Raises:
        UserError: ``folder`` holds samples of another checkpoint, or drawn otherwise.
    """
    state = process_state()
    model = open_base(checkpoint)
    model.pipeline.set_progress_bar_config(disable=True)
    kind, side = model.condition_kind, model.native_side
    if side is None:
        raise UserError(
            f"{checkpoint} does not say of which size its samples are",
            "Nothing can be drawn from it before training.",
        )
    teacher = Teacher(model, model.pipeline, model.call_arguments, weights_hash(model.network))
    with memory_phase(settings.phase), state.main_process_first():
        tensors = samples(teacher, prompts, side, folder, settings)
    source = sample_source(f"samples of {checkpoint}", kind, prompts, trained.classes, settings, tensors)
    pipeline = trained.pipeline
    conditions = conditions_of(
        source, settings.seed, pipeline.tokenizer, None if trains_text else pipeline.text_encoder
    )
    return sample_data(source, tensors, side, conditions, settings, size_conditioning=trained.takes_sizes)


def sample_source(
    name: str,
    kind: Kind,
    prompts: list[str],
    classes: Sequence[str],
    settings: SampleSettings,
    tensors: Mapping[str, Tensor],
) -> Source:
    """Return samples as examples, with the prompt or class that each was drawn for."""
    images = tensors.get("pixels")
    examples = tuple(
        TeacherSample(
            f"{settings.what} {number}",
            text=prompt if kind == "text" else None,
            label=prompt if kind == "class" else None,
            pixels=None if images is None else images[number],
        )
        for number, prompt in enumerate(prompts)
    )
    return Source(name, examples, kind, tuple(classes) if kind == "class" else ())


def sample_data(
    source: Source,
    tensors: dict[str, Tensor],
    side: int,
    conditions: Conditions,
    settings: SampleSettings,
    *,
    size_conditioning: bool = False,
) -> LatentData:
    """Return samples, see `samples`, as training data."""
    count = len(source)
    natural = np.full((count, 2), side, dtype=np.int32)
    framing = Cropping(source, ((side, side),), np.zeros(count, dtype=np.int32), natural)
    latents = LatentTable(tensors.pop("latents")[:, None], None)
    return LatentData(
        framing,
        [BucketData(latents, tensors)],
        conditions,
        flips=False,
        size_conditioning=size_conditioning,
        seed=settings.seed,
    )


def samples(
    teacher: Teacher, prompts: list[str], side: int, folder: Path, settings: SampleSettings
) -> dict[str, Tensor]:
    """Read the samples in ``folder``, and draw those that are missing.

    Returns:
        ``latents`` (N, C, h, w), and if they are kept the ``noise`` that they came from, of the same shape, and
        ``pixels`` (N, 3, H, W) uint8.

    Raises:
        UserError: ``folder`` holds samples of another checkpoint, or drawn otherwise.
    """
    plain = {name: value for name, value in asdict(settings).items() if name not in ("what", "phase")}
    _claim(folder, {"checkpoint": teacher.identity, "asked": prompts, "side": side, **plain})
    together = min(teacher.together or _TOGETHER, max(1, _PIXELS // side**2))
    files = {
        folder / f"{start:06d}.safetensors": range(start, min(start + together, len(prompts)))
        for start in range(0, len(prompts), together)
    }
    missing = {file: rows for file, rows in files.items() if not file.is_file()}
    drawn_before = len(prompts) - sum(map(len, missing.values()))
    title: dict[str, Any] = {
        "desc": f"drawing {settings.what}s",
        "total": len(prompts),
        "initial": drawn_before,
    }
    with progress_bar(hidden=not missing, **title) as bar:
        for file, rows in missing.items():
            teacher.model.pipeline.to(process_state().device)
            drawn = _draw(teacher, prompts[rows.start : rows.stop], rows.start, side, settings)
            with replacing(file) as partial:
                save_tensors({name: value.contiguous() for name, value in drawn.items()}, partial)
            bar.update(len(rows))
    parts = [_read(file, len(rows)) for file, rows in files.items()]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _draw(
    teacher: Teacher, prompts: list[str], start: int, side: int, settings: SampleSettings
) -> dict[str, Tensor]:
    model, rows = teacher.model, range(start, start + len(prompts))
    random = (seeded(settings.seed, Stream.TEACHER_SAMPLES, row) for row in rows)
    generators = [torch.Generator().manual_seed(each.initial_seed()) for each in random]
    noise = model.noise(len(rows), side, side, generators)
    latents = teacher.pipeline(
        **teacher.call_arguments(prompts), height=side, width=side, guidance_scale=settings.guidance,
        num_inference_steps=settings.steps, solver=settings.solver, generator=generators, latents=noise,
        output_type="latent",
    ).images  # fmt: skip
    drawn = {"latents": latents.float().cpu()}
    if settings.noise:
        drawn["noise"] = noise.float().cpu()
    if settings.pixels:
        images = model.decode(latents).cpu()
        drawn["pixels"] = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return drawn


def _claim(folder: Path, origin: dict[str, Any]) -> None:
    """Write what the samples in ``folder`` are drawn from, or check that it is the same.

    Raises:
        UserError: it is not.
    """
    file = folder / "drawn.json"
    if not file.is_file():
        if process_state().is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(file) as partial:
                partial.write_text(json.dumps(origin, ensure_ascii=False), encoding="utf-8")
        return
    # Not by `read_json`, whose bound is for strangers' files: this one names each of any number of samples.
    with reading(file, OSError, ValueError, RecursionError, fix="Use another output folder."):
        held = json.loads(file.read_text(encoding="utf-8"))
    held = held if isinstance(held, dict) else {}
    differ = [name for name in origin if origin[name] != held.get(name)]
    if differ:
        lines = "".join(f"\n  {_difference(name, held.get(name), origin[name])}" for name in differ)
        raise UserError(
            f"{folder} holds samples that were drawn otherwise:{lines}",
            "Undo the change, or use another output folder.",
        )


#: what people know the settings in ``drawn.json`` by, where it is not their own name
_SETTINGS = {
    "asked": "other classes or captions, or another number of them (--prior-samples, --prior-prompts)",
    "checkpoint": "another checkpoint, or one whose weights have changed since",
    "side": "another size of its images",
    "noise": "the noise of each sample",
    "pixels": "the pixels of each sample, which --inpainting, masks and --alignment need",
}


def _difference(name: str, before: Any, now: Any) -> str:
    """Return a line on a setting of the samples that is another one now."""
    if name in ("noise", "pixels"):
        return f"{'without' if now else 'with'} {_SETTINGS[name]}"
    return _SETTINGS.get(name, f"{name}: {before} -> {now}")


def _read(file: Path, rows: int) -> dict[str, Tensor]:
    fix = "Remove it: its samples are drawn again."
    with reading(file, OSError, SafetensorError, fix=fix):
        part: dict[str, Tensor] = load_file(file)
    if "latents" not in part or any(len(tensor) != rows for tensor in part.values()):
        raise UserError(f"{file} does not hold {rows} samples", fix)
    return part
