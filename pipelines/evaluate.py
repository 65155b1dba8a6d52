"""Measure a checkpoint: reconstruction, validation loss, Frechet distance, retrieval, memorisation.

    latentflow evaluate runs/cats/pipeline cats -o report.json
    latentflow evaluate checkpoints/emoji-64 emoji/train --test emoji/test -o report.json \\
        --attributes "light skin tone" "medium skin tone" "dark skin tone"

Images are drawn of the captions or classes of real training images, in the data's own proportions. Writes a JSON report
and, beside it under the same name, a PNG with generated images. Nothing is downloaded, except for --fid and --clip.
docs/evaluation.md says what each figure means.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from scipy.stats import binomtest
from torch import Tensor
from torchvision.utils import save_image
from tqdm.auto import tqdm

import latentflow
from latentflow import metrics
from latentflow.autoencoder import decode, encode
from latentflow.cli import parse, run
from latentflow.data import Source, cached_pixels, find_source, fingerprint, pixels_to_images, readable, split
from latentflow.data.config import DataConfig
from latentflow.data.sources import shapes as shapes_data
from latentflow.data.sources.latent_folder import is_latent_folder
from latentflow.errors import UserError, printable
from latentflow.flow import SOLVERS, CondOT, flow_matching_loss
from latentflow.inference.checkpoint import AdapterChoice, open_pipeline
from latentflow.inference.images import check_writable, whole_file
from latentflow.metrics import learned
from latentflow.models.text import UnknownWords
from latentflow.pipeline.conditioning import unknown_words_text
from latentflow.training import LoopConfig
from latentflow.training.loop.data_order import seeded
from latentflow.utils.arguments import finite, whole
from latentflow.utils.documents import read_yaml
from latentflow.utils.memory import memory_phase

RETRIEVAL_SPACE = "pixels-32"
FRECHET_SPACE = "pixels-16"
VALIDATION_TIMES = tuple((i + 0.5) / 8 for i in range(8))
FEW = 50  # images; the covariance of fewer says little
MOST = 1_000_000  # images; they are held in memory
MOST_NAMED = 1000  # classes or captions whose proportions are reported, of which the terminal shows 30
LARGEST_SEED = 2**63 - 1
# Streams of random numbers, none of which training uses; see `seeded`.
DRAWN, HELD_OUT_CAPTIONS, VALIDATION = 8, 9, 10


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(AdapterChoice):
    """Settings of a measurement: the checkpoint, the data, and how images are drawn."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Pipeline folder, run folder, such as runs/cats, or hub id."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """The images that it was trained on: a folder, or "shapes"."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "report.json"
    """The report."""
    overwrite: bool = False
    """Replace a report that exists."""

    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 200
    """Images to draw, of the captions or classes of as many training images (again from the first where they are
    fewer). Below 50 most figures say little."""
    steps: int | None = None
    """Steps from noise to data; default: 20, or 4 of a few-step checkpoint."""
    guidance: float | None = None
    """Guidance scale; 1 is off. Default: 4, unless the checkpoint has learned its guidance along."""
    solver: Literal[tuple(SOLVERS)] | None = None  # type: ignore[valid-type]
    """Solver of the flow; default: heun, or none of a few-step checkpoint, which leaps from time to time."""
    seed: int = 0
    """Decides the captions, the noise, and which real images are compared with which."""
    batch_size: int = 50
    """Images drawn or encoded at once."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ..."""

    validation: float | None = None
    """Share of DATA that the run held out. This and the next seven are read from the run's config.yaml where
    CHECKPOINT lies in a run folder; else they are what `latentflow train` takes by default."""
    validation_seed: int | None = None
    """Seed of that run."""
    condition: Literal["auto", "none", "class", "text"] | None = None
    """What DATA's images are conditioned on."""
    missing_caption: Literal["error", "empty", "skip"] | None = None
    """What becomes of images without a caption."""
    masks: Literal["auto", "none", "alpha"] | None = None
    """Where your own masks come from; alpha shows the images without their transparency."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of tables (of --test as well) that are called otherwise, as for `latentflow train`."""
    colours: Literal["srgb", "stored"] | None = None
    """Convert images (of --test as well) to sRGB by their colour profiles, or not, as for `latentflow train`."""
    background: str | None = None
    """Colour behind transparent images."""
    test: str | None = None
    """One more folder that was not trained on, whose reconstruction and loss are reported as well."""

    attributes: tuple[str, ...] = ()
    """Words that tell captions apart, such as "light skin tone" "dark skin tone": every caption of --test
    (without it: held out) with such words is drawn, and must be nearest to the real one with the same."""
    fid: bool = False
    """Also FID in Inception's feature space (extra `metrics`; downloads weights)."""
    clip: str | None = None
    """Also the CLIP score under this hub id or folder, such as openai/clip-vit-base-patch16."""

    def __post_init__(self) -> None:
        fix = f"Draw at least 2, to fit a distribution, and at most {MOST:,}; default: 200."
        whole("-n", self.n, 2, MOST, fix=fix)
        for flag, value, least, most in (
            ("--steps", self.steps, 1, None),
            ("--batch-size", self.batch_size, 1, None),
            ("--seed", self.seed, 0, LARGEST_SEED),
            ("--validation-seed", self.validation_seed, 0, LARGEST_SEED),
        ):
            if value is not None:
                whole(flag, value, least, most)
        for flag, number in (("--guidance", self.guidance), ("--validation", self.validation)):
            if number is not None:
                finite(flag, number)
        if self.attributes and len(set(self.attributes)) < max(2, len(self.attributes)):
            raise UserError("--attributes tell captions apart", "Give at least two, all different.")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Images (N, 3, H, W) in [-1, 1], with a caption or class name each ("" without any).

    Attributes:
        trained_on: how many of a part that should not be are in DATA too.
    """

    images: Tensor
    captions: list[str]
    trained_on: int = 0


def main(argv: Sequence[str] | None = None) -> None:
    config = as_trained(parse(EvaluateConfig, argv, prog="latentflow evaluate", description=__doc__ or ""))
    output = checked_output(config)
    fid = learned.open_fid() if config.fid else None
    clip = learned.open_clip(config.clip) if config.clip is not None else None
    started = time.monotonic()

    # ---------------------------------------------------------------- the checkpoint and the images
    pipe = open_pipeline("LatentFlowPipeline", config.checkpoint, config.device, config)
    pipe.set_progress_bar_config(disable=True)
    config = as_drawn(config, pipe)
    source = found(config.data, config)
    asks = asked_with(pipe, source)
    train, unseen = read_parts(pipe, source, config)
    print(f"{len(train.images)} training images; not trained on: {numbers_of(unseen)}")

    # Drawn of what real images show, so in the data's own proportions. The first of these real images stand for what a
    # perfect generator would draw; the reference of both is all others.
    order = metrics.in_proportion(train.captions, config.seed)
    asked = [train.captions[order[i % len(order)]] for i in range(config.n)]
    real = metrics.real_split(order, config.n)
    notes = remarks(pipe, source, config, asks, real, unseen)
    if asks == "prompt" and (words := pipe.unknown_words(sorted(set(asked)))):
        notes.append(unknown_words_text(words))
    warnings.simplefilter("ignore", UnknownWords)  # each batch would say it again
    counterparts = attributes_of(train, unseen, asks, config) if config.attributes else None
    if clip is not None and not any(asked):
        raise UserError("--clip compares images with captions, and DATA has none", "Leave --clip out.")

    # ---------------------------------------------------------------- without drawing: what the networks know
    report: dict[str, Any] = {
        "data": told(source, train, unseen),
        "asked": proportions(asked, train.captions, asks),
    }
    for name, part in unseen.items():
        report.setdefault("reconstruction", {})[name] = reconstruction(pipe, part, config.batch_size)
        report.setdefault("validation_loss", {})[name] = validation_loss(pipe, part, asks, config)

    # ---------------------------------------------------------------- by drawing
    size = train.images.shape[2:]
    generated = draw(pipe, asked, asks, size, config, DRAWN, "training captions")
    report["frechet_distance"] = frechet(generated, train, real)
    if asks != "nothing" and any(asked):
        report["caption_retrieval"] = caption_retrieval(generated, asked, train, unseen)
    report["memorisation"] = memorised(generated, train, unseen)
    if config.data == "shapes" and asks == "prompt":
        report["shapes"] = shapes_right(pipe, generated, asked, train, real, asks, config)
    if counterparts is not None:
        report["attributes"] = attributes_right(pipe, counterparts, size, asks, config)
    if fid is not None:
        report["fid"] = inception(fid, generated, train, real, config.batch_size)
    if clip is not None:
        report["clip_score"] = clip_scores(clip, generated, asked, train, real, config.batch_size)

    # ---------------------------------------------------------------- the report
    report["notes"] = notes
    report["seconds"] = round(time.monotonic() - started, 1)
    print(printable("\n".join([*lines(report), *(f"note: {note}" for note in notes)])))
    repeat = {"settings": dataclasses.asdict(config), "versions": versions(), "checkpoint": weights(pipe)}
    write(output, strict({**repeat, **report}), generated[:64])
    print(f"Wrote {output} and {output.with_suffix('.png')}")


# ---------------------------------------------------------------------------------------------------- input


def checked_output(config: EvaluateConfig) -> Path:
    """Refuse an output that cannot be written, before anything is computed."""
    output = Path(config.output)
    if output.suffix != ".json":
        raise UserError(
            f"the report is JSON, '{output}' is not", f"Did you mean -o {output.with_suffix('.json')}?"
        )
    for file in (output, output.with_suffix(".png")):
        if file.is_dir():
            raise UserError(f"{file} is a folder", "Choose another -o.")
        if file.exists() and not config.overwrite:
            raise UserError(f"{file} exists", "Choose another -o, or replace it with --overwrite.")
    check_writable(config.output)
    return output


def as_trained(config: EvaluateConfig) -> EvaluateConfig:
    """Take what is not given from the run that the checkpoint lies in, or from the defaults.

    Raises:
        UserError: the run's config.yaml cannot be read, or holds what such a setting cannot be.
    """
    folder = Path(config.checkpoint)
    file = (folder if (folder / "pipeline").is_dir() else folder.parent) / "config.yaml"
    fix = "Mend it, or move it away and give --validation and the like as the run had them."
    read = read_yaml(file, fix) if file.is_file() else {}
    run_values = read if isinstance(read, dict) else {}
    names = ("validation", "condition", "missing_caption", "masks", "background", "columns", "colours")
    values = {name: run_values.get(name, getattr(DataConfig, name, {})) for name in names}
    if run_values and "colours" not in run_values and not is_latent_folder(config.data):
        values["colours"] = "stored"  # a run from before colour profiles were converted
    values["validation_seed"] = run_values.get("seed", LoopConfig.seed)
    kinds = {"validation": (int, float), "validation_seed": (int,), "columns": (dict,)}
    for name, value in values.items():
        if not isinstance(value, kinds.get(name, (str,))):
            raise UserError(
                f"{file}: {'seed' if name == 'validation_seed' else name} is {value!r}",
                f"Mend it, or give --{name.replace('_', '-')}.",
            )
    return dataclasses.replace(
        config, **{name: value for name, value in values.items() if getattr(config, name) in (None, {})}
    )


def as_drawn(config: EvaluateConfig, pipe: Any) -> EvaluateConfig:
    """Fill what is not given of how to draw with what suits the checkpoint."""
    solver = config.solver or (None if pipe.few_steps else "heun")
    return dataclasses.replace(
        config,
        steps=config.steps or (20 if solver else pipe.usual_steps),
        guidance=pipe.usual_guidance if config.guidance is None else config.guidance,
        solver=solver,
    )


def found(data: str, config: EvaluateConfig) -> Source:
    assert config.condition and config.missing_caption and config.masks and config.colours
    names = ("condition", "missing_caption", "masks", "columns", "colours")
    wanted: dict[str, Any] = {name: getattr(config, name) for name in names}
    return readable(find_source(data, **wanted))


Asks = Literal["prompt", "class_labels", "nothing"]


def asked_with(pipe: Any, source: Source) -> Asks:
    """Return how the checkpoint is told what DATA's images show.

    Raises:
        UserError: DATA has classes that the checkpoint does not know by name, or captions or nothing where it takes
            classes.
    """
    if source.kind == "class" and pipe.takes_classes:
        present = {example.label or "" for example in source.examples}
        pipe.get_label_ids([name for name in source.classes if name in present])
        return "class_labels"
    if pipe.takes_text:
        return "prompt"
    if pipe.takes_classes:
        what = "captions" if source.kind == "text" else "no classes"
        raise UserError(
            f"the checkpoint takes classes ({', '.join(pipe.labels)}), and {source.name} has {what}",
            "Give the images that it was trained on, or say where its classes are: --condition class.",
        )
    return "nothing"


def read_parts(pipe: Any, source: Source, config: EvaluateConfig) -> tuple[Part, dict[str, Part]]:
    """Return the training part, and what was not trained on: "held_out", "test", at the checkpoint's resolution."""
    assert config.validation is not None and config.validation_seed is not None
    kept, out = split(source, config.validation, config.validation_seed)
    if not out and config.test is None:
        raise UserError(
            f"--validation {config.validation} holds no image out",
            "Some figures need images that were not trained on: raise it, or give --test FOLDER.",
        )
    test = None if config.test is None else found(config.test, config)
    if test is not None and asked_with(pipe, test) != asked_with(pipe, source):
        raise UserError(
            f"{config.data} is a set of kind '{source.kind}', and {config.test} one of kind '{test.kind}'",
            "Give a --test that is described as DATA is.",
        )
    train = read_part(pipe, source.subset(kept), config)
    if len(train.images.flatten(1).unique(dim=0)) < 2:
        raise UserError(
            f"{config.data} holds {len(kept)} training images, all of them equal",
            "Nothing can be compared with one image: give at least two different ones beside what is held out.",
        )
    unseen = {"held_out": read_part(pipe, source.subset(out), config)} if out else {}
    if test is not None:
        known = set(source.content_keys())
        trained_on = sum(key in known for key in test.content_keys())
        unseen["test"] = dataclasses.replace(read_part(pipe, test, config), trained_on=trained_on)
    return train, unseen


def read_part(pipe: Any, source: Source, config: EvaluateConfig) -> Part:
    side = pipe.transformer.config.sample_size
    size = (side, side) if isinstance(side, int) else tuple(side)
    height, width = (cells * pipe.vae_scale_factor for cells in size)
    pixels = cached_pixels(source, (height, width), config.background or "white")[:]
    captions = (
        [example.label or "" for example in source.examples] if source.kind == "class" else source.captions()
    )
    if source.kind == "unconditional":
        captions = [""] * len(source)
    return Part(images=pixels_to_images(pixels), captions=captions)


# ---------------------------------------------------------------------------------------------------- what is told


def numbers_of(parts: dict[str, Part]) -> str:
    return ", ".join(f"{len(part.images)} ({name})" for name, part in parts.items())


def remarks(
    pipe: Any,
    source: Source,
    config: EvaluateConfig,
    asks: Asks,
    real: metrics.RealSplit,
    unseen: dict[str, Part],
) -> list[str]:
    """Return what was inferred, and what makes figures of this report say less than they seem to, a line each."""
    notes = list(source.notes)
    if "test" in unseen and unseen["test"].trained_on:
        test = unseen["test"]
        notes.append(f"{test.trained_on} of the {len(test.images)} images of --test are in DATA too")
    beside = len(real.beside)
    if beside < config.n:
        notes.append(
            f"DATA is small: the Frechet distance is of {beside} of the {config.n} generated images, beside as many "
            f"real ones, to the {len(real.reference)} others"
        )
    if beside < FEW:
        notes.append(f"a Frechet distance of {beside} images says little: at least {FEW} should be compared")
    if any(example.repeats != 1 or example.weight != 1 for example in source.examples):
        notes.append(
            "DATA has repeats or weights, with which it is trained on: every figure counts each image once"
        )
    if asks == "nothing" and source.kind != "unconditional":
        notes.append("the checkpoint takes no condition: images are drawn of nothing in particular")
    if asks == "prompt" and source.kind != "text":
        with_what = "the classes' names as captions" if source.kind == "class" else "the empty caption"
        notes.append(f"the checkpoint takes captions, and DATA has none: it is asked with {with_what}")
    if absent := sorted(set(pipe.labels) - set(source.classes)) if asks == "class_labels" else []:
        notes.append(
            f"classes of the checkpoint that DATA has not, and that are not drawn: {', '.join(absent)}"
        )
    return notes


def told(source: Source, train: Part, unseen: dict[str, Part]) -> dict[str, Any]:
    images = {"training": len(train.images), **{name: len(part.images) for name, part in unseen.items()}}
    return {"name": source.name, "kind": source.kind, "images": images, "fingerprint": source.fingerprint()}


def proportions(asked: list[str], captions: list[str], asks: Asks) -> dict[str, Any]:
    """Return what was asked how often, beside the share of it in the training part; of captions, how many there are."""
    drawn, real = Counter(asked), Counter(captions)
    counts = {"n": len(asked), "different": len(drawn), "in_training": len(real)}
    if not 1 < len(real) <= MOST_NAMED:
        return {"with": asks, **counts}
    shares = {
        name: {"asked": drawn[name] / len(asked), "training": count / len(captions)}
        for name, count in sorted(real.items())
    }
    return {"with": asks, **counts, "proportions": shares}


def versions() -> dict[str, str]:
    libraries = ("torch", "torchvision", "diffusers", "transformers", "torchmetrics", "numpy", "pillow")
    return {
        "latentflow": latentflow.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: importlib.metadata.version(name) for name in libraries},
    }


def weights(pipe: Any) -> dict[str, str]:
    """Return a hash of every network's config and weights, adapters merged."""
    networks = {name: getattr(pipe, name, None) for name in ("transformer", "vae", "text_encoder")}
    return {name: fingerprint(network) for name, network in networks.items() if network is not None}


# ---------------------------------------------------------------------------------------------------- drawing


def conditions(asks: Asks, captions: list[str]) -> dict[str, Any]:
    """Return the captions as the pipeline's arguments."""
    return {"num_images_per_prompt": len(captions)} if asks == "nothing" else {asks: captions}


def draw(
    pipe: Any,
    captions: list[str],
    asks: Asks,
    size: Sequence[int],
    config: EvaluateConfig,
    stream: int,
    what: str,
) -> Tensor:
    """Draw one image for each caption, (N, 3, H, W) in [-1, 1]. Image i depends on the seed, the stream and i only.

    Raises:
        UserError: an image holds values that are not finite.
    """
    height, width = size
    batches = []
    for start in tqdm(range(0, len(captions), config.batch_size), desc=f"drawing {what}"):
        batch = captions[start : start + config.batch_size]
        generators = [seeded(config.seed, stream, start + i) for i in range(len(batch))]
        with memory_phase("draw"):
            images = pipe(
                **conditions(asks, batch),
                height=height,
                width=width,
                num_inference_steps=config.steps,
                guidance_scale=config.guidance,
                solver=config.solver,
                generator=generators,
                output_type="pt",
            ).images
        metrics.refuse_not_finite(images, f"generated images (those from number {start} on)")
        # In 256 levels, as files and the real images are: else they would be nearer to these than real ones can be.
        batches.append(pixels_to_images((images.float().cpu().clamp(0, 1) * 255).round()))
    return torch.cat(batches)


# ---------------------------------------------------------------------------------------------------- figures


def share(count: int, n: int) -> dict[str, Any]:
    """Return a share with its numbers and its 95 % interval (Wilson)."""
    interval = binomtest(count, n).proportion_ci(method="wilson")
    return {"share": count / n, "count": count, "n": n, "interval_95": [interval.low, interval.high]}


@torch.no_grad()
def reconstruction(pipe: Any, part: Part, batch_size: int) -> dict[str, Any]:
    """PSNR and SSIM of images that were not trained on, through the autoencoder, without noise."""
    psnr, ssim = [], []
    large = min(part.images.shape[2:]) >= metrics.SSIM_SIDE
    for images in tqdm(part.images.split(batch_size), desc="reconstructing"):
        copies = decode(pipe.vae, encode(pipe.vae, images)).cpu()
        metrics.refuse_not_finite(copies, "reconstructions")
        psnr.append(metrics.psnr(copies, images))
        if large:
            ssim.append(metrics.ssim(copies, images))
    decibels = torch.cat(psnr)
    exact = int(decibels.isinf().sum())
    report: dict[str, Any] = {"images": len(part.images), "exact_copies": exact}
    if exact < len(decibels):  # the PSNR of an exact copy is infinite, and so would the mean be
        report["psnr"] = float(decibels[decibels.isfinite()].mean())
    else:
        report |= unknown("psnr", "every image is reproduced exactly")
    if large:
        report["ssim"] = float(torch.cat(ssim).mean())
    else:
        report |= unknown("ssim", f"images of fewer than {metrics.SSIM_SIDE} pixels a side have none")
    return report


def unknown(name: str, why: str) -> dict[str, Any]:
    """Return a figure that there is none of."""
    return {name: None, f"{name}_reason": why}


@torch.no_grad()
def validation_loss(pipe: Any, part: Part, asks: Asks, config: EvaluateConfig) -> dict[str, Any]:
    """Flow-matching loss on images that were not trained on, each with its own fixed noise, averaged over fixed times.

    The velocity's, on the straight path, whatever path and prediction the network was trained with.
    """
    path, losses = CondOT(), []
    for start in tqdm(range(0, len(part.images), config.batch_size), desc="validating"):
        rows = slice(start, start + config.batch_size)
        x1 = encode(pipe.vae, part.images[rows])
        noise = [seeded(config.seed, VALIDATION, start + i) for i in range(len(x1))]
        x0 = torch.stack([torch.randn(x1.shape[1:], generator=g) for g in noise]).to(x1)
        velocity = pipe.model.velocity(condition(pipe.model, part.captions[rows], asks), 1.0)
        of_times = []
        for t in VALIDATION_TIMES:
            sample = path.sample(x0, x1, torch.full((len(x1),), t, device=x1.device))
            of_times.append(flow_matching_loss(velocity(sample.xt, sample.t), sample).cpu())
        losses.append(torch.stack(of_times).mean(0))
    of_images = torch.cat(losses).double()
    metrics.refuse_not_finite(of_images[:, None], "images' validation losses")
    n = len(of_images)
    error = (
        {"standard_error": float(of_images.std() / n**0.5)}
        if n > 1
        else unknown("standard_error", "one image")
    )
    return {"value": float(of_images.mean()), **error, "images": n, "times": VALIDATION_TIMES}


def condition(model: Any, captions: list[str], asks: Asks) -> Any:
    """Return the captions as conditions of a flow model."""
    if asks == "prompt":
        return model.encode_prompt(captions)
    return model.encode_class(captions) if asks == "class_labels" else model.null(len(captions))


def frechet(generated: Tensor, train: Part, real: metrics.RealSplit) -> dict[str, Any]:
    """Frechet distance of generated images to the reference; and the floor: that of as many real ones to the same."""
    n = len(real.beside)
    if n < 2:
        return unknown(
            "value", f"{len(train.images)} training images cannot be split in two with a covariance each"
        )
    data = metrics.features(train.images, FRECHET_SPACE)
    reference = data[real.reference]
    return {
        "value": metrics.frechet_distance(metrics.features(generated[:n], FRECHET_SPACE), reference),
        "floor": metrics.frechet_distance(data[real.beside], reference),
        "generated": n,
        "real": n,
        "reference": len(reference),
        "features": FRECHET_SPACE,
    }


def caption_retrieval(
    generated: Tensor, asked: list[str], train: Part, unseen: dict[str, Part]
) -> dict[str, Any]:
    """Share of images whose caption is among those of the k nearest training images; of real images beside them."""

    def figures(images: Tensor, captions: list[str]) -> dict[str, Any]:
        rows = [row for row, caption in enumerate(captions) if caption in known]
        found = metrics.retrieve(
            images[rows], [captions[row] for row in rows], train.images, train.captions, space=RETRIEVAL_SPACE
        )
        return {
            f"top_{k}": {**share(hits, found.n), "chance": found.chance[k]} for k, hits in found.hits.items()
        }

    known = set(train.captions) - {""}
    comparable = {name: part for name, part in unseen.items() if known & set(part.captions)}
    return {
        **figures(generated, asked),
        **{f"real_{name}": figures(part.images, part.captions) for name, part in comparable.items()},
        "features": RETRIEVAL_SPACE,
    }


def memorised(generated: Tensor, train: Part, unseen: dict[str, Part]) -> dict[str, Any]:
    """Distances to the nearest training image, beside those of real images that are new."""
    held_out = unseen["held_out"].images if "held_out" in unseen else None
    found = metrics.memorisation(generated, train.images, held_out, space=RETRIEVAL_SPACE)
    return {
        "ratio": found.ratio,
        "copies": {**share(found.copied, found.drawn), "expected": found.expected, "usual": found.usual},
        "generated": found.generated,
        "real": found.real,
        "compared": found.compared,
        "new": found.new,
        "features": RETRIEVAL_SPACE,
    }


def shapes_right(
    pipe: Any,
    generated: Tensor,
    asked: list[str],
    train: Part,
    real: metrics.RealSplit,
    asks: Asks,
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Share of images that the exact checker of the procedural set finds right; of real training images beside them."""
    different = sorted(shapes_data.held_out_captions())
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(config.seed)).tolist()
    new = [different[order[i % len(order)]] for i in range(config.n)]
    drawn = draw(pipe, new, asks, generated.shape[2:], config, HELD_OUT_CAPTIONS, "held-out captions")

    def right(images: Tensor, captions: list[str]) -> dict[str, Any]:
        return share(sum(map(shapes_data.check, images, captions)), len(captions))

    return {
        "train": right(generated, asked),
        "held_out": right(drawn, new),
        "real": right(train.images[real.beside], [train.captions[row] for row in real.beside]),
    }


@dataclass(frozen=True, kw_only=True)
class Counterparts:
    """N captions that were not trained on, each beside K real images that differ from one another by an attribute.

    Attributes:
        candidates: (N, K, 3, H, W).
        own: which of K the caption says.
        equal: captions left out because two of their candidates are one image: nobody could tell which is meant.
    """

    captions: list[str]
    candidates: Tensor
    own: list[int]
    equal: int


def attributes_of(train: Part, unseen: dict[str, Part], asks: Asks, config: EvaluateConfig) -> Counterparts:
    """Return the captions of --attributes.

    Raises:
        UserError: there is none, or the checkpoint takes none.
    """
    part = unseen.get("test") or unseen["held_out"]
    images = torch.cat([train.images, part.images])
    groups = metrics.attribute_groups(part.captions, config.attributes, [*train.captions, *part.captions])
    apart = [group for group in groups if len(images[group[2]].flatten(1).unique(dim=0)) == len(group[2])]
    if not apart or asks == "nothing":
        raise UserError(
            f"no held-out caption has a counterpart for each of {', '.join(config.attributes)}, all different images",
            "Name all attributes as the captions spell them; --test FOLDER gives the captions.",
        )
    return Counterparts(
        captions=[part.captions[index] for index, _, _ in apart],
        candidates=torch.stack([images[rows] for _, _, rows in apart]),
        own=[own for _, own, _ in apart],
        equal=len(groups) - len(apart),
    )


def attributes_right(
    pipe: Any, asked: Counterparts, size: Sequence[int], asks: Asks, config: EvaluateConfig
) -> dict[str, Any]:
    """Share of held-out captions whose image is nearest to the real counterpart with that attribute."""
    drawn = draw(pipe, asked.captions, asks, size, config, HELD_OUT_CAPTIONS, "held-out captions")
    right = metrics.attribute_retrieval(drawn, asked.candidates, asked.own, space=RETRIEVAL_SPACE)
    n = len(asked.own)
    return {
        "right": share(round(right * n), n),
        "chance": 1 / len(config.attributes),
        "left_out_as_equal": asked.equal,
        "features": RETRIEVAL_SPACE,
    }


def inception(
    fid: Any, generated: Tensor, train: Part, real: metrics.RealSplit, batch_size: int
) -> dict[str, Any]:
    """FID of generated images, and its floor, of the images that `frechet` compares."""
    n = len(real.beside)
    if n < 2:
        return unknown(
            "value", f"{len(train.images)} training images cannot be split in two with a covariance each"
        )
    sets = [generated[:n], train.images[real.beside]]
    value, floor = learned.inception_fid(fid, sets, train.images[real.reference], batch_size=batch_size)
    return {"value": value, "floor": floor, "generated": n, "real": n, "reference": len(real.reference)}


def clip_scores(
    clip: Any, generated: Tensor, asked: list[str], train: Part, real: metrics.RealSplit, batch_size: int
) -> dict[str, Any]:
    """CLIP score of the images that were asked for with a caption, and of real images with theirs."""
    sets = {
        "value": (generated, asked),
        "real": (train.images[real.beside], [train.captions[row] for row in real.beside]),
    }
    report: dict[str, Any] = {}
    for name, (images, captions) in sets.items():
        rows = [row for row, caption in enumerate(captions) if caption]
        if not rows:
            report |= unknown(name, "no image has a caption")
            continue
        texts = [captions[row] for row in rows]
        report[name] = learned.clip_score(clip, images[rows], texts, batch_size=batch_size)
        report[f"{name}_images"] = len(rows)
    return report


# ---------------------------------------------------------------------------------------------------- output


def strict(value: Any) -> Any:
    """Return ``value`` as JSON can hold it: infinity and NaN become null, with the reason beside it."""
    if isinstance(value, dict):
        plain = {}
        for key, item in value.items():
            plain[key] = strict(item)
            if isinstance(item, float) and not math.isfinite(item):
                plain[f"{key}_reason"] = f"it came out as {item}"
        return plain
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(output: Path, report: dict[str, Any], shown: Tensor) -> None:
    """Write the report and the images beside it.

    Raises:
        RunError: a file cannot be written.
    """
    with whole_file(output) as partial:
        partial.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with whole_file(output.with_suffix(".png")) as partial:
        save_image((shown + 1) / 2, partial, nrow=math.ceil(len(shown) ** 0.5))


def lines(report: dict[str, Any], indent: str = "") -> list[str]:
    """Return the report for the terminal."""
    out: list[str] = []
    for name, value in report.items():
        if isinstance(value, dict) and "share" in value:
            low, high = value["interval_95"]
            beside = f", chance {value['chance']:.1%}" if "chance" in value else ""
            if "usual" in value:
                beside = ", without memorising {:.1%} to {:.1%}".format(*value["usual"])
            shown = f"{value['share']:.1%} ({value['count']} of {value['n']}; 95 %: {low:.1%} to {high:.1%}{beside})"
            out.append(f"{indent}{name:<28}{shown}")
        elif isinstance(value, dict) and value.keys() == {"asked", "training"}:
            out.append(
                f"{indent}{name:<28}{value['asked']:.1%} (of the training images {value['training']:.1%})"
            )
        elif isinstance(value, dict) and len(value) > 30:
            out.append(f"{indent}{name:<28}of {len(value)}: see the report")
        elif isinstance(value, dict):
            out += [f"{indent}{name}", *lines(value, indent + "  ")]
        elif not isinstance(value, list | tuple):
            out.append(f"{indent}{name:<28}{f'{value:.4g}' if isinstance(value, float) else value}")
    return out


if __name__ == "__main__":
    run(main)
