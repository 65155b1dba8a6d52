"""Measure a checkpoint: reconstruction, validation loss, Frechet distance, retrieval, memorisation.

    latentflow evaluate runs/cats/pipeline cats -o report.json
    latentflow evaluate checkpoints/emoji-64 emoji/train --test emoji/test -o report.json \\
        --attributes "light skin tone" "medium skin tone" "dark skin tone"

Writes a JSON report and, beside it under the same name, a PNG with generated pictures. Nothing is downloaded,
except for --fid and --clip.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
import yaml
from torch import Tensor
from torchvision.utils import save_image
from tqdm.auto import tqdm

from latentflow import LatentFlowPipeline, metrics
from latentflow.autoencoder import decode, encode
from latentflow.cli import parse, run
from latentflow.data import Source, cached_pixels, find_source, pixels_to_images, readable, split
from latentflow.data import shapes as shapes_data
from latentflow.data.config import DataConfig
from latentflow.drawing.adapters import AdapterChoice, add_adapters
from latentflow.drawing.files import check_writable, whole_file
from latentflow.errors import UserError
from latentflow.flow import SOLVERS, CondOT, flow_matching_loss
from latentflow.metrics import learned
from latentflow.training import LoopConfig

RETRIEVAL_SPACE = "pixels-32"
FRECHET_SPACE = "pixels-16"
VALIDATION_TIMES = tuple((i + 0.5) / 8 for i in range(8))


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(AdapterChoice):
    """What to measure, and how pictures are drawn."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Pipeline folder, such as runs/cats/pipeline, or hub id."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """The pictures that it was trained on: a folder, or "shapes"."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "report.json"
    """The report."""
    overwrite: bool = False
    """Replace a report that exists."""

    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 200
    """Pictures to draw, one for each of as many captions or classes of the training part."""
    steps: int | None = None
    """Steps from noise to data; default: 20, or 4 of a few-step checkpoint."""
    guidance: float | None = None
    """Guidance scale; 1 is off. Default: 4, unless the checkpoint has learned its guidance along."""
    solver: Literal[tuple(SOLVERS)] | None = None  # type: ignore[valid-type]
    """Solver of the flow; default: heun, or none of a few-step checkpoint, which leaps from time to time."""
    seed: int = 0
    """Decides the captions and the noise."""
    batch_size: int = 50
    """Pictures drawn or encoded at once."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ..."""

    validation: float | None = None
    """Share of DATA that the run held out. This and the next six are read from the run's config.yaml where
    CHECKPOINT lies in a run folder; else they are what `latentflow train` takes by default."""
    validation_seed: int | None = None
    """Seed of that run."""
    condition: Literal["auto", "none", "class", "text"] | None = None
    """What DATA's pictures are conditioned on."""
    missing_caption: Literal["error", "empty", "skip"] | None = None
    """What becomes of pictures without a caption."""
    masks: Literal["auto", "none", "alpha"] | None = None
    """Where your own masks come from; alpha shows the pictures without their transparency."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of tables (of --test as well) that are called otherwise, as for `latentflow train`."""
    background: str | None = None
    """Colour behind transparent pictures."""
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
        for name in ("n", "steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.n < 2:
            raise UserError("-n must be at least 2, to fit a distribution", "The default is 200.")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Pictures (N, 3, H, W) in [-1, 1], with a caption or class name each ("" without any)."""

    images: Tensor
    captions: list[str]


def main(argv: Sequence[str] | None = None) -> None:
    config = as_trained(parse(EvaluateConfig, argv, prog="latentflow evaluate", description=__doc__ or ""))
    output = checked_output(config)
    started = time.monotonic()

    # ---------------------------------------------------------------- the checkpoint and the pictures
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    pipe = LatentFlowPipeline.from_pretrained(config.checkpoint)
    add_adapters(pipe, config, config.checkpoint)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    config = as_drawn(config, pipe)
    train, held_out, test = read_parts(pipe, config)
    unseen = {"held_out": held_out} if test is None else {"held_out": held_out, "test": test}
    print(f"{len(train.images)} training and {len(held_out.images)} held-out pictures")
    asked = choose(train.captions, config.n, config.seed)

    # ---------------------------------------------------------------- without drawing: what the networks know
    report: dict[str, Any] = {"settings": dataclasses.asdict(config)}
    for name, part in unseen.items():
        report.setdefault("reconstruction", {})[name] = reconstruction(pipe, part, config.batch_size)
        report.setdefault("validation_loss", {})[name] = validation_loss(pipe, part, config)

    # ---------------------------------------------------------------- by drawing
    generated = draw(pipe, asked, train.images.shape[2:], config, "training captions")
    report["frechet_distance"] = frechet(generated, train, config.seed)
    if any(asked):
        report["caption_retrieval"] = caption_retrieval(generated, asked, train)
    report["memorisation"] = {
        **metrics.memorisation(generated, train.images, held_out.images, space=RETRIEVAL_SPACE)._asdict(),
        "features": RETRIEVAL_SPACE,
    }
    if config.data == "shapes":
        report["shapes"] = shapes_right(pipe, generated, asked, config)
    if config.attributes:
        report["attributes"] = attributes_right(pipe, train, test or held_out, config)
    if config.fid:
        report["fid"] = learned.inception_fid(generated, train.images, batch_size=config.batch_size)
    if config.clip is not None:
        report["clip_score"] = learned.clip_score(generated, asked, config.clip, batch_size=config.batch_size)

    # ---------------------------------------------------------------- the report
    report["seconds"] = round(time.monotonic() - started, 1)
    with whole_file(output) as partial:
        partial.write_text(json.dumps(finite(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shown = generated[:64]
    with whole_file(output.with_suffix(".png")) as partial:
        save_image((shown + 1) / 2, partial, nrow=math.ceil(len(shown) ** 0.5))
    print("\n".join(lines({name: value for name, value in report.items() if name != "settings"})))
    print(f"Wrote {output} and {output.with_suffix('.png')}")


# ---------------------------------------------------------------------------------------------------- input


def checked_output(config: EvaluateConfig) -> Path:
    output = Path(config.output)
    if output.suffix != ".json":
        raise UserError(
            f"the report is JSON, '{output}' is not", f"Did you mean -o {output.with_suffix('.json')}?"
        )
    taken = [file for file in (output, output.with_suffix(".png")) if file.exists()]
    if taken and not config.overwrite:
        raise UserError(f"{taken[0]} exists", "Choose another -o, or replace it with --overwrite.")
    check_writable(config.output)
    return output


def as_trained(config: EvaluateConfig) -> EvaluateConfig:
    """What is not given is taken from the run that the checkpoint lies in, or from the defaults."""
    file = Path(config.checkpoint).parent / "config.yaml"
    run_values: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    values = {
        "validation": run_values.get("validation", DataConfig.validation),
        "validation_seed": run_values.get("seed", LoopConfig.seed),
        "condition": run_values.get("condition", DataConfig.condition),
        "missing_caption": run_values.get("missing_caption", DataConfig.missing_caption),
        "masks": run_values.get("masks", DataConfig.masks),
        "columns": run_values.get("columns", {}),
        "background": run_values.get("background", DataConfig.background),
    }
    return dataclasses.replace(
        config, **{name: value for name, value in values.items() if getattr(config, name) in (None, {})}
    )


def as_drawn(config: EvaluateConfig, pipe: Any) -> EvaluateConfig:
    """What is not given of how to draw is what suits the checkpoint, and stands in the report."""
    solver = config.solver or (None if pipe.few_steps else "heun")
    return dataclasses.replace(
        config,
        steps=config.steps or (20 if solver else pipe.usual_steps),
        guidance=pipe.usual_guidance if config.guidance is None else config.guidance,
        solver=solver,
    )


def read_parts(pipe: Any, config: EvaluateConfig) -> tuple[Part, Part, Part | None]:
    """The training part, the held-out part and --test, at the checkpoint's resolution."""
    assert config.validation is not None and config.validation_seed is not None
    source = found(config.data, config)
    kept, out = split(source, config.validation, config.validation_seed)
    train = read_part(pipe, source.subset(kept), config)
    test = None
    if config.test is not None:
        test = read_part(pipe, found(config.test, config), config)
    if out:
        return train, read_part(pipe, source.subset(out), config), test
    if test is None:
        raise UserError(
            f"--validation {config.validation} holds no picture out",
            "Some figures need pictures that were not trained on: raise it, or give --test FOLDER.",
        )
    return train, test, None


def found(data: str, config: EvaluateConfig) -> Source:
    assert config.condition and config.missing_caption and config.masks
    wanted: dict[str, Any] = {
        name: getattr(config, name) for name in ("condition", "missing_caption", "masks", "columns")
    }
    return readable(find_source(data, **wanted))


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


def choose(captions: list[str], n: int, seed: int) -> list[str]:
    """``n`` captions in a random order; every one comes once before one comes twice."""
    different = sorted(set(captions))
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed)).tolist()
    return [different[order[i % len(order)]] for i in range(n)]


# ---------------------------------------------------------------------------------------------------- drawing


def conditions(pipe: Any, captions: list[str]) -> dict[str, Any]:
    """The captions as the pipeline's arguments."""
    if pipe.takes_classes and not pipe.takes_text:
        return {"class_labels": captions}
    return {"prompt": captions} if pipe.takes_text else {"num_images_per_prompt": len(captions)}


def draw(pipe: Any, captions: list[str], size: Sequence[int], config: EvaluateConfig, what: str) -> Tensor:
    """One picture for each caption, (N, 3, H, W) in [-1, 1]. Picture i depends on the seed and i only."""
    height, width = size
    batches = []
    for start in tqdm(range(0, len(captions), config.batch_size), desc=f"drawing {what}"):
        batch = captions[start : start + config.batch_size]
        generators = [torch.Generator().manual_seed(config.seed + start + i) for i in range(len(batch))]
        images = pipe(
            **conditions(pipe, batch),
            height=height,
            width=width,
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            solver=config.solver,
            generator=generators,
            output_type="pt",
        ).images
        batches.append(images.float().cpu() * 2 - 1)
    return torch.cat(batches)


# ---------------------------------------------------------------------------------------------------- figures


@torch.no_grad()
def reconstruction(pipe: Any, part: Part, batch_size: int) -> dict[str, Any]:
    """PSNR and SSIM of held-out pictures through the autoencoder, without noise."""
    psnr, ssim = [], []
    for images in tqdm(part.images.split(batch_size), desc="reconstructing"):
        copies = decode(pipe.vae, encode(pipe.vae, images)).cpu()
        psnr.append(metrics.psnr(copies, images))
        ssim.append(metrics.ssim(copies, images))
    return {
        "psnr": float(torch.cat(psnr).mean()),
        "ssim": float(torch.cat(ssim).mean()),
        "images": len(part.images),
    }


@torch.no_grad()
def validation_loss(pipe: Any, part: Part, config: EvaluateConfig) -> dict[str, Any]:
    """Flow-matching loss on held-out pictures, each with its own fixed noise, averaged over fixed times.

    The velocity's, on the straight path, whatever path and prediction the network was trained with.
    """
    path, losses = CondOT(), []
    for start in tqdm(range(0, len(part.images), config.batch_size), desc="validating"):
        rows = slice(start, start + config.batch_size)
        x1 = encode(pipe.vae, part.images[rows])
        noise = [torch.Generator().manual_seed(config.seed + start + i) for i in range(len(x1))]
        x0 = torch.stack([torch.randn(x1.shape[1:], generator=g) for g in noise]).to(x1)
        velocity = pipe.velocity(condition(pipe, part.captions[rows]), None)
        for t in VALIDATION_TIMES:
            sample = path.sample(x0, x1, torch.full((len(x1),), t, device=x1.device))
            losses.append(flow_matching_loss(velocity(sample.xt, sample.t), sample).cpu())
    return {"value": float(torch.cat(losses).mean()), "images": len(part.images), "times": VALIDATION_TIMES}


def condition(pipe: Any, captions: list[str]) -> Any:
    """The captions as the network's condition."""
    given = conditions(pipe, captions)
    if "prompt" in given:
        embeds, _, mask, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
        return pipe.condition(None, embeds, mask)
    return pipe.condition(pipe.get_label_ids(captions) if "class_labels" in given else None, None, None)


def frechet(generated: Tensor, train: Part, seed: int) -> dict[str, Any]:
    """Frechet distance to all training pictures, and that of as many real ones: the best to hope for."""
    reference = metrics.features(train.images, FRECHET_SPACE)
    some = torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed))[: len(generated)]
    return {
        "value": metrics.frechet_distance(metrics.features(generated, FRECHET_SPACE), reference),
        "as_many_training_pictures": metrics.frechet_distance(reference[some], reference),
        "generated": len(generated),
        "reference": len(reference),
        "features": FRECHET_SPACE,
    }


def caption_retrieval(generated: Tensor, asked: list[str], train: Part) -> dict[str, Any]:
    """Share of pictures whose caption is among those of the k nearest training pictures."""
    shares = metrics.caption_retrieval(generated, asked, train.images, train.captions, space=RETRIEVAL_SPACE)
    return {
        **{f"top_{k}": share for k, share in shares.items()},
        "n": len(asked),
        "features": RETRIEVAL_SPACE,
    }


def shapes_right(pipe: Any, generated: Tensor, asked: list[str], config: EvaluateConfig) -> dict[str, Any]:
    """Share of pictures that the exact checker of the procedural set finds right."""
    new = choose(shapes_data.held_out_captions(), config.n, config.seed)
    drawn = draw(pipe, new, generated.shape[2:], config, "held-out captions")

    def share(images: Tensor, captions: list[str]) -> float:
        right = [shapes_data.check(image, text) for image, text in zip(images, captions, strict=True)]
        return sum(right) / len(right)

    return {"train": share(generated, asked), "held_out": share(drawn, new), "n": len(asked)}


def attributes_right(pipe: Any, train: Part, unseen: Part, config: EvaluateConfig) -> dict[str, Any]:
    """Share of held-out captions whose picture is nearest to the real counterpart with that attribute."""
    images = torch.cat([train.images, unseen.images])
    groups = metrics.attribute_groups(unseen.captions, config.attributes, [*train.captions, *unseen.captions])
    if not groups:
        raise UserError(
            f"no held-out caption has a counterpart for each of {', '.join(config.attributes)}",
            "Name all attributes as the captions spell them; --test FOLDER gives the captions.",
        )
    asked = [unseen.captions[index] for index, _, _ in groups]
    drawn = draw(pipe, asked, images.shape[2:], config, "held-out captions")
    candidates = torch.stack([images[counterparts] for _, _, counterparts in groups])
    expected = [own for _, own, _ in groups]
    return {
        "right": metrics.attribute_retrieval(drawn, candidates, expected, space=RETRIEVAL_SPACE),
        "chance": 1 / len(config.attributes),
        "n": len(groups),
        "features": RETRIEVAL_SPACE,
    }


# ---------------------------------------------------------------------------------------------------- output


def finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def lines(report: dict[str, Any], indent: str = "") -> list[str]:
    """The report for the terminal."""
    out: list[str] = []
    for name, value in report.items():
        if isinstance(value, dict):
            out += [f"{indent}{name}", *lines(value, indent + "  ")]
        elif not isinstance(value, list | tuple):
            out.append(f"{indent}{name:<28}{f'{value:.4g}' if isinstance(value, float) else value}")
    return out


if __name__ == "__main__":
    run(main)
