"""A first command line for a data set, with the reason for each choice."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from ...config import PRESETS
from .report import Report

_REACHED = 0.9  # share of the images that have to be large enough
_PASSES = 70  # over the data: the shipped checkpoint took 72 over 3,208 images
_LEAST_STEPS = 2000
_MUCH_LOST = 0.1  # share of an image that a square cuts off, on average, from which buckets pay
_PRETRAINED_FROM = 256  # pixels
_PRETRAINED = "stabilityai/sd-vae-ft-mse"


# The resolutions that each `latentflow train --preset` fits, and where it runs.
_FITS = {
    "tiny": (range(64), ", also on a CPU"),
    "small": (range(64, 256), ", also on a CPU"),
    "base": (range(256, 257), " on a GPU"),
}


@dataclass(frozen=True)
class Suggestion:
    """A command line for the shell, and the reason for each choice in it."""

    command: str
    reasons: dict[str, str]


def suggest(report: Report, *, gpu: bool, flags: tuple[str, ...] = ()) -> Suggestion | None:
    """Suggest a first training; None where the data cannot be used, or are latents already.

    Args:
        report: of the data.
        gpu: whether this machine has one.
        flags: those of the check that the training needs as well, such as ("--masks", "alpha").
    """
    if report.problems or not report.sizes:
        return None
    resolution, why = _resolution(report, gpu)
    preset, place = next((name, place) for name, (sides, place) in _FITS.items() if resolution in sides)
    batch, most_steps = PRESETS[preset]["train_batch_size"], PRESETS[preset]["max_train_steps"]
    reasons = {
        f"--preset {preset}": f"fits {resolution} px{place}",
        f"--resolution {resolution}": why,
    }
    if (lost := 1 - report.kept_by_square_crop) > _MUCH_LOST:
        what = f"a square would cut off {lost:.0%} of an image on average"
        reasons["--buckets"] = f"{what}; this trains each at its own aspect ratio"
    if resolution >= _PRETRAINED_FROM:
        what = "at this size a pretrained autoencoder saves days"
        reasons[f"--vae {_PRETRAINED}"] = f"{what}; it is downloaded once, a folder of yours will do too"
    else:
        what = "below 256 px pretrained autoencoders lose detail"
        reasons["no --vae"] = f"{what}; one is trained on your images first"
    enough_steps = 100 * round(report.images * _PASSES / batch / 100)
    steps = min(most_steps, max(_LEAST_STEPS, enough_steps))
    passes = steps * batch / report.images
    reasons[f"--max-train-steps {steps}"] = (
        f"{passes:.0f} passes over {report.images} images in batches of {batch} (the shipped checkpoint "
        "took 72 over 3,208); more help while val_loss falls"
    )
    if report.masks:
        reasons["masks"] = f"inpainting is trained as well: {report.masks} images have a mask"
    chosen = [word for choice in reasons if choice.startswith("--") for word in choice.split()]
    command = ["latentflow", "train", report.data, "-o", f"runs/{_name(report.data)}", *chosen, *flags]
    return Suggestion(shlex.join(command), reasons)


def _resolution(report: Report, gpu: bool) -> tuple[int, str]:
    """Return the resolution, and the reason for it."""
    large = [int(side) for side, count in report.reach.items() if count >= _REACHED * report.images]
    limit = 256 if gpu else 64
    resolution = min(max(large, default=32), limit)
    count = report.reach[str(resolution)]
    why = f"{count / report.images:.0%} of the images are at least that large"
    if not large:
        why += "; the others are enlarged"
    elif max(large) > limit:
        why += f"; most reach {max(large)} px, but " + (
            "each doubling costs at least 4 times the work" if gpu else "without a GPU more takes days"
        )
    return resolution, why


def _name(data: str) -> str:
    """Return a short name for the run: the folder's, or the one above where that is only a part (train)."""
    path = Path(data.split(":")[-1])
    stem = path.parent.name if path.stem in ("train", "training") and path.parent.name else path.stem
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in stem).strip("-") or "first"
