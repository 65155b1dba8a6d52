"""A categorical posterior over codes is the exact velocity of data that are codes, on every continuous path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentflow.errors import UserError
from latentflow.flow import CondOT, Path, as_velocity, guide, integrate
from latentflow.flow.discrete import Codebook, Logits

from ..closed_forms import EVERY_PATH, Mixture, seeded

WEIGHTS, CODES = (0.3, 0.5, 0.2), (-2.0, 0.5, 3.0)
DATA = Mixture(weights=WEIGHTS, means=CODES, stds=(0.0, 0.0, 0.0))
CODEBOOK = Codebook(torch.tensor(CODES, dtype=torch.float64)[:, None])


def exact_logits(path: Path):
    """log p(code) + log N(x; alpha e, sigma^2), unnormalised; x is (B, 1, n)."""
    weights, codes = (torch.tensor(values, dtype=torch.float64) for values in (WEIGHTS, CODES))

    def posterior(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = path.alpha(t), path.sigma(t).clamp(min=1e-9)
        return weights.log() - 0.5 * ((x[:, 0, :, None] - alpha * codes) / sigma) ** 2

    return posterior


@pytest.mark.parametrize("path", EVERY_PATH.values(), ids=list(EVERY_PATH))
def test_the_mean_code_is_the_exact_velocity(path: Path) -> None:
    x = torch.linspace(-4, 4, 41, dtype=torch.float64).reshape(1, 1, -1)
    velocity = as_velocity(CODEBOOK.data_prediction(exact_logits(path)), path, "data")
    for t in (0.1, 0.5, 0.9):
        time = torch.tensor(t, dtype=torch.float64)
        scaled = x * float(path.sigma(time) + path.alpha(time))
        expected = DATA.velocity(path, scaled, time)
        torch.testing.assert_close(velocity(scaled, time), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("solver", ["heun", "dpm-solver++2m", "exponential-adams"])
def test_solvers_end_at_codes_in_their_shares(solver: str) -> None:
    n, path = 2000, CondOT()
    noise = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n).reshape(n, 1, 1)
    velocity = as_velocity(CODEBOOK.data_prediction(exact_logits(path)), path, "data")
    x = integrate(velocity, noise, torch.linspace(0, 1, 41, dtype=torch.float64), solver, path=path)
    tokens = CODEBOOK.nearest(x)
    assert (x - CODEBOOK.embed(tokens)).abs().quantile(0.95) < 0.05
    share = torch.bincount(tokens.flatten(), minlength=3).double() / n
    assert (share - torch.tensor(WEIGHTS)).abs().max() < 0.02


def test_a_low_temperature_takes_the_likeliest_code_and_velocities_can_be_guided() -> None:
    path, x = CondOT(), torch.full((2, 1, 3), 0.1, dtype=torch.float64)
    t = torch.tensor(0.0, dtype=torch.float64)
    for temperature in (1e-3, 1e-300):
        cold = CODEBOOK.data_prediction(exact_logits(path), temperature)(x, t)
        torch.testing.assert_close(cold, torch.full_like(x, 0.5))
    warm = CODEBOOK.data_prediction(exact_logits(path))(x, t)
    torch.testing.assert_close(
        warm, torch.full_like(x, sum(w * c for w, c in zip(WEIGHTS, CODES, strict=True)))
    )
    pair = [
        as_velocity(CODEBOOK.data_prediction(exact_logits(path), tau), path, "data") for tau in (1.0, 2.0)
    ]
    v, u = (velocity(x, t + 0.3) for velocity in pair)
    torch.testing.assert_close(guide(*pair, 3.0)(x, t + 0.3), v + 2.0 * (v - u))


def test_tokens_and_latents_are_each_others_inverse_and_means_are_read_in_parts() -> None:
    book = Codebook(torch.randn(50, 4, generator=seeded()))
    tokens = torch.randint(0, 50, (3, 5, 6), generator=seeded())
    assert book.embed(tokens).shape == (3, 4, 5, 6)
    assert torch.equal(book.nearest(book.embed(tokens)), tokens)
    far = Codebook(100.0 + 0.05 * book.embeddings)
    assert torch.equal(far.nearest(far.embed(tokens)), tokens)
    logits = torch.randn(3, 50, 60, 50, generator=seeded())  # several parts
    expected = torch.einsum("bhwv,ve->behw", (logits / 0.7).softmax(-1), book.embeddings)
    torch.testing.assert_close(book.mean(logits, 0.7), expected, atol=1e-5, rtol=1e-4)
    guided = Logits(logits, torch.zeros_like(logits), torch.tensor(1.0))
    torch.testing.assert_close(book.mean(guided), book.mean(2 * logits))


def test_the_mean_is_differentiable() -> None:
    logits = torch.randn(1, 2, 3, generator=seeded(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: CODEBOOK.mean(value, 0.8), logits)


def test_the_loss_is_cross_entropy_and_its_minimum_the_posterior() -> None:
    logits, tokens = (
        torch.randn(4, 5, 6, 3, generator=seeded()),
        torch.randint(0, 3, (4, 5, 6), generator=seeded()),
    )
    expected = torch.nn.functional.cross_entropy(logits.movedim(-1, 1), tokens, reduction="none").mean((1, 2))
    torch.testing.assert_close(CODEBOOK.loss(logits, tokens), expected)
    weight = torch.tensor([0.0, 1.0, 2.0, 3.0])
    torch.testing.assert_close(CODEBOOK.loss(logits, tokens, weight=weight), weight * expected)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"shape \(3,\)"):
        Codebook(torch.zeros(3))
    with pytest.raises(UserError, match="not all finite"):
        Codebook(torch.full((3, 1), torch.nan))
    for call in (lambda x: CODEBOOK.mean(x), lambda x: CODEBOOK.loss(x, torch.zeros(2, 2).long())):
        with pytest.raises(UserError, match="logits over 4 tokens, but the codebook has 3"):
            call(torch.zeros(2, 2, 4))
    with pytest.raises(UserError, match="temperature 0"):
        CODEBOOK.mean(torch.zeros(2, 2, 3), 0.0)
    with pytest.raises(UserError, match="latents of 2 channels, but the codebook has 1"):
        CODEBOOK.nearest(torch.zeros(2, 2, 3))
    with pytest.raises(ValueError, match="vocabulary as the last dimension"):
        CODEBOOK.loss(torch.zeros(2, 5, 3), torch.zeros(2, 4).long())
    with pytest.raises(ValueError, match="one per row"):
        CODEBOOK.loss(torch.zeros(2, 5, 3), torch.zeros(2, 5).long(), weight=torch.ones(3))
