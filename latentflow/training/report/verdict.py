"""The verdict on a run at its end, from the files in its folder: what became of it, and the command that helps next."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...errors import is_number
from ...utils.flags import flag_of
from .folder import Run

LEARNING = "learning.json"  # what `LearningMeter` measured
MEMORISATION = "memorisation.json"  # what `report_memorisation` measured

# A trend counts if chance makes one in less than a hundredth of curves that are flat but for independent noise, and if
# it matters: by how much the loss changes, as a share of it, over half of the run (or, rising, since its least value).
_CHANCE = 0.01
_FALLS, _RISES = 0.01, 0.02
_LEAST = 4  # points of a trend
_ENOUGH = 8  # held-out images; the loss on fewer is known exactly, but is that of these images only
# A network from scratch falls from about the variance of the data to a half of it and less.
_LEARNT = 0.1
# Captions of so few images are meant to draw them. In ten runs on 20 to 77 images (docs/measurements/fine-tuning.md)
# the loss was lower with the caption than without by 12 to 28 % where 10 to 36 % of the captions drew the right
# image, and by 42 to 81 % where 40 to 100 % did. It says less of latents of many numbers, where most times are those
# of surfaces: with 4,096 numbers it was 31 % lower where 86 % did, and 7 of 16 drawn images were copies. Pretrained
# models, which were not measured, are judged as the others are.
_FEW_CAPTIONED = 100
_BY_CAPTION = 1 / 3
_COPIES = 0.5  # share of generated images that are as near to a training image as copies are
_NO_CURVE = ("progressive", "distribution-matching")  # methods whose loss means something else as they go on


@dataclass(frozen=True)
class Trend:
    """The end of a curve.

    Attributes:
        kind: falling; rising since ``step``; flat; or unknown, of fewer than eight points.
        change: share of the loss by which it fell over the second half of the run, or rose since ``step``.
        step: of the least value.
    """

    kind: Literal["falling", "rising", "flat", "unknown"]
    change: float = 0.0
    step: int = 0


def trend(steps: Sequence[int], losses: Sequence[float]) -> Trend:
    """Return how a curve ends, by the slope of a least-squares line and a one-sided t test of it.

    Rising is looked for after the least value, falling in the second half. A flat curve with independent Gaussian noise
    is called either in at most 2 of 100 cases.
    """
    x, y = np.asarray(steps, float), np.asarray(losses, float)
    if len(y) < 2 * _LEAST:
        return Trend("unknown")
    best = int(y.argmin())
    # Without the least value itself, which is the least by chance as well: then those after it may come in any order.
    later = slice(best + 1, None)
    rise = _change(x[later], y[later], "greater")
    risen = float(y[-3:].mean() / y[best] - 1)
    if rise > 0 and risen >= _RISES:
        return Trend("rising", risen, int(x[best]))
    late = x >= (x[0] + x[-1]) / 2
    fall = -_change(x[late], y[late], "less")
    return Trend("falling" if fall >= _FALLS else "flat", fall, int(x[best]))


def _change(x: np.ndarray, y: np.ndarray, alternative: Literal["less", "greater"]) -> float:
    """Return by which share of its mean a line through the points changes; 0 if that may be chance."""
    from scipy.stats import linregress

    if len(x) < _LEAST or np.ptp(y) == 0:
        return 0.0
    line = linregress(x, y, alternative=alternative)
    return float(line.slope * np.ptp(x) / abs(y.mean())) if line.pvalue < _CHANCE else 0.0


@dataclass(frozen=True)
class Verdict:
    """A verdict on a run.

    Attributes:
        kind: what became of the run.
        text: sentences for the user.
        command: what to run next; "": nothing.
    """

    kind: Literal["not learnt", "memorising", "unstable", "still falling", "done", "stopped early"]
    text: str
    command: str = ""

    @property
    def line(self) -> str:
        """The entry of the log."""
        return f"verdict: {self.text}" + (f"\n  {self.command}" if self.command else "")

    @property
    def remark(self) -> str:
        """The sentences alone, for where no command follows."""
        return self.text[:-1] + "." if self.text.endswith(":") else self.text


def judge(run: Run) -> Verdict | None:
    """Return the verdict on a finished run; None if it is not finished, or too short to tell."""
    if not run.finished:
        return None
    if run.stopped_early:
        return Verdict(
            "stopped early",
            f"done. The loss on held-out images did not get lower any more after step {run.result_step}, and the "
            "result has the weights of that step.",
        )
    name, losses = _curve(run)
    found = trend(*losses)
    if not is_number(run.config.get(_rate(run))):  # settings of a stranger's making
        return None
    return (
        _not_learnt(run, found)
        or _memorising(run, found if name.startswith("held-out") else Trend("unknown"))
        or _by_trend(run, found, name)
    )


def _curve(run: Run) -> tuple[str, tuple[list[int], list[float]]]:
    """Return the name of the figure that is minimised and its curve: of held-out images, else of the training.

    The curve is empty where the figure means something else as the run goes on.
    """
    settings = run.config
    if settings.get("method") in _NO_CURVE or settings.get("joint"):  # losses of latents that change
        return "training loss", ([], [])
    steps, psnr = run.curve("val_psnr")
    if run.is_autoencoder and steps:
        return "held-out error", (steps, [10 ** (-value / 10) for value in psnr])
    if not run.is_autoencoder and run.curve("val_loss")[0] and _held_out(run) >= _ENOUGH:
        return "held-out loss", run.curve("val_loss")
    if settings.get("adversarial_weight") and run.is_autoencoder:  # the discriminator learns, too
        return "training loss", ([], [])
    late_changes = settings.get("time_uniform_from", 1.0) != 1.0 or settings.get("route_share")
    if late_changes:  # of the times, of the tokens
        return "training loss", ([], [])
    return "training loss", run.curve("loss")


def _held_out(run: Run) -> int:
    """Return the number of held-out images, as the log says it; without one, enough."""
    found = [match for line in run.log if (match := re.search(r"images to train on, (\d+) held out", line))]
    return int(found[-1][1]) if found else _ENOUGH


def _by_trend(run: Run, found: Trend, name: str) -> Verdict | None:
    what = {
        "held-out loss": "the loss on held-out images",
        "held-out error": "the squared error on held-out images",
        "training loss": "the training loss",
    }
    if found.kind == "falling":
        text = (
            f"still falling. Over the second half of the run {what[name]} fell by another {found.change:.0%}, so more "
            "steps would help:"
        )
        return Verdict("still falling", text, run.resume())
    if found.kind == "rising":  # of held-out images: see `_memorising`
        rate = 0.5 * float(run.config[_rate(run)])
        text = (
            f"unstable. The training loss has risen by {found.change:.0%} since step {found.step}: the learning rate "
            "is too high. Halve it, in a new run:"
        )
        flags = [flag_of(_rate(run)), f"{rate:g}"]
        return Verdict("unstable", text, _anew(run, f"rate-{rate:g}", flags))
    if found.kind == "flat":
        return Verdict("done", f"done. By the end {what[name]} no longer fell.")
    return None


# ---- not learnt ----


def _not_learnt(run: Run, found: Trend) -> Verdict | None:
    if run.is_student:  # begins as its teacher
        return None
    is_fine_tune = bool(run.config.get("init_from"))
    why = _unlearnt(run) if is_fine_tune else "" if found.kind == "unknown" else _unmoved(run)
    if not why or (found.kind == "falling" and not is_fine_tune):
        return None
    if found.kind == "falling":
        return Verdict("not learnt", f"not learnt yet. {why} More steps:", run.resume())
    rate = float(run.config[_rate(run)])
    measured = _figures(run.folder / LEARNING)
    steps = int(measured.get("usual_steps", 0))
    if is_fine_tune and run.step < steps and rate >= measured["usual_learning_rate"]:
        text = f"not learnt yet. {why} Its {run.step} steps are fewer than the {steps} that such a run usually takes:"
        return Verdict("not learnt", text, run.resume(max(2 * run.step, steps)))
    if is_fine_tune and _has_risen(run):
        text = f"not learnt. {why} It has risen: the learning rate is too high. Halve it, in a new run:"
        flags = [flag_of(_rate(run)), f"{rate / 2:g}"]
        return Verdict("not learnt", text, _anew(run, f"rate-{rate / 2:g}", flags))
    if is_fine_tune and not _draws_by_caption(run):
        why += " Either the rate is too low, or the checkpoint knew these images already."
    higher = 2 * rate
    text = f"not learnt. {why} Raise the learning rate, here from {rate:g} to {higher:g}:"
    return Verdict("not learnt", text, f"{run.resume()} {flag_of(_rate(run))} {higher:g}")


def _rate(run: Run) -> str:
    """Return the key of the learning rate among the settings."""
    return "autoencoder_learning_rate" if run.is_autoencoder else "learning_rate"


def _unmoved(run: Run) -> str:
    """Return why a run from scratch has not learnt; "" if it has."""
    _, losses = run.curve("loss")
    if len(losses) < _LEAST:
        return ""
    fall = 1 - float(np.mean(losses[-(len(losses) // 4) :])) / losses[0]
    return f"The training loss fell by only {max(0.0, fall):.0%} from step 1 on." if fall < _LEARNT else ""


def _unlearnt(run: Run) -> str:
    """Return why a fine-tune has not learnt, by `LearningMeter`; "" if it has, or nothing was measured."""
    found = _figures(run.folder / LEARNING)
    if not found:
        return ""
    before, after, without = found["before"], found["after"], found["without_captions"]
    if _draws_by_caption(run):
        copies = _figures(run.folder / MEMORISATION)
        if copies and copies["copies"] > copies["usual"][1]:  # nearly the images, whatever the loss
            return ""
        if (share := 1 - after / without) < _BY_CAPTION:
            lower = "no lower" if share < 0.005 else f"only {share:.0%} lower"
            return (
                f"Your captions do not draw your images yet. {learning_line(found)} With its caption the loss on an "
                f"image is {lower} than without; where captions draw their images it is lower by a third or more."
            )
        return ""
    if before - after < max(2 * found["error"], 0.02 * before):
        return learning_line(found)
    return ""


def _has_risen(run: Run) -> bool:
    """Return whether a fine-tune draws its training images worse than its checkpoint did, by more than chance."""
    found = _figures(run.folder / LEARNING)
    return bool(found["after"] - found["before"] > max(2 * found["error"], 0.02 * found["before"]))


def learning_line(found: dict[str, Any]) -> str:
    """Return what `LearningMeter` measured, in a sentence."""
    line = f"Loss on the training images: {found['before']:.2f} -> {found['after']:.2f}"
    if found["distinct_captions"]:
        line += f" ({found['without_captions']:.2f} without their captions)"
    return f"{line}."


# ---- memorising ----


def _memorising(run: Run, found: Trend) -> Verdict | None:
    rises = f"The loss on held-out images has risen by {found.change:.0%} since step {found.step}"
    few = _few_captioned(_figures(run.folder / LEARNING))
    if found.kind == "rising" and not few:
        text = (
            f"memorising. {rises}: from there on the network learnt your images by heart. More images help, or fewer "
            "steps, in a new run:"
        )
        return Verdict("memorising", text, _shorter(run, found.step))
    copies = _figures(run.folder / MEMORISATION)
    if copies and copies_too_many(copies):
        why = (
            f"{copies['copied']} of {copies['drawn']} generated images are nearly copies of training images."
        )
    elif found.kind == "rising":  # of few, at once: their captions say little about other images
        why = f"{rises}, as is usual with so few images."
    else:
        return None
    text = (
        f"memorising. {why} If it should draw just these images, it is done. For new ones train on more images, "
        "with --random-flip if left and right do not matter, or for fewer steps in a new run:"
    )
    return Verdict("memorising", text, _shorter(run, run.step // 2))


def _draws_by_caption(run: Run) -> bool:
    """Return whether the captions of a run are meant to draw their images, and it is judged by that."""
    return _few_captioned(_figures(run.folder / LEARNING)) and not run.is_pretrained


def _few_captioned(found: dict[str, Any]) -> bool:
    """Return whether a run learnt few images with captions of their own, by what `LearningMeter` measured."""
    return bool(found) and found["images"] <= _FEW_CAPTIONED and found["distinct_captions"] > 0.5


def measured_lines(run: Run, verdict: Verdict | None) -> list[str]:
    """Return sentences about what was measured once the run was finished, without those of its verdict."""
    learning, copies = (_figures(run.folder / name) for name in (LEARNING, MEMORISATION))
    line = learning_line(learning) if learning else ""
    return [
        *([line] if learning and (not verdict or line not in verdict.text) else []),
        *([memorisation_line(copies)] if copies else []),
    ]


def memorisation_line(found: dict[str, Any]) -> str:
    """Return what `report_memorisation` measured, in sentences: what it is, and what is normal."""
    drawn, chance = found["drawn"], round(found["usual"][1] * found["drawn"])
    return (
        f"{found['copied']} of {drawn} generated images are nearly copies of a training image (up to {chance} may be "
        f"chance). Typically a generated image is {found['ratio']:.2f} times as far from the training image most like "
        "it as images of yours are from the one most like them (about 1: new images; near 0: copies)."
    )


def copies_too_many(found: dict[str, Any]) -> bool:
    """Return whether so many generated images are copies that it is neither chance nor a few."""
    return bool(found["copies"] >= _COPIES and found["copies"] > found["usual"][1])


# ---- commands ----


def _shorter(run: Run, steps: int) -> str:
    """Return the command of a new run with fewer steps."""
    flag = "--autoencoder-steps" if run.is_autoencoder else "--max-train-steps"
    return _anew(run, f"{max(1, steps)}-steps", [flag, str(max(1, steps))])


def _anew(run: Run, name: str, flags: list[str]) -> str:
    """Return the command of a new run with the same settings but for ``flags``, in a folder beside this one."""
    folder = run.folder.with_name(f"{run.folder.resolve().name}-{name}")
    command = [
        "latentflow",
        run.program,
        "--config",
        str(run.folder / "config.yaml"),
        "-o",
        str(folder),
        *flags,
    ]
    own = run.folder / "autoencoder" / "autoencoder"
    if own.is_dir() and not run.is_autoencoder and not run.config.get("vae"):
        command += ["--vae", str(own)]
    return shlex.join(command)


def _figures(file: Path) -> dict[str, Any]:
    """Return the figures of a file that a run wrote; {} if it is missing or torn."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
