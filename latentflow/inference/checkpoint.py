"""Opening the checkpoint that a program samples from, with its adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import AdapterChoice
from ..errors import UserError, reason
from ..utils.components import quiet_libraries
from ..utils.files import check_types, read_settings

if TYPE_CHECKING:
    from ..families import FlowModel


def add_adapters(pipe: Any, choice: AdapterChoice, checkpoint: str) -> None:
    """Merge the adapters into the pipeline's weights, each times its weight.

    Args:
        checkpoint: folder or hub id that the pipeline was loaded from.

    Raises:
        UserError: an adapter cannot be loaded, see ``load_lora_weights``; its weight is not a finite number; or the
            checkpoint has no adapter for ``fast``.
    """
    if choice.fast:
        if Path(checkpoint).is_dir() and not (Path(checkpoint) / "fast").is_dir():
            raise UserError(
                f"--fast: {checkpoint} has no few-step adapter (a folder `fast`)",
                "Train one: latentflow distill CHECKPOINT DATA -o runs/fast --lora-rank 32, and sample with "
                "--lora runs/fast. Without --lora-rank the student is a checkpoint of its own: --checkpoint runs/fast.",
            )
        pipe.merge_lora_weights(checkpoint, any_base=choice.lora_any_base, subfolder="fast")
    if not choice.lora:
        return
    adapters = {f"adapter-{number}": _split(text) for number, text in enumerate(choice.lora)}
    for name, (source, _) in adapters.items():
        pipe.load_lora_weights(source, adapter_name=name, any_base=choice.lora_any_base)
    pipe.set_adapters(list(adapters), [weight for _, weight in adapters.values()])
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def _split(text: str) -> tuple[str, float]:
    """Split ``runs/hats:0.8`` into the adapter's folder or hub id and 0.8; without a number the weight is 1."""
    source, _, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        source = ""
    if not source or Path(text).exists():  # no colon, or one that belongs to the path
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


# Types of the settings that `read_capabilities` reads.
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
class Capabilities:
    """Conditions that a checkpoint takes, and the settings that it is usually sampled with.

    Attributes:
        text: it takes prompts.
        labels: names of its classes, or their numbers where they have no names.
        masks: it was trained to inpaint.
        steps: usual number of steps.
        distilled_guidance: guidance was distilled into the network, which takes no other scale.
    """

    text: bool
    labels: tuple[str, ...]
    masks: bool
    steps: int = 20
    distilled_guidance: bool = False

    @property
    def condition(self) -> bool:
        """Return whether there is a condition to guide by."""
        return self.text or bool(self.labels)


def read_capabilities(checkpoint: str | None = None) -> Capabilities | None:
    """Read a pipeline folder's capabilities from its JSON files, without loading it; None for a hub id.

    Args:
        checkpoint: as for ``open_pipeline``.

    Raises:
        UserError: the JSON cannot be read, or a setting has the wrong type.
    """
    folder = Path(_resolve(checkpoint))
    files = [folder / "model_index.json", folder / "transformer" / "config.json"]
    if not all(file.is_file() for file in files):
        return None
    pipe, network = settings = [read_settings(file) for file in files]
    for file, config in zip(files, settings, strict=True):
        check_types(file, config, _TYPES)
    names = (pipe.get("id2label") or {}).values()
    return Capabilities(
        text=network.get("text_dim") is not None,
        labels=tuple(names) or tuple(str(number) for number in range(network.get("num_classes") or 0)),
        masks=bool(network.get("condition_channels")),
        steps=(pipe.get("step_counts") or [4 if pipe.get("average") else 20])[-1],
        distilled_guidance=pipe.get("folded_guidance", 1.0) != 1.0,
    )


def model_capabilities(model: FlowModel) -> Capabilities:
    """Return the capabilities of an open checkpoint, of any family."""
    return Capabilities(
        text=model.takes_text,
        labels=model.classes,
        masks=model.takes_masks,
        steps=model.usual_steps,
        distilled_guidance=model.few_steps.folded_guidance != 1.0,
    )


def open_pipeline(
    kind: str, checkpoint: str | None = None, device: str = "auto", adapters: AdapterChoice | None = None
) -> Any:
    """Load a pipeline onto its device.

    Args:
        kind: name of its class in ``latentflow``, such as "LatentFlowPipeline".
        checkpoint: pipeline folder, run folder or hub id; None: the shipped checkpoint.
        device: "auto" (a GPU if there is one) or torch's name of one.
        adapters: adapters to merge into its weights.

    Raises:
        UserError: there is no such checkpoint, or the shipped one is missing; an adapter does not fit; torch knows no
            such device, or this machine has none.
    """
    source = _resolve(checkpoint)
    import latentflow

    target = fastest_device() if device == "auto" else check_device(device)

    quiet_libraries()
    pipeline = getattr(latentflow, kind).from_pretrained(source)
    if adapters is not None:
        add_adapters(pipeline, adapters, source)
    return pipeline.to(target)


def _resolve(checkpoint: str | None) -> str:
    """Return the pipeline folder, also of a run folder, or the hub id."""
    if checkpoint is None and not (SHIPPED / "model_index.json").is_file():
        raise UserError(
            f"the shipped checkpoint is missing: {SHIPPED}",
            "Give --checkpoint DIR, or train one: latentflow train FOLDER -o runs/mine, then "
            "--checkpoint runs/mine",
        )
    source = str(SHIPPED) if checkpoint is None else checkpoint
    inside_run = Path(source) / "pipeline"
    return str(inside_run) if (inside_run / "model_index.json").is_file() else source


def check_device(name: str) -> str:
    """Return ``name`` if tensors can be put on the device that torch calls so.

    Raises:
        UserError: torch knows no such device, or this machine has none.
    """
    import torch

    try:
        torch.empty(1, device=name)
        if torch.device(name).type == "meta":
            raise ValueError("it holds no numbers")
    # torch raises all of these; AssertionError where it was built without CUDA.
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, ValueError) as error:
        raise UserError(
            f"--device {name} cannot be used: {reason(error)}", f"auto takes {fastest_device()} here."
        ) from error
    return name


def fastest_device() -> str:
    """Return "cuda", "mps" or "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
