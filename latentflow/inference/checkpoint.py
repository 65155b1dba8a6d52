"""The checkpoint that a program samples from, with its adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import AdapterChoice
from ..errors import UserError, reason
from ..utils.libraries import quiet_libraries
from ..utils.settings import check_types, read_settings


def add_adapters(pipe: Any, choice: AdapterChoice, checkpoint: str) -> None:
    """Put the adapters into the pipeline's weights, each times its weight.

    Args:
        checkpoint: folder or hub id that the pipeline comes from.

    Raises:
        UserError: one cannot be loaded, see ``load_lora_weights``, or its weight is no finite number; the checkpoint
            brings none for ``fast``.
    """
    if choice.fast:
        if Path(checkpoint).is_dir() and not (Path(checkpoint) / "fast").is_dir():
            raise UserError(
                f"--fast: {checkpoint} brings no adapter for few steps (a folder `fast`)",
                "Make a student: latentflow distill CHECKPOINT DATA -o runs/fast --lora-rank 32, and draw with it: "
                "--lora runs/fast. A student of all weights is a checkpoint of its own: --checkpoint runs/fast.",
            )
        pipe.merge_lora_weights(checkpoint, any_base=choice.lora_any_base, subfolder="fast")
    if not choice.lora:
        return
    wanted = [_split(text) for text in choice.lora]
    names = [f"adapter-{number}" for number in range(len(wanted))]
    for name, (source, _) in zip(names, wanted, strict=True):
        pipe.load_lora_weights(source, adapter_name=name, any_base=choice.lora_any_base)
    pipe.set_adapters(names, [weight for _, weight in wanted])
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def _split(text: str) -> tuple[str, float]:
    """``runs/hats:0.8`` -> where its adapter is, 0.8."""
    source, _, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        source = ""
    if not source or Path(text).exists():  # no colon, or one of the path's own
        source, weight = text, 1.0
    if not math.isfinite(weight):
        raise UserError(f"--lora {text}: the weight is {weight}", "It must be a number such as 0.8.")
    inside_run = Path(source) / "adapter"
    if inside_run.is_dir():
        return str(inside_run), weight
    if not Path(source).exists() and len(Path(source).parts) != 2:
        raise UserError(f"--lora {source}: no such folder or file", "A run's adapter is in RUN/adapter.")
    return source, weight


# In an installed wheel under latentflow/programs/, in a clone beside latentflow/.
_PACKAGE = Path(__file__).resolve().parents[1]
_ROOT = _PACKAGE / "programs" if (_PACKAGE / "programs").is_dir() else _PACKAGE.parent
SHIPPED = _ROOT / "checkpoints" / "emoji-64"


# Of the settings that `taken_by` reads.
_TYPES: dict[str, Any] = {
    "id2label": dict[str, str] | None,
    "num_classes": int | None,
    "text_dim": int | None,
    "condition_channels": int,
    "step_counts": list[int] | None,
    "average": bool,
    "folded_guidance": float,
}


@dataclass(frozen=True)
class Takes:
    """What a checkpoint is asked with: a caption, one of these classes, a mask; and how it likes to be asked.

    Attributes:
        steps: how many it usually draws in.
        guided: it has learned its guidance along, and takes no other.
    """

    text: bool
    labels: tuple[str, ...]
    masks: bool
    steps: int = 20
    guided: bool = False

    @property
    def condition(self) -> bool:
        """Whether there is anything to guide by."""
        return self.text or bool(self.labels)


def takes(checkpoint: str | None = None) -> Takes | None:
    """What the pipeline folder's JSON says, in no time; None where there is no such folder.

    Args:
        checkpoint: as of ``open_pipeline``.

    Raises:
        UserError: the JSON cannot be read, or says nothing of the kind.
    """
    folder = Path(_source(checkpoint))
    files = [folder / "model_index.json", folder / "transformer" / "config.json"]
    if not all(file.is_file() for file in files):
        return None
    settings = [read_settings(file) for file in files]
    for file, one in zip(files, settings, strict=True):
        check_types(file, one, _TYPES)
    return taken_by(*settings)


def taken_by(pipe: Mapping[str, Any], network: Mapping[str, Any]) -> Takes:
    """As the configs of a pipeline and of its network say; classes without names are numbers."""
    names = (pipe.get("id2label") or {}).values()
    return Takes(
        text=network.get("text_dim") is not None,
        labels=tuple(names) or tuple(str(number) for number in range(network.get("num_classes") or 0)),
        masks=bool(network.get("condition_channels")),
        steps=(pipe.get("step_counts") or [4 if pipe.get("average") else 20])[-1],
        guided=pipe.get("folded_guidance", 1.0) != 1.0,
    )


def open_pipeline(
    kind: str,
    checkpoint: str | None = None,
    device: str = "auto",
    adapters: AdapterChoice | None = None,
) -> Any:
    """The pipeline of the class that ``latentflow`` calls ``kind``, on its device.

    Args:
        kind: such as "LatentFlowPipeline".
        checkpoint: pipeline folder, run folder or hub id; None: the shipped checkpoint.
        device: "auto" (a GPU if there is one) or torch's name of one.
        adapters: what is merged into it.

    Raises:
        UserError: there is no such checkpoint, or the shipped one is missing; an adapter does not fit; torch knows no
            such device, or this machine has none.
    """
    source = _source(checkpoint)
    import latentflow

    place = fastest_device() if device == "auto" else checked_device(device)

    quiet_libraries()
    pipeline = getattr(latentflow, kind).from_pretrained(source)
    if adapters is not None:
        add_adapters(pipeline, adapters, source)
    return pipeline.to(place)


def _source(checkpoint: str | None) -> str:
    if checkpoint is None and not (SHIPPED / "model_index.json").is_file():
        raise UserError(
            f"the shipped checkpoint is not there: {SHIPPED}",
            "Give --checkpoint DIR, or train one: latentflow train FOLDER -o runs/mine, then "
            "--checkpoint runs/mine",
        )
    source = str(SHIPPED) if checkpoint is None else checkpoint
    inside_run = Path(source) / "pipeline"
    return str(inside_run) if (inside_run / "model_index.json").is_file() else source


def checked_device(name: str) -> str:
    """Return ``name`` if tensors can be put on the device that torch calls so.

    Raises:
        UserError: torch knows no such device, or this machine has none.
    """
    import torch

    try:
        torch.empty(1, device=name)
        if torch.device(name).type == "meta":
            raise ValueError("it holds no numbers")
    # torch's ways to say so: AssertionError where it was built without CUDA.
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, ValueError) as error:
        raise UserError(
            f"--device {name} cannot be used: {reason(error)}",
            f"auto takes {fastest_device()} here.",
        ) from error
    return name


def fastest_device() -> str:
    """ "cuda", "mps" or "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
