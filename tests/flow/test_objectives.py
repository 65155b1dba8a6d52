from __future__ import annotations

import math

import pytest
import torch

from latentflow.errors import UserError
from latentflow.flow import OBJECTIVES, PREDICTIONS, CondOT, VariancePreserving, convert

LOSS = OBJECTIVES["flow-matching"]
#: those that need nothing but the sample
PLAIN = [name for name, objective in OBJECTIVES.items() if not objective.average]


def sample_with_velocity(velocity: torch.Tensor):
    return CondOT().sample(torch.zeros_like(velocity), velocity, 0.5)


@pytest.mark.parametrize("name", PLAIN)
def test_an_objective_is_least_at_the_velocity_row_by_row_in_float32(name, draw) -> None:
    loss, sample = OBJECTIVES[name], sample_with_velocity(draw(4, 2, 4, 4).float())
    output = draw(4, 2, 4, 4).float()
    exact = sample.velocity.clone().requires_grad_()
    least = loss(exact, sample)
    least.sum().backward()
    torch.testing.assert_close(exact.grad, torch.zeros_like(exact))
    together = loss(output, sample)
    assert together.shape == (4,) and (together > least).all()
    alone = [loss(output[i : i + 1], sample_with_velocity(sample.velocity[i : i + 1])) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))
    half = loss(output.bfloat16(), sample)
    assert half.dtype == torch.float32
    assert torch.equal(half, loss(output.bfloat16().float(), sample))
    with pytest.raises(ValueError, match=r"returned shape \(4, 8, 4, 4\) for a velocity of shape \(4, 2,"):
        loss(torch.zeros(4, 8, 4, 4), sample)


def test_by_hand() -> None:
    # Two rows, two channels, two positions. Row 0 is off by 1 in channel 0, by 2 in channel 1: (1 + 4) / 2.
    target = torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[3.0, 3.0], [4.0, 4.0]]])
    prediction = torch.tensor([[[0.0, 0.0], [2.0, 2.0]], [[3.0, 3.0], [4.0, 4.0]]])
    sample = sample_with_velocity(target)
    assert LOSS(prediction, sample).tolist() == [2.5, 0.0]
    # Row 0 is at right angles to the target over channels (1 - cos = 1), row 1 points the same way.
    torch.testing.assert_close(LOSS(prediction, sample, direction_weight=0.5), torch.tensor([3.0, 0.0]))


def test_the_direction_is_a_cosine_over_channels_at_each_position(draw) -> None:
    def direction(output: list, velocity: list) -> torch.Tensor:
        output, sample = torch.tensor(output), sample_with_velocity(torch.tensor(velocity))
        alone = LOSS(output, sample, direction_weight=1.0) - LOSS(output, sample)
        # Weights are those of the squared error alone.
        weighted = LOSS(output, sample, direction_weight=1.0, weight=torch.zeros(len(output)))
        torch.testing.assert_close(weighted, alone)
        return weighted

    # (B=1, C=2, W=2): along (1, 0) at both positions, then opposite at the second: 1 - cos = 0, 2.
    found = direction([[[1.0, -1.0], [0.0, 0.0]]], [[[1.0, 1.0], [0.0, 0.0]]])
    torch.testing.assert_close(found, torch.tensor([1.0]))
    found = direction([[1.0, 1.0]], [[1.0, 0.0]])  # vectors have one too
    torch.testing.assert_close(found, torch.tensor([1 - math.sqrt(0.5)]))
    velocity = draw(3, 4, 2, 2)  # its length does not count
    found = direction((2 * velocity).tolist(), velocity.tolist())
    torch.testing.assert_close(found, torch.zeros(3), atol=1e-6, rtol=0)


def sample_on(path, draw, rows=4):
    t = torch.linspace(0.2, 0.9, rows, dtype=torch.float64)
    return path.sample(draw(rows, 3, 2), draw(rows, 3, 2), t)


def test_targets_by_hand() -> None:
    # t = 0.25 on the straight path: xt = 0.25 * 5 + 0.75 * 1 = 2, sigma = 0.75.
    x0, x1 = torch.tensor([[1.0]]), torch.tensor([[5.0]])
    sample = CondOT().sample(x0, x1, 0.25)
    for prediction, target in {"velocity": 4.0, "data": 5.0, "noise": 1.0, "score": -1 / 0.75}.items():
        loss = LOSS(torch.zeros(1, 1), sample, prediction=prediction)
        torch.testing.assert_close(loss, torch.tensor([target**2]))
    end = CondOT().sample(x0, x1, 1.0)  # at the data sigma counts as 1e-3
    assert LOSS(torch.zeros(1, 1), end, prediction="score").tolist() == pytest.approx([1e6])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_is_the_true_velocity_in_another_form(path, prediction, draw) -> None:
    sample = sample_on(path, draw)
    target = convert(sample.velocity, sample.xt, sample.t, path, "velocity", prediction).requires_grad_()
    loss = LOSS(target, sample, path=path, prediction=prediction)
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-15, rtol=0)
    direction = 1.0 if prediction == "velocity" else 0.0
    LOSS(target, sample, path=path, prediction=prediction, direction_weight=direction).sum().backward()
    torch.testing.assert_close(target.grad, torch.zeros_like(target), atol=1e-9, rtol=0)
    off = LOSS(target + 0.5, sample, path=path, prediction=prediction)
    torch.testing.assert_close(off, torch.full_like(loss, 0.25), atol=1e-8, rtol=0)


def test_ddpm_is_a_configuration(draw) -> None:
    """Noise prediction on the variance-preserving path: |epsilon - network(sqrt(a) x1 + sqrt(1 - a) epsilon)|^2."""
    x1, noise, t = draw(5, 2, 3), draw(5, 2, 3), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    back = 1 - t  # its time runs from the data
    bar = torch.exp(-(0.1 * back + (20.0 - 0.1) * back**2 / 2))[:, None, None]

    def network(x):
        return torch.tanh(x)

    by_hand = (noise - network(bar.sqrt() * x1 + (1 - bar).sqrt() * noise)).square().mean((1, 2))
    path = VariancePreserving()
    sample = path.sample(noise, x1, t)
    loss = LOSS(network(sample.xt), sample, path=path, prediction="noise")
    torch.testing.assert_close(loss, by_hand, rtol=1e-10, atol=0)
    # Score matching with the weight sigma^2 is the same loss (Song et al. 2020, arXiv:2011.13456, sec. 3.3).
    score = -network(sample.xt) / (1 - bar).sqrt()
    weighted = LOSS(score, sample, path=path, prediction="score", weight=(1 - bar).flatten())
    torch.testing.assert_close(weighted, by_hand, rtol=1e-10, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weights_multiply_the_squared_errors_of_their_row(prediction, draw) -> None:
    sample, output, weight = sample_on(CondOT(), draw), draw(4, 3, 2), torch.tensor([0.0, 1.0, 2.0, 0.5])
    plain, weighted = (
        LOSS(output, sample, prediction=prediction, contrastive_weight=0.1, weight=w) for w in (None, weight)
    )
    torch.testing.assert_close(weighted, weight.double() * plain)


def test_contrast_by_hand() -> None:
    # Velocities 1, 2 and 6, outputs 0; the row before row 0 is row 2: squares 1, 4, 36, of the other rows 36, 1, 4.
    velocity = torch.tensor([[1.0], [2.0], [6.0]])
    loss = LOSS(torch.zeros(3, 1), sample_with_velocity(velocity), contrastive_weight=0.5)
    torch.testing.assert_close(loss, torch.tensor([1 - 18.0, 4 - 0.5, 36 - 2.0]))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_other_target_is_taken_at_the_rows_own_time(path, prediction, draw) -> None:
    sample = sample_on(path, draw)
    output = draw(4, 3, 2)
    at_once = LOSS(output, sample, path=path, prediction=prediction, contrastive_weight=0.25)
    plain = LOSS(output, sample, path=path, prediction=prediction)
    for i in range(4):
        other = path.sample(sample.x0[i - 1 : i or None], sample.x1[i - 1 : i or None], sample.t[i])
        contrast = LOSS(output[i : i + 1], other, path=path, prediction=prediction)
        torch.testing.assert_close(at_once[i : i + 1], plain[i : i + 1] - 0.25 * contrast)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_optimum_is_the_marginal_velocity_less_the_mean_that_is_contrasted(
    gaussian, draw, weight
) -> None:
    """The best linear prediction is (u - weight E[velocity]) / (1 - weight), u the marginal velocity."""
    x0, x1, t = draw(100_000, 1), 1.5 + 0.4 * draw(100_000, 1), torch.tensor(0.6, dtype=torch.float64)
    sample = CondOT().sample(x0, x1, t)
    coefficients = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    design = torch.cat([sample.xt, torch.ones_like(sample.xt)], dim=1)
    loss = LOSS(design @ coefficients, sample, contrastive_weight=weight).mean()
    (gradient,) = torch.autograd.grad(loss, coefficients)
    best = -torch.linalg.solve(2 * (1 - weight) * design.T @ design / len(design), gradient)  # a quadratic
    exact = (gaussian.velocity(CondOT(), sample.xt, t) - weight * 1.5) / (1 - weight)
    # The standard error of a prediction is about std(residual) / sqrt(rows) / (1 - weight) = 0.005.
    torch.testing.assert_close(design @ best, exact, atol=0.03, rtol=0)


SETTINGS = [
    {},
    {"direction_weight": 0.7},
    {"contrastive_weight": 0.2},
    {"prediction": "noise", "contrastive_weight": 0.2},
    {"prediction": "score"},
    {"prediction": "data", "weight": torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)},
]


@pytest.mark.parametrize("options", SETTINGS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("path", [CondOT(), VariancePreserving()], ids=repr)
def test_gradients_are_those_of_finite_differences(path, options, draw) -> None:
    sample = sample_on(path, draw, rows=3)
    output = draw(3, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda output: LOSS(output, sample, path=path, **options), output)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prediction": "nois"}, UserError, "(?s)unknown prediction 'nois'.*did you mean 'noise'"),
        (
            {"prediction": "noise", "direction_weight": 1.0},
            UserError,
            "direction weight 1.0 .* predicts the noise",
        ),
        *(
            ({"contrastive_weight": bad}, UserError, f"contrastive weight {bad}")
            for bad in (1.0, -0.1, float("nan"))
        ),
        ({"weight": torch.ones(2, 1)}, ValueError, r"weight has shape \(2, 1\): pass one per row, \(2,\)"),
        ({"weight": torch.ones(())}, ValueError, r"weight has shape \(\)"),
        ({"directon_weight": 1.0}, TypeError, "directon_weight"),
    ],
)
def test_bad_options_are_named(options, error, message) -> None:
    sample = sample_with_velocity(torch.ones(2, 3))
    with pytest.raises(error, match=message):
        LOSS(torch.zeros(2, 3), sample, **options)
    with pytest.raises(ValueError, match=r"1 row: .* at least 2 rows"):
        LOSS(torch.zeros(1, 3), sample_with_velocity(torch.ones(1, 3)), contrastive_weight=0.05)
