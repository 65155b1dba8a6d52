"""The loss of tokens against closed forms, and the random numbers of its samples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentflow.config import TokenConfig
from latentflow.errors import UserError
from latentflow.models import Condition
from latentflow.training.losses import TokenLoss

V = 6


class Posterior(nn.Module):
    """Logits that know the data: ``sharp`` at each token of ``x1``, 0 elsewhere. It remembers what it was given."""

    def __init__(self, x1: Tensor, sharp: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(sharp * F.one_hot(x1, V).float())
        self.given: list[tuple[Tensor, Tensor, Condition]] = []

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.given.append((x, t, condition))
        return self.logits


def batch(count: int = 8, side: int = 4) -> dict[str, Any]:
    tokens = torch.randint(V, (count, side, side), generator=torch.Generator().manual_seed(0))
    return {
        "latents": tokens.int(),
        "sample_ids": [*range(3, 3 + count)],
        "class_labels": torch.arange(count),
    }


def loss_of(data: dict[str, Any], sharp: float, **settings: Any) -> tuple[TokenLoss, Posterior]:
    config = TokenConfig(tokens=True, **settings)
    network = Posterior(data["latents"].long(), sharp)
    return TokenLoss(network, config, config.path(V), seed=1, condition_dropout=0.5), network


@pytest.mark.parametrize("kappa", ["linear", "polynomial", "cosine", "cubic"])
def test_cross_entropy_of_ignorance_is_log_v_at_each_mask(kappa: str) -> None:
    data = batch()
    loss, network = loss_of(data, 0.0, kappa=kappa)
    found = loss(data)
    x, t, _ = network.given[0]
    masks = x == V
    assert torch.equal(x[~masks], data["latents"].long()[~masks])
    assert 0 < masks.float().mean() < 1
    torch.testing.assert_close(found["per_sample"], masks.float().mean((1, 2)) * math.log(V))
    assert t.dtype == torch.float32 and torch.equal(found["t"].float(), t)
    data["weights"] = torch.arange(8.0)
    torch.testing.assert_close(loss(data)["loss"], (found["per_sample"] * data["weights"]).mean())


def test_generalised_kl_of_ignorance_under_a_uniform_source() -> None:
    """rate (1 - 1/V) at right tokens and rate (log V - 1/V) at wrong ones; linear kappa: the rate is 1 / (1 - t)."""
    data = batch()
    loss, network = loss_of(data, 0.0, token_source="uniform", token_objective="generalised-kl")
    found = loss(data)
    right = (network.given[0][0] == data["latents"]).double()
    each = right * (1 - 1 / V) + (1 - right) * (math.log(V) - 1 / V)
    torch.testing.assert_close(
        found["per_sample"].double(), each.mean((1, 2)) / (1 - found["t"]), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("source", ["mask", "uniform"])
@pytest.mark.parametrize("objective", ["cross-entropy", "generalised-kl"])
@pytest.mark.parametrize("weighting", [None, "constant", "likelihood", "capped"])
def test_the_perfect_posterior_costs_nothing(source: str, objective: str, weighting: str | None) -> None:
    data = batch()
    settings = {"token_source": source, "token_objective": objective, "token_weighting": weighting}
    loss, _ = loss_of(data, 200.0, **settings)
    assert loss(data)["loss"].item() == 0.0
    assert loss_of(data, 1.0, **settings)[0](data)["loss"].item() > 0.0


def test_a_row_depends_on_seed_and_number_alone() -> None:
    data = batch()
    loss, network = loss_of(data, 0.0)
    together, part = loss(data), {name: value[2:4] for name, value in data.items()}
    alone, other = loss_of(part, 0.0)
    assert torch.equal(alone(part)["per_sample"], together["per_sample"][2:4])
    assert torch.equal(other.given[0][0], network.given[0][0][2:4])
    dropped = network.given[0][2].drop
    assert dropped is not None and 0 < dropped.float().mean() < 1
    loss.eval()(data)
    assert not network.given[1][2].drop.any()  # type: ignore[union-attr]


def test_bad_tokens_and_settings_are_refused() -> None:
    data = batch()
    loss, _ = loss_of(data, 0.0)
    data["latents"][0, 0, 0] = V
    with pytest.raises(UserError, match="tokens from 0 to 6"):
        loss(data)
    with pytest.raises(UserError, match=r"--kappa without --tokens"):
        TokenConfig(kappa="cosine")
    for settings, what in (
        ({"kappa": "quadratic"}, "unknown kappa"),
        ({"kappa_options": {"degree": 2.0}}, "option 'degree'"),
        ({"kappa": "polynomial", "kappa_options": {"degree": 0.5}}, "degree must be"),
        ({"token_objective": "flow-matching"}, "unknown token objective"),
        ({"token_weighting": "edm"}, "unknown token weighting"),
    ):
        with pytest.raises(UserError, match=what):
            TokenConfig(tokens=True, **settings)  # type: ignore[arg-type]
