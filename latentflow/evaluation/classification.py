"""Classes of images by a trained flow, and labels and captions that it doubts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..data import LazyTable, Source, caption_of_class, pixels_to_images
from ..errors import UserError
from ..families import FlowModel, Rows
from ..families.few_steps import require_velocity
from ..families.latent_variable import require_density
from ..flow import WEIGHTINGS, compare_conditions, log_likelihood, make
from ..inference.sample import generators
from ..utils.progress import progress_bar
from .data import load_pixels

Method = Literal["flow-matching", "likelihood"]
# Random vectors of a likelihood.
_PROBES = 4
_IMAGES_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A flow model as a classifier of images. One with a latent variable compares under that of the image.

    Attributes:
        evaluations: of each class that remains to the end: an even number.
        method: "flow-matching": `latentflow.flow.compare_conditions`; "likelihood": the density of the flow under each
            class, whose divergence is estimated with the same random vectors for all.
        weighting: entry of ``WEIGHTINGS``. "likelihood" is that of the densities; the default classifies better by
            trained networks, whose errors near the data are less telling than exact ones. Of "flow-matching" alone, as:
        halving: drop the worse half of the classes in each round.
        batch_size: images that the network sees at once.
        seed: image i has the noises of seed + i.

    Raises:
        UserError: the model draws in a few steps, has no velocity, or needs images; or no density, for "likelihood".
    """

    model: FlowModel
    evaluations: int = 32
    method: Method = "flow-matching"
    weighting: str = "flow-matching"
    halving: bool = True
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        require_velocity(self.model)
        if self.model.few_steps:
            raise UserError(
                "this checkpoint draws in a few steps of its own, and its velocities are averages",
                "Give the checkpoint that it was distilled from.",
            )
        self.model.check_image_input()
        if self.method == "likelihood":
            require_density(self.model)

    def images(self, source: Source, background: str = "white") -> LazyTable:
        """Return the images at the model's size, uint8 (N, 3, H, W), read as they are compared."""
        return load_pixels(self.model, source, background)

    @torch.no_grad()
    def compare(
        self, images: Tensor | LazyTable, rows: Rows | Callable[[int], Rows]
    ) -> tuple[Tensor, Tensor]:
        """Compare K conditions of every image.

        Args:
            images: uint8 (N, 3, H, W).
            rows: K conditions; or (number of an image) -> K of its own.

        Returns:
            log p(image | condition) less that of its best condition, and -log p(image | condition) up to a constant,
            each (N, K) float64; under a ``weighting`` other than "likelihood" these are weighted, and not in nats.

        Raises:
            UserError: see `compare_conditions` and `log_likelihood`.
        """
        ratios, losses = [], []
        by_density = self.method == "likelihood"
        at_once = min(_IMAGES_AT_ONCE, self.batch_size) if by_density else _IMAGES_AT_ONCE
        alike = isinstance(rows, Rows) and self.model.latent_variable is None  # the conditions of all images
        at_once = at_once if alike else 1
        compared = self._likelihoods if by_density else self._compared
        with progress_bar(total=len(images), desc="images") as bar:
            for start in range(0, len(images), at_once):
                part = images[start : start + at_once]
                x1 = self.model.encode(pixels_to_images(part).to(self.model.device)).float()
                own = rows if isinstance(rows, Rows) else rows(start)
                own = own if alike else self.model.with_latent_variable(own, like=x1, mean=True)
                ratio, loss = compared(x1, own, start)
                ratios.append(ratio)
                losses.append(loss)
                bar.update(len(part))
        return torch.cat(ratios), torch.cat(losses)

    def _compared(self, x1: Tensor, rows: Rows, place: int) -> tuple[Tensor, Tensor]:
        def velocity(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return self.model.velocity(rows[condition.cpu()], 1.0)(x, t)

        found = compare_conditions(
            velocity,
            x1,
            len(rows),
            evaluations=self.evaluations,
            halving=self.halving,
            weighting=make(WEIGHTINGS, self.weighting, "weighting"),
            batch_size=self.batch_size,
            generator=generators(self.seed + place, len(x1)),
        )
        return found.log_ratios, found.losses

    def _likelihoods(self, x1: Tensor, rows: Rows, place: int) -> tuple[Tensor, Tensor]:
        found = []
        for condition in range(len(rows)):
            with torch.enable_grad():
                found.append(
                    log_likelihood(
                        self.model.velocity(rows[[condition] * len(x1)], 1.0),
                        x1,
                        divergence="hutchinson",
                        probes=_PROBES,
                        solver="midpoint",
                        times=torch.linspace(1.0, 0.0, self.evaluations // 2 + 1).tolist(),
                        generator=generators(self.seed + place, len(x1)),
                    )
                )
        values = torch.stack(found, 1).cpu().double()
        return values - values.amax(1, keepdim=True), -values


class Doubt(NamedTuple):
    """An image's label or caption beside the best other one, by a model.

    Attributes:
        image: its name.
        label: its class or caption.
        rather: the class or caption, among those that it was compared with, under which it is most likely.
        log_ratio: weighted loss of the best other one less that under the label; negative where ``rather`` is another.
        surprise: the loss under the label, in standard deviations above the mean of the data: large for an outlier.
    """

    image: str
    label: str
    rather: str
    log_ratio: float
    surprise: float


def audit(classifier: Classifier, source: Source, background: str = "white", others: int = 7) -> list[Doubt]:
    """Compare each image's label with others; return the most doubtful first.

    Classes are compared with all classes of the data; a caption with ``others`` that are drawn from the data.

    Raises:
        UserError: the data have no labels, or one; the model takes none of that kind, or does not know one.
    """
    model = classifier.model
    texts = (
        source.captions() if source.kind == "text" else [example.label or "" for example in source.examples]
    )
    source = source.subset([row for row, text in enumerate(texts) if text])
    labels = [text for text in texts if text]
    if source.kind == "unconditional" or not any(labels):
        raise UserError(f"{source.name} has neither classes nor captions", "There is nothing to doubt.")
    if len({*labels}) < 2:
        raise UserError(
            f"all images have one label: {labels[0]}", "Labels can be doubted where there are at least two."
        )
    images = classifier.images(source, background)
    rows: Rows | Callable[[int], Rows]
    if source.kind == "class":
        names = [name for name in source.classes if name in {*labels}]
        candidates = [names] * len(labels)
        spoken = [caption_of_class(name) for name in names]
        rows = model.encode_class(names) if model.takes_classes else model.encode_prompt(spoken)
        places = [names.index(label) for label in labels]
    else:
        candidates = [
            [own, *drawn] for own, drawn in zip(labels, _others(labels, others, classifier.seed), strict=True)
        ]
        rows = lambda number: model.encode_prompt(candidates[number])  # noqa: E731  # of all they may not fit
        places = [0] * len(labels)
    ratios, losses = classifier.compare(images, rows)
    right = torch.tensor(places)[:, None]
    apart = ratios.gather(1, right)[:, 0] - ratios.scatter(1, right, -torch.inf).amax(1)
    own_loss = losses.gather(1, right)[:, 0]
    surprise = (own_loss - own_loss.mean()) / own_loss.std().clamp(min=1e-12)
    found = [
        Doubt(example.name, label, compared[int(best)], float(ratio), float(far))
        for example, label, compared, best, ratio, far in zip(
            source.examples, labels, candidates, ratios.argmax(1), apart, surprise, strict=True
        )
    ]
    return sorted(found, key=lambda doubt: doubt.log_ratio)


def _others(captions: Sequence[str], count: int, seed: int) -> list[list[str]]:
    """Draw for each caption ``count`` others of the data, fewer for all where there are not as many."""
    pool = sorted({*captions})
    count = min(count, len(pool) - 1)
    return [
        [text for text in random.Random(f"{seed} {place}").sample(pool, count + 1) if text != caption][:count]
        for place, caption in enumerate(captions)
    ]


class Calibration(NamedTuple):
    """A temperature fitted to labelled images, and the expected calibration error there before and after it."""

    temperature: float
    before: float
    after: float


def calibrate(log_ratios: Tensor, labels: Sequence[int]) -> Calibration:
    """Fit the temperature under which labelled images are most likely (Guo et al. 2017, arXiv:1706.04599, sec. 4.2).

    Args:
        log_ratios: (N, K).
        labels: N numbers of classes.

    Raises:
        UserError: fewer than ten images.
    """
    from scipy.optimize import minimize_scalar

    if len(labels) < 10:
        raise UserError(f"{len(labels)} labelled images to calibrate with", "Give at least 10.")
    right = torch.tensor(labels)

    def loss(log_temperature: float) -> float:
        scores = torch.log_softmax(log_ratios / float(torch.tensor(log_temperature).exp()), 1)
        return -float(scores.gather(1, right[:, None]).mean())

    found = minimize_scalar(loss, bounds=(-7.0, 14.0), method="bounded")
    temperature = float(torch.tensor(found.x, dtype=torch.float64).exp())
    return Calibration(
        temperature,
        calibration_error(log_ratios, labels),
        calibration_error(log_ratios / temperature, labels),
    )


def calibration_error(log_ratios: Tensor, labels: Sequence[int], bins: int = 10) -> float:
    """Return the expected calibration error: the mean difference of confidence and accuracy, over bins of confidence
    (Guo et al. 2017, eq. 3)."""
    chosen = torch.softmax(log_ratios, 1).max(1)
    hits = (chosen.indices == torch.tensor(labels)).double()
    which = (chosen.values * bins).long().clamp(max=bins - 1)
    apart = [
        (hits[which == number].mean() - chosen.values[which == number].mean()).abs()
        * (which == number).double().mean()
        for number in which.unique()
    ]
    return float(torch.stack(apart).sum())
