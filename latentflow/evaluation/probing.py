"""Classes in the features of a trained network, and images in its density: what `evaluate --probe` and `--likelihood`
measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import metrics
from ..families.latentflow import LatentFlowModel
from ..flow import bits_per_dim, log_likelihood
from ..models import DiT
from ..training.loop.data_order import seeded
from ..utils.progress import progress_bar
from .data import ImageSet
from .figures import missing, share
from .sampler import FEATURES, PROBES, Sampler

#: times and shares of the blocks at which features are taken
TIMES, DEPTHS = (0.3, 0.6, 0.9), (0.25, 0.5, 0.75, 1.0)
#: evaluations of a likelihood are four a step
STEPS = 8
_MOST = 2000  # training images


def probe(sampler: Sampler, train: ImageSet, unseen: ImageSet) -> dict[str, Any]:
    """Measure how well classes are read from the network's features, by a linear probe and by the 5 nearest images.

    Block and time are the best ones for a fifth of the training images, whose classes the others tell (``chosen_by``):
    those of the unseen images have no part in it.

    Args:
        train: images with their classes, of which up to 2,000 are used.
        unseen: those whose classes are read.
    """
    model = sampler.model
    if not isinstance(model, LatentFlowModel) or not isinstance(model.network, DiT):
        return missing("best", "features are those of a DiT of our own")
    if not model.trained_null:
        return missing("best", "features are taken without a condition, which the checkpoint has not learnt")
    train = train.rows(metrics.in_proportion(train.captions, sampler.seed)[:_MOST])
    names = sorted({*train.captions})
    if len(names) < 2:
        return missing("best", "the training images have one class, which is no choice")
    numbers = {name: number for number, name in enumerate(names)}
    labels = torch.tensor([numbers[caption] for caption in train.captions])
    wanted = torch.tensor([numbers.get(caption, -1) for caption in unseen.captions])
    depth = len(model.network.blocks)
    blocks = sorted({max(1, round(share * depth)) for share in DEPTHS})
    table, fit = [], len(train) - max(1, len(train) // 5)
    for block in progress_bar(blocks, desc="features"):
        for t in TIMES:
            rows = [
                _features(sampler, part.images, block, t, stream)
                for stream, part in enumerate((train, unseen))
            ]
            near = metrics.neighbour_labels(*_standard(rows[1], rows[0]), train.captions)
            right = {
                "chosen_by": _read(rows[0][:fit], labels[:fit], rows[0][fit:]) == labels[fit:],
                "linear": _read(rows[0], labels, rows[1]) == wanted,
                "nearest": torch.tensor([*map(str.__eq__, near, unseen.captions)]),
            }
            table.append(
                {"block": block, "t": t} | {name: share(int(of.sum()), len(of)) for name, of in right.items()}
            )
    best = max(table, key=lambda entry: float(entry["chosen_by"]["share"]))
    return {"best": best, "table": table, "train": len(train), "classes": len(names)}


def _read(seen: Tensor, labels: Tensor, new: Tensor) -> Tensor:
    """Return the labels (M,) of new rows (M, D) by a linear probe of rows (N, D) and their labels (N,)."""
    new, seen = _standard(new, seen)
    scores: Tensor = linear_probe(seen, labels, int(labels.max()) + 1)(new)
    return scores.argmax(1)


def _standard(new: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return both with the mean 0 and the deviations 1 of ``seen``."""
    mean, std = seen.mean(0), seen.std(0, correction=0).clamp(min=1e-6)
    return (new - mean) / std, (seen - mean) / std


def _features(sampler: Sampler, images: Tensor, block: int, t: float, stream: int) -> Tensor:
    """Return features of images whose noise is that of a stream: two sets must not have the same, by which an image
    would be nearest to the one with its noise."""
    model = sampler.model
    assert isinstance(model, LatentFlowModel)
    generator = seeded(sampler.seed, FEATURES, stream)
    return torch.cat(
        [model.features(part, block, t, generator).cpu() for part in images.split(sampler.batch_size)]
    )


def linear_probe(rows: Tensor, labels: Tensor, classes: int, decay: float = 1e-3) -> nn.Linear:
    """Fit a multinomial logistic regression to rows (N, D) of labels (N,); ``decay`` is on half the squared weights."""
    layer = nn.Linear(rows.shape[1], classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(layer(rows), labels) + 0.5 * decay * layer.weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return layer.requires_grad_(False)


def likelihood(sampler: Sampler, sets: dict[str, ImageSet], count: int) -> dict[str, Any]:
    """Measure the density of images' latents, in bits per dimension, under their own conditions.

    Of a model with a latent variable of the image it is a bound, ``at_most``: by log p(x) >= E_q [log p(x | z)] -
    KL(q(z | x) || N(0, I)), with one z an image.

    Args:
        sets: "train", sets that were not trained on, and perhaps "other": images of another kind, which have no
            condition and are therefore compared without one.
        count: images of each set, in its own proportions of classes.
    """
    found: dict[str, Tensor] = {}
    for name, part in sets.items():
        chosen = part.rows(metrics.in_proportion(part.captions, sampler.seed)[:count])
        found[name] = _bits(sampler, chosen, "other" in sets)
    bound = {} if sampler.model.latent_variable is None else {"at_most": True}
    report: dict[str, Any] = {
        name: {"bits_per_dim": float(bits.mean()), "standard_error": _error(bits), "n": len(bits), **bound}
        for name, bits in found.items()
    }
    if "other" in found:
        new = found["test"] if "test" in found else found["held_out"]
        typical = found["train"].mean()
        report["other"] |= {
            "auroc": auroc(found["other"], new),
            "auroc_of_typicality": auroc((found["other"] - typical).abs(), (new - typical).abs()),
        }
    return report


def _bits(sampler: Sampler, part: ImageSet, without_condition: bool) -> Tensor:
    model, bits = sampler.model, []
    for start in progress_bar(range(0, len(part), sampler.batch_size), desc="likelihoods"):
        each = slice(start, start + sampler.batch_size)
        with torch.no_grad():
            x1 = model.encode(part.images[each].to(model.device)).float()
            rows = model.null(len(x1)) if without_condition else sampler.rows(part.captions[each])
            generator = [seeded(sampler.seed, PROBES, start + i) for i in range(len(x1))]
            rate: Tensor | float = 0.0
            if model.latent_variable is not None:
                rate = model.infer(x1).rate()
                rows = model.with_latent_variable(rows, generator, x1)
        logp = log_likelihood(
            model.velocity(rows, 1.0),
            x1,
            "hutchinson",
            solver="rk4",
            times=torch.linspace(1.0, 0.0, STEPS + 1).tolist(),
            generator=generator,
        )
        bits.append(bits_per_dim((logp - rate).cpu().double(), x1.shape[1:]))
    return torch.cat(bits)


def _error(values: Tensor) -> float | None:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None


def auroc(higher: Tensor | Sequence[float], lower: Tensor | Sequence[float]) -> float:
    """Return the probability that a value of the first set is above one of the second; ties count half."""
    from scipy.stats import mannwhitneyu

    a, b = torch.as_tensor(higher).tolist(), torch.as_tensor(lower).tolist()
    return float(mannwhitneyu(a, b).statistic) / (len(a) * len(b))
