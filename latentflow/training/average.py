"""A run's result with weights averaged over another length: from the snapshots in its folder ``averages``.

Karras et al. 2024 (EDM2, arXiv:2312.02696), appendix C.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import UserError, one_line
from ..families import FlowModel
from ..utils.files import read_json
from .loop.checkpoint import list_checkpoints, load_checkpoint, step_of
from .loop.run_folder import write_folder
from .loop.saving import AVERAGES
from .loop.trained_module import exponent
from .report.export import is_generated, moved, signed, unsigned

log = logging.getLogger(__name__)

Array = NDArray[np.float64]

_PREFIX = "flow-average-"  # of the name of an average in a snapshot, before its length

_CARD = """
## Weights

The weights are a power-function average (EDM2, arXiv:2312.02696) of relative length {length:g} at step {step}, made
after training. Samples and figures on this page are of the weights that the run ended with.
"""


def averaged_pipeline(run: Path, length: float, output: Path) -> None:
    """Write a pipeline folder like ``run / "pipeline"`` whose weights, in float32, are averaged over another length.

    Args:
        run: a finished run with snapshots.
        length: relative; see `exponent`.
        output: the folder to make.

    Raises:
        UserError: the run is not finished, has no snapshots or trained an adapter, a snapshot is damaged, the length
            cannot be, or ``output`` exists.
    """
    result = run / "pipeline"
    if not (result / "model_index.json").is_file():
        raise UserError(f"{run} has no pipeline", "Give the folder of a finished run of `latentflow train`.")
    if output.exists():
        raise UserError(f"{output} exists", "Choose another name.")
    weights, step = reconstruct(run / AVERAGES, length)
    # The head of a feature alignment was trained along, and is no part of the result.
    weights = {name: weight for name, weight in weights.items() if not name.startswith("alignment.")}
    if any("lora_" in name for name in weights):
        raise UserError(
            f"the averages in {run / AVERAGES} are of an adapter, without the weights that it adapts",
            "Train with --ema-lengths but without --lora-rank.",
        )
    model = FlowModel.from_pretrained(result)
    parts = {"network": model.network, "text_encoder": model.pipeline.text_encoder}
    trained = nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, nn.Module)})
    try:
        unknown = trained.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError:  # other shapes
        unknown = ["shapes"]
    if unknown:
        raise UserError(
            f"the averages in {run / AVERAGES} do not fit {result}: {unknown[0]}",
            "Were the settings of the run changed after it was finished? Let it finish again.",
        )

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        if (result / "sample.png").is_file():
            shutil.copy2(result / "sample.png", folder)
        if (result / "README.md").is_file():
            card = (result / "README.md").read_text(encoding="utf-8")
            if is_generated(card):
                card = signed(unsigned(card) + _CARD.format(length=length, step=step))
                card = moved(card, one_line(str(output)))
            (folder / "README.md").write_text(card, encoding="utf-8")

    write_folder(output, write)


def reconstruct(folder: Path, length: float) -> tuple[dict[str, Tensor], int]:
    """Return the weights averaged with a relative ``length``.

    Args:
        folder: of snapshots.

    Returns:
        Name -> float32, and the step at which they are averaged: the newest snapshot's.

    Raises:
        UserError: there are no snapshots, one is damaged, or the length cannot be.
    """
    snapshots = list_checkpoints(folder)
    if not snapshots:
        raise UserError(
            f"{folder} has no snapshots of weight averages",
            "They are made in training and not afterwards: a new run with --ema-lengths 0.05 0.1 makes them. The "
            "result of this run, in its folder `pipeline`, has the average of --ema-decay.",
        )
    names = [(snapshot, name) for snapshot in snapshots for name in _averages(snapshot)]
    step = step_of(snapshots[-1])
    profiles = [(float(name.removeprefix(_PREFIX)), step_of(snapshot)) for snapshot, name in names]
    factors, off = coefficients(profiles, length, step)
    tracked = ", ".join(f"{tracked:g}" for tracked in sorted({tracked for tracked, _ in profiles}))
    log.info(
        f"{len(snapshots)} snapshots of the lengths {tracked} up to step {step}: the mix of {len(names)} averages "
        f"differs from the profile of length {length:g} by {off:.1e}"
    )
    if off > 0.1:
        log.warning(f"WARNING: that is much. Lengths near or between {tracked} are met better.")
    total: dict[str, Tensor] = {}
    for snapshot in snapshots:
        state = load_checkpoint(snapshot)
        for (place, name), factor in zip(names, factors, strict=True):
            for key, value in state[name].items() if place == snapshot else ():
                total[key] = total.get(key, torch.zeros(())) + float(factor) * value.double()
    return {key: value.float() for key, value in total.items()}, step


def _averages(snapshot: Path) -> list[str]:
    """Return the names of the averages in a snapshot, without reading them."""
    fix = "Move it away: the others will do."
    document = read_json(snapshot / "state.json", fix)
    state = document.get("state") if isinstance(document, dict) else None
    if not isinstance(state, dict):
        raise UserError(f"{snapshot} is damaged: state.json is not what was written", fix)
    return [name for name in state if name.startswith(_PREFIX)]


def coefficients(snapshots: Sequence[tuple[float, int]], length: float, step: int) -> tuple[Array, float]:
    """Return factors that mix snapshots into the average of another length: least squares of profiles (appendix C).

    The mix weighs all steps by 1 in total, so that weights that never moved are met exactly.

    Args:
        snapshots: (relative length, step) of each.
        length, step: of the average that is wanted.

    Returns:
        (N,) factors, and the distance of the mixed profile from the wanted one, relative to it in the L2 norm.

    Raises:
        UserError: a length that no profile has.
    """
    gammas = np.array([exponent(known) for known, _ in snapshots])
    steps = np.array([float(taken) for _, taken in snapshots])
    wanted, now = np.array([exponent(length)]), np.array([float(step)])
    products = _products(gammas, steps, gammas, steps)
    targets = _products(gammas, steps, wanted, now)[:, 0]
    (norm,) = _products(wanted, now, wanted, now)[0]
    # In units of each profile's norm: later profiles are wider and lower. The last row and column hold the sum to 1.
    scale = 1.0 / np.sqrt(np.diag(products))
    system = np.zeros((len(scale) + 1, len(scale) + 1))
    system[:-1, :-1] = products * np.outer(scale, scale)
    system[-1, :-1] = system[:-1, -1] = scale / scale.max()
    right = np.append(targets * scale, 1.0 / scale.max())
    factors: Array = np.linalg.lstsq(system, right, rcond=1e-14)[0][:-1] * scale
    residual = norm - 2.0 * factors @ targets + factors @ products @ factors
    return factors, float(np.sqrt(max(0.0, residual) / norm))


def _products(gamma_a: Array, step_a: Array, gamma_b: Array, step_b: Array) -> Array:
    """Return inner products (A, B) of the profiles (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t], in closed form."""
    a, ta, b, tb = gamma_a[:, None], step_a[:, None], gamma_b[None], step_b[None]
    shared = np.minimum(ta, tb)
    # The powers as logarithms: t^gamma alone overflows.
    powers = (a + b + 1) * np.log(shared) - (a + 1) * np.log(ta) - (b + 1) * np.log(tb)
    return np.asarray((a + 1) * (b + 1) / (a + b + 1) * np.exp(powers))
