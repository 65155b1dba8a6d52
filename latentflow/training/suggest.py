"""First command lines for a data set, with their reasons: fine-tunes of a shipped checkpoint, training from scratch."""

from __future__ import annotations

import importlib.util
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import PRESETS, AutoencoderConfig, DataConfig, FineTuningConfig, LoopConfig
from ..data.checking.report import FEW, Report, Suggestion
from ..errors import few, plural
from ..utils.files import SHIPPED_CHECKPOINTS
from ..utils.libraries import install_command
from ..utils.words import missing_words
from .fine_tune.defaults import fitted, held_out_share
from .loop.distributed import compute_dtype, matrix_product_rate, process_state

_FROM_SCRATCH = 3000  # images: about as many as the shipped checkpoints were trained from scratch on
_FINE_TUNE = 10_000  # images from which a fine-tune is no shorter way

# Training from scratch: as many epochs as the shipped checkpoint, of more images fewer by the square root of their
# number, so that both the steps and the images per epoch grow.
_EPOCHS, _EPOCHS_OF = 70, 3200
_LEAST_STEPS = 2000
_AUTOENCODER_STEPS = (3000, 20_000)  # at least and at most; between them one epoch

_REACHED = 0.9  # share of the images that have to be large enough
_MUCH_LOST = 0.1  # share of an image that a square cuts off, on average, from which buckets pay
_PRETRAINED_FROM = 256  # pixels
_PRETRAINED = "stabilityai/sd-vae-ft-mse"

# The time of a step: at this share of the speed of large matrix products, and on a GPU no less than the time in which
# the CPU starts its kernels.
_UTILISATION, _GPU_UTILISATION = 0.2, 0.4
_LEAST_SECONDS = 0.03
_PRIOR_EVALUATIONS = 20  # of the network, for one sample that a checkpoint generates: as many steps


@dataclass(frozen=True)
class _Preset:
    """The resolutions that a ``--preset`` fits, and the cost of its networks.

    Attributes:
        sides: resolutions in pixels.
        place: where it runs.
        side: the resolution of these figures, which grow with the square of it.
        gflops: 10^9 operations, forward and backward, of one captioned sample.
        autoencoder_gflops: the same of one image in the autoencoder's training; 0: that is given.
    """

    sides: range
    place: str
    side: int
    gflops: float
    autoencoder_gflops: float


_FITS = {
    "tiny": _Preset(range(64), ", also on a CPU", 32, 0.5, 0.6),
    "small": _Preset(range(64, 256), ", also on a CPU", 64, 3.0, 6.0),
    "base": _Preset(range(256, 257), " on a GPU", 256, 139.0, 0.0),
}


@dataclass(frozen=True)
class _Checkpoint:
    """The shipped checkpoint that is fine-tuned. It draws from captions: classes are captioned by their names, and
    images without either by the empty caption.

    Attributes:
        name: of its folder.
        knows: what it does, for people.
        side: of its images, in pixels.
        gflops: 10^9 operations, forward and backward, of one sample in its training.
    """

    name: str
    knows: str
    side: int
    gflops: float


_CHECKPOINT = _Checkpoint("pictograms-128", "draws pictograms from captions", 128, 7.8)


@dataclass(frozen=True)
class Machine:
    """The device that trains, as torch names its type ("cpu", "cuda", ...), and its operations per second in large
    matrix products."""

    device: str
    flops_per_second: float

    @classmethod
    def this(cls) -> Machine:
        """Measure the device that a training here would use."""
        device: torch.device = process_state().device
        return cls(device.type, matrix_product_rate(device, compute_dtype("auto", device), least=0.4))

    def seconds(self, steps: float, flops: float) -> float:
        """Return the time of so many steps of ``flops`` operations each."""
        if self.device == "cpu":
            return steps * flops / (self.flops_per_second * _UTILISATION)
        return steps * max(_LEAST_SECONDS, flops / (self.flops_per_second * _GPU_UTILISATION))

    def __str__(self) -> str:
        return "this CPU" if self.device == "cpu" else "this GPU"


def suggest(
    report: Report, machine: Machine, flags: tuple[str, ...] = (), captions: Sequence[str] = ()
) -> list[Suggestion]:
    """Suggest first trainings, the best one first; none where the data cannot be used, or are latents already.

    Below 1,000 images a shipped checkpoint is fine-tuned, as a whole or by an adapter. From 3,000 on, as many as the
    shipped checkpoints had, a training from scratch comes first.

    Args:
        report: of the data.
        machine: where they would run.
        flags: those of the check that a training needs as well, such as ("--masks", "alpha").
        captions: of the data, or the names of its classes; their words that the shipped checkpoint does not know are
            named.
    """
    if report.problems or not report.sizes:
        return []
    fine_tunes = list(_fine_tunes(report, machine, flags, captions))
    if report.images < FEW and fine_tunes:
        return fine_tunes
    scratch = [_from_scratch(report, machine, flags)]
    whole = fine_tunes[:1] if report.images < _FINE_TUNE else []
    return [*scratch, *whole] if report.images >= _FROM_SCRATCH else [*whole, *scratch]


# ---------------------------------------------------------------- fine-tuning


def _fine_tunes(
    report: Report, machine: Machine, flags: tuple[str, ...], captions: Sequence[str]
) -> Iterator[Suggestion]:
    """Yield a fine-tune of the shipped checkpoint, then the same by an adapter."""
    checkpoint = _CHECKPOINT
    if not (SHIPPED_CHECKPOINTS / checkpoint.name / "model_index.json").is_file():
        return
    place = f"{SHIPPED_CHECKPOINTS.name}/{checkpoint.name}"  # a name that `train` knows everywhere
    reasons = {
        "--init-from": f"{checkpoint.name} {checkpoint.knows} at {checkpoint.side} px; your images are resized to that",
        "steps": "",  # these come here
        "new words": "",
        "time": "",
    }
    if report.condition == "unconditional":
        reasons["prompt"] = 'your images have no captions: draw from the result with an empty prompt, ""'
    if report.condition == "class":
        reasons["--condition text"] = f"{checkpoint.name} takes no classes: their names are the captions"
        flags = ("--condition", "text", *_without(flags, "--condition"))
    if report.images < FEW:
        reasons["not from scratch"] = (
            f"that needs about {_FROM_SCRATCH:,} images; of {report.images} a new network would learn copies"
        )
    names = [name.replace("_", " ") for name in report.classes]
    if words := _new_words(captions if report.condition == "text" else names, checkpoint):
        reasons["new words"] = words
    else:
        del reasons["new words"]
    start, output = ["latentflow", "train", report.data, "--init-from", place], f"runs/{_name(report.data)}"
    steps_line, seconds = _fine_tune_cost(report.images, checkpoint, machine, adapter=False)
    yield Suggestion(
        f"fine-tune the shipped checkpoint {checkpoint.name}",
        shlex.join([*start, "-o", output, *flags]),
        reasons | {"steps": steps_line, "time": _duration(seconds, machine)},
    )
    steps_line, seconds = _fine_tune_cost(report.images, checkpoint, machine, adapter=True)
    adapter = "only small factors beside the weights are trained: a file of 2 to 3 MB"
    if importlib.util.find_spec("peft") is None:
        adapter += f"; needs {install_command('peft')}"
    yield Suggestion(
        f"or train an adapter (LoRA) for {checkpoint.name}",
        shlex.join([*start, "--lora-rank", "16", "-o", f"{output}-lora", *flags]),
        {"--lora-rank 16": adapter, "steps": steps_line, "time": _duration(seconds, machine)},
    )


def _without(flags: tuple[str, ...], flag: str) -> tuple[str, ...]:
    """Return the flags without one that has a value."""
    if flag not in flags:
        return flags
    place = flags.index(flag)
    return (*flags[:place], *flags[place + 2 :])


def _new_words(captions: Sequence[str], checkpoint: _Checkpoint) -> str:
    """Return a line on the words of ``captions`` that the checkpoint does not know, "" if there is none."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(
        str(SHIPPED_CHECKPOINTS / checkpoint.name / "tokenizer" / "tokenizer.json")
    )
    words = missing_words(tokenizer, captions)
    if not words:
        return ""
    known = sum(not missing_words(tokenizer, [text]) for text in captions)
    return (
        f"{checkpoint.name} knows all words of {known} of your {plural(len(captions), 'caption')}; it learns "
        f"{plural(len(words), 'word')} from your images alone, and the more images have a word, the better: "
        + few([f"'{word}'" for word in words])
    )


def _fine_tune_cost(
    images: int, checkpoint: _Checkpoint, machine: Machine, adapter: bool
) -> tuple[str, float]:
    """Return a line on the steps that `latentflow train` will choose, and the seconds that they take."""
    held_out = held_out_share((), DataConfig.validation, images)
    training = images - (max(1, round(held_out * images)) if held_out and images > 1 else 0)
    prior = FineTuningConfig().samples(training, 0)
    own_share = 1 - FineTuningConfig.prior_share if prior else 1.0
    loop = fitted(LoopConfig(), (), training, own_share, adapter)
    steps, batch = loop.max_train_steps, loop.train_batch_size
    uses = steps * batch * own_share / training
    line = f"{steps:,} of {batch} samples, chosen for {plural(training, 'training image')}, each used {uses:.0f} times"
    if prior:
        line += f"; {1 - own_share:.0%} of the samples are generated by the checkpoint, against forgetting"
    flops = checkpoint.gflops * 1e9
    # Of a forward and backward pass, the forward pass is a third.
    generation = machine.seconds(1, prior * _PRIOR_EVALUATIONS * flops / 3)
    return line, machine.seconds(steps, batch * flops) + generation


# ---------------------------------------------------------------- from scratch


def _from_scratch(report: Report, machine: Machine, flags: tuple[str, ...]) -> Suggestion:
    """Suggest a training of new networks, and of an autoencoder before them below 256 px."""
    resolution, why = _resolution(report, machine.device != "cpu")
    preset, fit = next((name, fit) for name, fit in _FITS.items() if resolution in fit.sides)
    reasons = {f"--preset {preset}": f"fits {resolution} px{fit.place}", f"--resolution {resolution}": why}
    if (lost := 1 - report.kept_by_square_crop) > _MUCH_LOST:
        what = f"a square would cut off {lost:.0%} of an image on average"
        reasons["--buckets"] = f"{what}; this trains each at its own aspect ratio"
    steps, batch = scratch_steps(report.images, preset), PRESETS[preset]["train_batch_size"]
    larger = (resolution / fit.side) ** 2
    seconds = machine.seconds(steps, batch * fit.gflops * larger * 1e9)
    if resolution >= _PRETRAINED_FROM:
        what = "at this size a pretrained autoencoder saves days"
        reasons[f"--vae {_PRETRAINED}"] = f"{what}; it is downloaded once, a folder of yours will do too"
    else:
        what = "below 256 px pretrained autoencoders lose detail"
        reasons["no --vae"] = f"{what}; one is trained on your images first"
        least, most = _AUTOENCODER_STEPS
        size = AutoencoderConfig.autoencoder_batch_size
        first = min(most, max(least, _hundreds(report.images / size)))
        reasons[f"--autoencoder-steps {first}"] = (
            f"{_epochs(first * size / report.images)} of {report.images:,} images in batches of {size}"
        )
        seconds += machine.seconds(first, size * fit.autoencoder_gflops * larger * 1e9)
    reasons[f"--max-train-steps {steps}"] = (
        f"{_epochs(steps * batch / report.images)} of {report.images:,} images in batches of {batch}; if val_loss "
        "still falls at the end, go on with a larger number"
    )
    if report.masks:
        reasons["masks"] = f"inpainting is trained as well: {plural(report.masks, 'image')} with a mask"
    reasons["time"] = _duration(seconds, machine)
    chosen = [word for choice in reasons if choice.startswith("--") for word in choice.split()]
    start = ["latentflow", "train", report.data, "-o", f"runs/{_name(report.data)}-scratch"]
    return Suggestion("train from scratch", shlex.join([*start, *chosen, *flags]), reasons)


def scratch_steps(images: int, preset: str) -> int:
    """Return the steps of a first training from scratch: 70 epochs up to 3,200 images, of more fewer by the square
    root of their number (18 of 50,000); at least 2,000 steps, and of base at most its own number."""
    epochs = _EPOCHS * math.sqrt(min(1.0, _EPOCHS_OF / images))
    steps = max(_LEAST_STEPS, _hundreds(epochs * images / PRESETS[preset]["train_batch_size"]))
    most: int = PRESETS["base"]["max_train_steps"]
    return min(steps, most)


def _resolution(report: Report, gpu: bool) -> tuple[int, str]:
    """Return the resolution, and the reason for it."""
    large = [int(side) for side, count in report.reach.items() if count >= _REACHED * report.images]
    limit = 256 if gpu else 64
    resolution = min(max(large, default=32), limit)
    share = report.reach[str(resolution)] / report.images
    if not share:
        return resolution, "all images are smaller and are enlarged"
    why = f"{share:.0%} of the images are at least that large"
    if not large:
        why += "; the others are enlarged"
    elif max(large) > limit:
        why += f"; most reach {max(large)} px, but " + (
            "each doubling costs at least 4 times the work" if gpu else "without a GPU more takes days"
        )
    return resolution, why


# ---------------------------------------------------------------- words


def _name(data: str) -> str:
    """Return a short name for the run: the folder's, or the one above where that is only a part (train)."""
    path = Path(data.split(":")[-1])
    path = path.resolve() if path.stem in ("", "..") else path
    stem = path.parent.name if path.stem in ("train", "training") and path.parent.name else path.stem
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in stem).strip("-") or "first"


def _hundreds(number: float) -> int:
    return 100 * math.ceil(number / 100)


def _epochs(number: float) -> str:
    return f"{number:.0f} epochs" if number >= 9.5 else f"{number:.1f} epochs"


def _duration(seconds: float, machine: Machine) -> str:
    """Return a time in minutes, hours or days; it is known within a factor of two or so."""
    for size, unit in ((86_400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 1.5 * size or unit == "minute":
            break
    return f"about {plural(max(1, round(seconds / size)), unit)} on {machine} (add --dry-run to have it measured)"
