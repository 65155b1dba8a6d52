"""Solvers that were tuned to a checkpoint: the file that holds them, and the one that a call takes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, few
from ..families.model import FlowModel
from ..flow.solvers.non_stationary import NonStationary
from ..utils.files import check_types, read_settings, replacing, restore_permissions
from .adapter_bases import fingerprint, is_other_base

#: the file in a pipeline folder
FILE = "tuned_solvers.json"
_TYPES: dict[str, Any] = {
    "guidance": float | int,
    "height": int,
    "width": int,
    "network": dict[str, str],
    "held_out": dict[str, float],
    "times": list[float],
    "increments": list[list[float]],
}


@dataclass(frozen=True)
class TunedSolver:
    """The numbers of a solver, and what they were fitted to.

    Attributes:
        numbers: see ``latentflow.flow.NonStationary``.
        guidance: guidance scale.
        height, width: of the images, in pixels.
        network: its fingerprint; empty where it has none.
        held_out: name -> figure, of noises that it was not fitted to.
    """

    numbers: NonStationary
    guidance: float
    height: int
    width: int
    network: dict[str, str]
    held_out: dict[str, float]

    @property
    def steps(self) -> int:
        """Number of steps, and of evaluations."""
        return self.numbers.steps

    def suits(self, guidance: float, height: int, width: int) -> bool:
        """Return whether it was fitted to such a call."""
        return math.isclose(guidance, self.guidance) and (height, width) == (self.height, self.width)

    def plain(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        values = {name: value for name, value in asdict(self).items() if name != "numbers"}
        numbers = self.numbers
        return {"steps": self.steps, **values, "times": [*numbers.times], "increments": [*numbers.increments]}


def is_adapted(model: FlowModel) -> bool:
    """Return whether adapters are beside the network's weights, or were merged into them."""
    network = model.network
    beside = getattr(network, "peft_config", None)
    return bool(
        beside or getattr(network, "_merged_adapter", False) or getattr(model.pipeline, "num_fused_loras", 0)
    )


def read_tuned(folder: Path) -> list[TunedSolver]:
    """Return the solvers that a pipeline folder holds.

    Raises:
        UserError: the file cannot be read, or its numbers are no solver.
    """
    file = folder / FILE
    if not file.is_file():
        return []
    entries, found = read_settings(file).get("solvers"), []
    for entry in entries if isinstance(entries, list) else [None]:
        if not isinstance(entry, dict) or not entry.keys() >= _TYPES.keys():
            raise UserError(f"{file} is no file of tuned solvers", "Remove it, and tune the sampler again.")
        check_types(file, entry, _TYPES)
        numbers = NonStationary(tuple(entry["times"]), tuple(map(tuple, entry["increments"])))
        found.append(TunedSolver(numbers, **{name: entry[name] for name in [*_TYPES][:5]}))
    return found


def write_tuned(folder: Path, tuned: TunedSolver, overwrite: bool = False) -> Path:
    """Add a solver to those of a pipeline folder; return the file.

    Args:
        overwrite: replace one that serves the same calls.

    Raises:
        UserError: there is one already.
    """
    call = tuned.steps, tuned.guidance, tuned.height, tuned.width
    if not overwrite:
        check_free(folder, *call)
    others = [
        other for other in read_tuned(folder) if other.steps != tuned.steps or not other.suits(*call[1:])
    ]
    solvers = sorted([*others, tuned], key=lambda one: (one.steps, one.guidance))
    with replacing(folder / FILE) as partial:
        lines = ",\n".join(json.dumps(solver.plain()) for solver in solvers)
        partial.write_text(f'{{"solvers": [\n{lines}\n]}}\n', encoding="utf-8")
    restore_permissions(folder / FILE)
    return folder / FILE


def check_free(folder: Path, steps: int, guidance: float, height: int, width: int) -> None:
    """Refuse to replace a solver of a pipeline folder.

    Raises:
        UserError: one serves such calls already.
    """
    if any(solver.steps == steps and solver.suits(guidance, height, width) for solver in read_tuned(folder)):
        raise UserError(
            f"{folder / FILE} has a sampler of {steps} steps at guidance {guidance:g} already",
            "--overwrite replaces it.",
        )


def stored(model: FlowModel) -> list[TunedSolver]:
    """Return the solvers in the folder that a model was opened from; none where it is a hub id or has none."""
    origin = model.pipeline.config.get("_name_or_path")
    return read_tuned(Path(origin)) if origin and Path(origin).is_dir() else []


def fitting(
    model: FlowModel, steps: int | None, guidance: float, height: int, width: int
) -> TunedSolver | None:
    """Return the stored solver for a call, None if there is none that fits the network as it is.

    Args:
        steps: None is any number; of several the most.
    """
    suit = [
        solver
        for solver in stored(model)
        if steps in (None, solver.steps) and solver.suits(guidance, height, width)
    ]
    if not suit or is_adapted(model) or is_other_base(suit[0].network, fingerprint(model.network)):
        return None
    return max(suit, key=lambda solver: solver.steps)


def required(model: FlowModel, steps: int | None, guidance: float, height: int, width: int) -> TunedSolver:
    """Return the stored solver for a call.

    Raises:
        UserError: there is none that fits; what fits is named.
    """
    found = fitting(model, steps, guidance, height, width)
    if found is not None:
        return found
    there = stored(model)
    command = f"latentflow tune-sampler CHECKPOINT --guidance {guidance:g}"
    command += "" if steps is None else f" --steps {steps}"
    if not there:
        raise UserError("solver 'tuned': the checkpoint has no tuned solver", f"Tune one: {command}")
    if is_adapted(model):
        raise UserError(
            "solver 'tuned': adapters change the network that it was tuned for",
            "Leave the solver out; or write a checkpoint with the adapter merged, and tune that: latentflow export.",
        )
    if not any(steps in (None, solver.steps) and solver.suits(guidance, height, width) for solver in there):
        asked = (
            "" if steps is None else f"{steps} steps, "
        ) + f"guidance {guidance:g}, {width} x {height} pixels"
        named = [
            f"{had.steps} steps at guidance {had.guidance:g}, {had.width} x {had.height}" for had in there
        ]
        raise UserError(
            f"solver 'tuned': none was tuned for {asked}",
            f"There are: {few(named, 10)}. Or tune one: {command}",
        )
    raise UserError(
        f"solver 'tuned': the network has other weights than the one that {FILE} was tuned for",
        f"Tune it again: {command} --overwrite",
    )
