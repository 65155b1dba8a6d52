"""Samples of a checkpoint, drawn once into a folder of files, as training data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ...data import Example, Framing, LatentTable, Source, to_pil
from ...data.dataset import Kind
from ...errors import UserError, reading
from ...pipeline.adapter_files import weights_hash
from ...pipeline.generate import LatentFlowPipeline
from ...utils.files import replacing
from ...utils.memory import memory_phase
from ..data import conditions_of
from ..loop.data_order import seeded
from ..loop.distributed import process_state
from ..losses.latent_data import LatentData, Sized
from ..networks import Networks
from .base import open_base

_TOGETHER = 50  # samples in a file, and drawn at once,
_PIXELS = 2**20  # unless they have more pixels in all
_STREAM = 6  # of random numbers; see `seeded`


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How samples are drawn, and what is kept of them.

    Attributes:
        what, phase: what one is called, and the phase of `latentflow.utils.memory.ADVICE`.
        seed: with a sample's number decides its noise.
        pixels: whether the images are kept as well, to be masked.
        noise: whether the noise that each came from is kept.
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
class DrawnExample(Example):
    """A sample of the checkpoint; only its latents are kept, and its pixels where masks need them."""

    pixels: Tensor | None = field(kw_only=True, default=None, compare=False, repr=False)

    def open(self) -> Image.Image:
        if self.pixels is None:
            raise UserError(f"{self.name} was drawn as latents", "Open an image of the data.")
        return to_pil(self.pixels.float() / 127.5 - 1)

    def content_key(self) -> str:
        return hashlib.sha256(f"drawn {self.name} {self.text} {self.label}".encode()).hexdigest()


def drawn_data(
    checkpoint: str, asked: list[str], networks: Networks, folder: Path, drawing: Drawing, told: bool
) -> LatentData:
    """Samples as training data, drawn into ``folder`` where they are not there yet.

    Args:
        checkpoint: the pipeline that draws.
        asked: a caption, a class or "" for each sample.
        networks: what is trained, whose tokenizer and classes are used.
        folder: where the samples are kept, as latents; what a killed run has drawn is not drawn again.
        told: whether the network is told sizes.

    Raises:
        UserError: ``folder`` holds samples of another checkpoint, or drawn otherwise.
    """
    state = process_state()
    with memory_phase(drawing.phase), state.main_process_first():
        tensors, kind, side = _drawn(checkpoint, asked, folder, drawing, state.device)
    views = {name: one for name, one in tensors.items() if name != "latents"}
    images = tensors.get("pixels")
    examples = tuple(
        DrawnExample(
            f"{drawing.what} {number}",
            text=name if kind == "text" else None,
            label=name if kind == "class" else None,
            pixels=None if images is None else images[number],
        )
        for number, name in enumerate(asked)
    )
    source = Source(f"samples of {checkpoint}", examples, kind, networks.classes if kind == "class" else ())
    natural = np.full((len(asked), 2), side, dtype=np.int32)
    framing = Framing(source, ((side, side),), np.zeros(len(asked), dtype=np.int32), natural)
    sized = Sized(LatentTable(tensors["latents"][:, None], None), views)
    conditions = conditions_of(source, networks, drawing.seed)
    return LatentData(framing, [sized], conditions, flips=False, told=told, seed=drawing.seed)


def _drawn(
    checkpoint: str, asked: list[str], folder: Path, drawing: Drawing, device: torch.device
) -> tuple[dict[str, Tensor], Kind, int]:
    """``latents`` (N, C, h, w), perhaps the ``noise`` that they came from, of the same shape, and ``pixels``
    (N, 3, H, W) uint8; what they are conditioned on; their side."""
    pipe = open_base(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    kind: Kind = "text" if pipe.takes_text else "class" if pipe.takes_classes else "unconditional"
    native = pipe.transformer.config.sample_size
    if native is None:
        raise UserError(
            f"{checkpoint} does not say of which size its samples are",
            "Nothing can be drawn from it before training.",
        )
    side = pipe.vae_scale_factor * int(native if isinstance(native, int) else max(native))
    settings = {name: one for name, one in asdict(drawing).items() if name not in ("what", "phase")}
    made_of = {"checkpoint": weights_hash(pipe.transformer), "asked": asked, "side": side, **settings}
    _claim(folder, made_of)
    parts = []
    together = min(_TOGETHER, max(1, _PIXELS // side**2))
    for start in tqdm(range(0, len(asked), together), desc=f"drawing {drawing.what}s", disable=None):
        file = folder / f"{start:06d}.safetensors"
        if not file.is_file():
            _write(file, _draw(pipe.to(device), kind, asked[start : start + together], start, side, drawing))
        parts.append(_read(file, len(asked[start : start + together])))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, kind, side


def _draw(
    pipe: LatentFlowPipeline, kind: Kind, names: list[str], start: int, side: int, drawing: Drawing
) -> dict[str, Tensor]:
    generators = [
        torch.Generator().manual_seed(seeded(drawing.seed, _STREAM, start + row).initial_seed())
        for row in range(len(names))
    ]
    asked: dict[str, Any] = {"num_images_per_prompt": len(names)}
    if kind == "text":
        asked = {"prompt": names}
    elif kind == "class":
        asked = {"class_labels": names if pipe.labels else [int(name) for name in names]}
    noise = pipe.prepare_noise(len(names), side, side, generators, None)
    latents = pipe(
        **asked, height=side, width=side, guidance_scale=drawing.guidance, num_inference_steps=drawing.steps,
        solver=drawing.solver, generator=generators, latents=noise, output_type="latent",
    ).images  # fmt: skip
    drawn = {"latents": latents.float().cpu()}
    if drawing.noise:
        drawn["noise"] = noise.float().cpu()
    if drawing.pixels:
        images = pipe.decode_latents(latents).cpu()
        drawn["pixels"] = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return drawn


def _claim(folder: Path, made_of: dict[str, Any]) -> None:
    """Say what the samples in ``folder`` are drawn from, or check that it is the same."""
    file = folder / "drawn.json"
    if not file.is_file():
        if process_state().is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(file) as partial:
                partial.write_text(json.dumps(made_of, ensure_ascii=False), encoding="utf-8")
        return
    # Not by `read_json`, whose bound is for strangers' files: of each of any number of samples this has a name.
    with reading(file, OSError, ValueError, RecursionError, fix="Use another output folder."):
        held = json.loads(file.read_text(encoding="utf-8"))
    differ = [name for name in made_of if not isinstance(held, dict) or made_of[name] != held.get(name)]
    if differ:
        raise UserError(
            f"{folder} holds samples that were drawn otherwise ({', '.join(differ)})",
            "Use another output folder, or the same checkpoint and flags as before.",
        )


def _read(file: Path, rows: int) -> dict[str, Tensor]:
    fix = "Remove it: its samples are drawn again."
    with reading(file, OSError, SafetensorError, fix=fix):
        part: dict[str, Tensor] = load_file(file)
    if "latents" not in part or any(len(one) != rows for one in part.values()):
        raise UserError(f"{file} does not hold {rows} samples", fix)
    return part


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    with replacing(file) as partial:
        save_file({name: one.contiguous() for name, one in tensors.items()}, partial)
