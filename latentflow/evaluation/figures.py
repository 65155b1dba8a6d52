"""The figures of the report. Each function returns one entry, as JSON holds it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import metrics
from ..data.sources import shapes as shapes_data
from ..errors import UserError
from ..families import FlowModel
from ..families.model import Rows
from ..families.tokens import CodeModel, TokenModel
from ..flow import CondOT, bits_per_dim, convert, flow_matching_loss
from ..flow.discrete import likelihood_bound
from ..metrics import learned
from ..training.loop.data_order import seeded
from ..utils.progress import progress_bar
from .data import ImageSet
from .sampler import HELD_OUT_CAPTIONS, VALIDATION, Sampler

RETRIEVAL_SPACE = "pixels-32"
FRECHET_SPACE = "pixels-16"
VALIDATION_TIMES = tuple((i + 0.5) / 8 for i in range(8))
TRAINING_IMAGES = 64  # of which the loss is measured

# ---------------------------------------------------------------- without sampling: what the networks know


@torch.no_grad()
def reconstruction(model: FlowModel, images: Tensor, batch_size: int) -> dict[str, Any]:
    """Measure PSNR and SSIM of images that were not trained on, through the autoencoder, without noise."""
    psnr, ssim = [], []
    large = min(images.shape[2:]) >= metrics.SSIM_SIDE
    for batch in progress_bar(images.split(batch_size), desc="reconstructing"):
        copies = model.decode(model.encode(batch)).cpu()
        metrics.refuse_not_finite(copies, "reconstructions")
        psnr.append(metrics.psnr(copies, batch))
        if large:
            ssim.append(metrics.ssim(copies, batch))
    decibels = torch.cat(psnr)
    exact = int(decibels.isinf().sum())
    report: dict[str, Any] = {"images": len(images), "exact_copies": exact}
    if exact < len(decibels):  # the PSNR of an exact copy is infinite, and so would the mean be
        report["psnr"] = float(decibels[decibels.isfinite()].mean())
    else:
        report |= missing("psnr", "every image is reproduced exactly")
    if large:
        report["ssim"] = float(torch.cat(ssim).mean())
    else:
        report |= missing("ssim", f"images of fewer than {metrics.SSIM_SIDE} pixels a side have none")
    return report


@torch.no_grad()
def validation_loss(sampler: Sampler, unseen: ImageSet, without_condition: bool = False) -> dict[str, Any]:
    """Measure the loss on images that were not trained on, at fixed times (``by_time``) and on average.

    Each image has its own fixed noise, and the latent variable that its encoder gives it, if any. The loss is the
    squared error of what the network predicts, its ``prediction``, at the noise levels of the straight path, whatever
    path it was trained on: as errors of the velocity those of data would count 1 / (1 - t)^2 times, and those of noise
    1 / t^2 times. (A score counts as noise.) Of a model of codes it is the cross-entropy, of a model of tokens
    `token_bound`, both in bits per token. ``without_condition`` adds the same of the network without its condition.
    """
    model = sampler.model
    if isinstance(model, TokenModel):
        return token_bound(model, sampler, unseen)
    if not model.has_velocity:
        return missing("value", "a consistency model has no velocity")
    losses = _losses(sampler, unseen, (True, False) if without_condition else (True,))
    of = {"unit": "bits per token"} if isinstance(model, CodeModel) else {"prediction": _compared(model)}
    found = _by_time(losses[0]) | of
    return found | {"without_condition": _by_time(losses[1])} if without_condition else found


@torch.no_grad()
def training_loss(sampler: Sampler, train: ImageSet) -> dict[str, Any]:
    """Measure the same on 64 images that were trained on, and there without their conditions as well.

    Far below the loss of other images it tells of memorising; the difference that the condition makes, by time, tells
    when on the way from noise to image it decides what is drawn.
    """
    train = train.rows(metrics.in_proportion(train.captions, sampler.seed)[:TRAINING_IMAGES])
    without = any(train.captions) and sampler.model.trained_null
    return validation_loss(sampler, train, without_condition=without)


def _losses(sampler: Sampler, part: ImageSet, conditioned: tuple[bool, ...]) -> Tensor:
    """Return the losses (with or without the condition, times, N) of images, on the CPU."""
    model, losses = sampler.model, []
    for start in progress_bar(range(0, len(part), sampler.batch_size), desc="validating"):
        batch = slice(start, start + sampler.batch_size)
        x1 = model.encode(part.images[batch])
        noise = [seeded(sampler.seed, VALIDATION, start + i) for i in range(len(x1))]
        x0 = torch.stack([torch.randn(x1.shape[1:], generator=g) for g in noise]).to(x1)
        found = []
        for own in conditioned:
            rows = sampler.rows(part.captions[batch]) if own else model.null(len(x1))
            rows = model.with_latent_variable(rows, like=x1, mean=True)
            of = (
                _code_losses(model, rows) if isinstance(model, CodeModel) else _prediction_losses(model, rows)
            )
            times = [torch.full((len(x1),), t, device=x1.device) for t in VALIDATION_TIMES]
            found.append(torch.stack([of(x0, x1, t).cpu() for t in times]))
        losses.append(torch.stack(found))
    return torch.cat(losses, 2)


def _prediction_losses(model: FlowModel, rows: Rows) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return (x0, x1, t) -> the squared errors (B,) of the prediction on the straight path."""
    path, velocity, kind = CondOT(), model.velocity(rows, 1.0), _compared(model)

    def loss(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        sample = path.sample(x0, x1, t)
        found = convert(velocity(sample.xt, t), sample.xt, t, path, "velocity", kind)
        return flow_matching_loss(found, sample, prediction=kind)

    return loss


def _compared(model: FlowModel) -> str:
    """Return what the errors are those of: the network's prediction, but noise in the place of the score."""
    return "noise" if model.prediction == "score" else model.prediction


def _code_losses(model: CodeModel, rows: Rows) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return (x0, x1, t) -> the cross-entropy (B,) of the codes in bits, at the log-SNR of the straight path at t."""
    logits, path = model.logits(rows), model.path

    def loss(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        sample = path.sample(x0, x1, path.clip(path.inverse_log_snr(CondOT().log_snr(t))))
        return model.codes.loss(logits(sample.xt, sample.t), model.codes.nearest(x1)) / math.log(2)

    return loss


def token_bound(model: TokenModel, sampler: Sampler, unseen: ImageSet) -> dict[str, Any]:
    """Measure the bound of the likelihood of images' tokens, in bits per token: see `likelihood_bound`."""
    bounds = []
    for start in progress_bar(range(0, len(unseen), sampler.batch_size), desc="validating"):
        rows = slice(start, start + sampler.batch_size)
        tokens = model.encode(unseen.images[rows])
        noise = [seeded(sampler.seed, VALIDATION, start + i) for i in range(len(tokens))]
        logits = model.logits(sampler.rows(unseen.captions[rows]), 1.0)
        samples = len(VALIDATION_TIMES)
        nats = likelihood_bound(logits, tokens, model.token_path, samples=samples, generator=noise)
        bounds.append(bits_per_dim(-nats, tokens.shape[1:]).cpu())
    return _mean_loss(torch.cat(bounds)) | {"unit": "bits per token"}


def _by_time(losses: Tensor) -> dict[str, Any]:
    """Return the mean of losses (times, N) of images, and that at each time."""
    by_time = losses.double().mean(1).tolist()
    return _mean_loss(losses.mean(0)) | {"times": VALIDATION_TIMES, "by_time": by_time}


def _mean_loss(per_image: Tensor) -> dict[str, Any]:
    """Return the mean of images' losses (N,), with its standard error."""
    per_image = per_image.double()
    metrics.refuse_not_finite(per_image[:, None], "images' validation losses")
    n = len(per_image)
    error = missing("standard_error", "one image")
    if n > 1:
        error = {"standard_error": float(per_image.std() / n**0.5)}
    return {"value": float(per_image.mean()), **error, "images": n}


# ---------------------------------------------------------------- by sampling


def frechet_distance(
    generated: Tensor, beside: ImageSet, reference: ImageSet, inception: Any = None, batch_size: int = 50
) -> dict[str, Any]:
    """Measure the Frechet distance of generated images to the reference.

    ``floor`` is that of as many real images, ``beside``, to the same reference.

    Args:
        inception: of `learned.open_fid`, for FID; None: in the space of small images.
    """
    n = len(beside)
    if n < 2:
        images = f"{n + len(reference)} training images"
        return missing("value", f"{images} cannot be split in two with a covariance each")
    sets = [generated[:n], beside.images]
    if inception is not None:
        value, floor = learned.inception_fid(inception, sets, reference.images, batch_size=batch_size)
    else:
        data, *both = (metrics.features(images, FRECHET_SPACE) for images in (reference.images, *sets))
        value, floor = (metrics.frechet_distance(features, data) for features in both)
    report = {"value": value, "floor": floor, "generated": n, "real": n, "reference": len(reference)}
    return report if inception is not None else report | {"features": FRECHET_SPACE}


def caption_retrieval(
    generated: Tensor, captions: list[str], train: ImageSet, unseen: dict[str, ImageSet]
) -> dict[str, Any]:
    """Measure the share of images whose caption is among those of the k nearest training images, by their pixels."""
    rows, reference = (metrics.features(images, RETRIEVAL_SPACE) for images in (generated, train.images))
    new = {name: metrics.features(part.images, RETRIEVAL_SPACE) for name, part in unseen.items()}
    return retrieval(rows, captions, reference, train, new, unseen) | {"features": RETRIEVAL_SPACE}


def retrieval(
    rows: Tensor,
    captions: list[str],
    reference: Tensor,
    train: ImageSet,
    unseen: dict[str, Tensor],
    unseen_sets: dict[str, ImageSet],
) -> dict[str, Any]:
    """Measure the share of images whose caption is among those of the k nearest training images.

    Real images that were not trained on are measured as well, where their captions are in the training data.

    Args:
        rows: features (N, D) of the images. reference: (M, D), those of ``train``.
        unseen: those of each of ``unseen_sets``.
    """
    known = set(train.captions) - {""}

    def retrieved(rows: Tensor, captions: list[str]) -> dict[str, Any]:
        chosen = [row for row, caption in enumerate(captions) if caption in known]
        found = metrics.retrieve_rows(
            rows[chosen], [captions[row] for row in chosen], reference, train.captions
        )
        return {
            f"top_{k}": {**share(hits, found.n), "chance": found.chance[k]} for k, hits in found.hits.items()
        }

    comparable = {name: images for name, images in unseen_sets.items() if known & set(images.captions)}
    return {
        **retrieved(rows, captions),
        **{f"real_{name}": retrieved(unseen[name], images.captions) for name, images in comparable.items()},
    }


def memorisation(generated: Tensor, train: ImageSet, held_out: ImageSet | None) -> dict[str, Any]:
    """Measure distances to the nearest training image, beside those of real images that are new."""
    new = None if held_out is None else held_out.images
    found = metrics.memorisation(generated, train.images, new, space=RETRIEVAL_SPACE)
    return {
        "ratio": found.ratio,
        "copies": {**share(found.copied, found.drawn), "expected": found.expected, "usual": found.usual},
        "generated": found.generated,
        "real": found.real,
        "compared": found.compared,
        "new": found.new,
        "features": RETRIEVAL_SPACE,
    }


def shapes(sampler: Sampler, generated: Tensor, captions: list[str], beside: ImageSet) -> dict[str, Any]:
    """Measure the share of images that the exact checker of the procedural set finds right.

    Args:
        generated: as many images of captions that were held out are generated as these; no class is held out.
        captions: of these, or their classes.
    """

    def right(images: Tensor, captions: list[str]) -> dict[str, Any]:
        return share(sum(map(shapes_data.check, images, captions)), len(captions))

    found = {"train": right(generated, captions), "real": right(beside.images, beside.captions)}
    if shapes_data.CLASSES.keys() >= {*captions}:
        return found
    different = sorted(shapes_data.held_out_captions())
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(sampler.seed)).tolist()
    new = [different[order[i % len(order)]] for i in range(len(captions))]
    return found | {"held_out": right(sampler.sample(new, HELD_OUT_CAPTIONS, "held-out captions"), new)}


@dataclass(frozen=True, kw_only=True)
class Counterparts:
    """N images that were not trained on, each with K real images that differ from one another by an attribute.

    Attributes:
        rows: N; their rows in the set that was not trained on.
        candidates: (N, K, 3, H, W).
        own: N; which of the K images carries the caption's own attribute.
        equal: number of captions that are left out because two of their images are equal.
    """

    rows: list[int]
    candidates: Tensor
    own: list[int]
    equal: int


def find_counterparts(train: ImageSet, unseen: ImageSet, attributes: Sequence[str]) -> Counterparts:
    """Return the captions of ``unseen`` that have a counterpart for each of ``attributes``.

    Raises:
        UserError: there is none.
    """
    images = torch.cat([train.images, unseen.images])
    groups = metrics.attribute_groups(unseen.captions, attributes, [*train.captions, *unseen.captions])
    apart = [group for group in groups if len(images[group[2]].flatten(1).unique(dim=0)) == len(group[2])]
    if not apart:
        raise UserError(
            f"no held-out caption has a counterpart for each of {', '.join(attributes)}, all different images",
            "Name all attributes as the captions spell them; --test FOLDER gives the captions.",
        )
    return Counterparts(
        rows=[index for index, _, _ in apart],
        candidates=torch.stack([images[rows] for _, _, rows in apart]),
        own=[own for _, own, _ in apart],
        equal=len(groups) - len(apart),
    )


def attribute_accuracy(generated: Tensor, counterparts: Counterparts) -> dict[str, Any]:
    """Measure the share of images that are nearest to the real counterpart with the same attribute, by their pixels.

    Args:
        generated: an image for each row of the set that was not trained on.
    """
    right = metrics.attribute_retrieval(
        generated[counterparts.rows], counterparts.candidates, counterparts.own, space=RETRIEVAL_SPACE
    )
    n = len(counterparts.own)
    return {
        "right": share(round(right * n), n),
        "chance": 1 / counterparts.candidates.shape[1],
        "left_out_as_equal": counterparts.equal,
        "features": RETRIEVAL_SPACE,
    }


def clip_scores(
    clip: Any, generated: Tensor, captions: list[str], beside: ImageSet, batch_size: int
) -> dict[str, Any]:
    """Measure the CLIP score of generated images with their captions, and of real images with theirs."""
    report: dict[str, Any] = {}
    sets = {"value": ImageSet(images=generated, captions=captions), "real": beside}
    for name, images in sets.items():
        captioned = images.rows([row for row, caption in enumerate(images.captions) if caption])
        if not len(captioned):
            report |= missing(name, "no image has a caption")
            continue
        report[name] = learned.clip_score(clip, captioned.images, captioned.captions, batch_size=batch_size)
        report[f"{name}_images"] = len(captioned)
    return report


# ---------------------------------------------------------------- parts of entries


def share(count: int, n: int) -> dict[str, Any]:
    """Return a share with its counts and its 95 % interval (Wilson)."""
    from scipy.stats import binomtest

    interval = binomtest(count, n).proportion_ci(method="wilson")
    return {"share": count / n, "count": count, "n": n, "interval_95": [interval.low, interval.high]}


def missing(name: str, reason: str) -> dict[str, Any]:
    """Return a figure that cannot be given, with the reason."""
    return {name: None, f"{name}_reason": reason}
