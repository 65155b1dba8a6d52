"""What the velocity network is asked for: every choice of `FlowConfig`, on data that are one known point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from latentflow import LatentFlowPipeline
from latentflow.config import FlowConfig
from latentflow.errors import UserError
from latentflow.flow import COUPLINGS, PATHS, PREDICTIONS, TIME_DENSITIES, WEIGHTINGS
from latentflow.flow.tensors import expand_t
from latentflow.training.loop.data_order import SampleUse
from latentflow.training.losses.average_velocity import OneStepLoss
from latentflow.training.losses.flow import FlowLoss, validation_loss

from .command import TINY, call

ROWS = 12
POINT = torch.linspace(-1.0, 1.0, 2 * 3 * 3).view(1, 2, 3, 3)
TRAINABLE = [name for name in COUPLINGS if name != "data-dependent"]


class Exact(nn.Module):
    """Knows the data, so it can predict exactly; remembers what it saw."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config, self.path = config, config.choices().path

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        self.seen, self.cond = x, cond
        c = self.path.at(t, x)
        xt = x * (1 + c.sigma**2).sqrt() if self.config.path == "variance-exploding" else x
        noise = (xt - c.alpha * POINT) / self.path.sigma(expand_t(t, x))
        known = {
            "data": POINT.expand_as(x),
            "noise": noise,
            "velocity": c.d_alpha * POINT + c.d_sigma * noise,
        }
        return known[self.config.prediction] if self.config.prediction != "score" else -noise / c.sigma


def batch(rows: int = ROWS) -> dict[str, Any]:
    latents = POINT.expand(rows, -1, -1, -1).clone()
    return {"latents": latents, "sample_ids": list(range(rows)), "class_labels": torch.arange(rows) % 3}


def stage(**choices: Any) -> FlowLoss:
    config = FlowConfig(**choices)
    return FlowLoss(Exact(config), config, seed=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_the_exact_prediction_has_no_loss(path: str, prediction: str) -> None:
    result = stage(path=path, prediction=prediction)(batch())
    assert result["loss"] < 1e-4
    wrong = stage(path=path, prediction=prediction)
    wrong.network.register_forward_hook(lambda module, given, output: 1.5 * output + 0.1)
    assert wrong(batch())["loss"] > 1e-3


@pytest.mark.parametrize("path", PATHS)
def test_what_the_network_sees_has_about_unit_variance(path: str) -> None:
    one = stage(path=path, time_density="uniform")
    one(batch(256))
    assert 0.2 < one.network.seen.std() < 1.5


@pytest.mark.parametrize("coupling", TRAINABLE)
@pytest.mark.parametrize("density", TIME_DENSITIES)
def test_every_coupling_and_density_trains_and_repeats_itself(coupling: str, density: str) -> None:
    choices = {"coupling": coupling, "time_density": density}
    first, second = (stage(**choices)(batch()) for _ in range(2))
    assert torch.equal(first["t"], second["t"])
    assert first["loss"] < 1e-4


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_weighting_means_the_same_for_every_prediction(weighting: str) -> None:
    """An error of the noise by 0.1, made through each prediction, costs the same."""

    def loss(prediction: str) -> Tensor:
        one = stage(path="trigonometric", prediction=prediction, weighting=weighting)
        path = one.network.path

        def off(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            t = given[1].double()
            c = path.at(t, output.double())
            error = {
                "noise": torch.ones_like(c.alpha),
                "data": -c.sigma / c.alpha,
                "velocity": c.d_sigma - c.d_alpha * c.sigma / c.alpha,
                "score": -1 / c.sigma,
            }[prediction]
            return output.double() + 0.1 * error

        one.network.register_forward_hook(off)
        return one(batch())["per_sample"]

    expected = loss("noise")
    for prediction in PREDICTIONS:
        torch.testing.assert_close(loss(prediction), expected, rtol=2e-3, atol=1e-6)


def test_the_default_is_the_loss_that_shipped_checkpoints_were_trained_with() -> None:
    """Straight path, independent noise, logit-normal t, velocity MSE: written out."""
    one = stage()
    one.network.register_forward_hook(lambda module, given, output: torch.zeros_like(output))
    result = one(batch())
    x0 = (one.network.seen - result["t"].view(-1, 1, 1, 1) * POINT) / (1 - result["t"].view(-1, 1, 1, 1))
    torch.testing.assert_close(
        result["per_sample"], (POINT - x0).square().mean((1, 2, 3)).float(), rtol=1e-3, atol=1e-4
    )


def test_the_data_are_samples_of_the_posterior() -> None:
    """The best prediction where a latent has a deviation of its own: its loss is the conditional variance, and the
    gradient with respect to a factor on it and a shift of it is zero."""
    rows, spread = 4000, 1.5
    one = stage(time_density="uniform")
    factor, shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def variance_and_slope(t: Tensor) -> tuple[Tensor, Tensor]:
        """Of x1 - x0, x1 ~ N(POINT, spread^2), x0 ~ N(0, 1), given t x1 + (1 - t) x0."""
        whole, shared = (t * spread).square() + (1 - t).square(), t * spread**2 - (1 - t)
        return spread**2 + 1 - shared.square() / whole, shared / whole

    def best(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        t = expand_t(given[1], given[0])
        return (POINT + variance_and_slope(t)[1] * (given[0] - t * POINT)) * factor + shift

    one.network.register_forward_hook(best)
    given = batch(rows)
    result = one(given | {"latents_std": torch.full_like(given["latents"], spread)})
    variance, _ = variance_and_slope(result["t"])
    assert float((result["per_sample"] / variance).mean()) == pytest.approx(1.0, abs=0.02)
    result["loss"].backward()
    assert abs(float(factor.grad)) < 0.05 and abs(float(shift.grad)) < 0.05
    plain = one(given)["per_sample"] / variance  # of the mean alone it would be another
    assert abs(float(plain.mean()) - 1) > 0.1


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
def test_as_many_conditions_as_asked_are_dropped_in_training_and_none_in_validation(dropout: float) -> None:
    rows, one = 4000, stage(condition_dropout=dropout)
    t = one(batch(rows))["t"]
    dropped = one.network.cond.drop
    assert float(dropped.double().mean()) == pytest.approx(
        dropout, abs=5 * (0.25 / rows) ** 0.5 * (dropout > 0)
    )
    if dropout:  # whichever their times are
        assert float(t[dropped].mean() - t[~dropped].mean()) == pytest.approx(0.0, abs=0.05)
    again = one(batch(rows) | {"sample_ids": list(range(rows, 2 * rows))})
    assert "loss" in again and (not dropout or not torch.equal(dropped, one.network.cond.drop))
    one.eval()(batch(rows))
    assert not one.network.cond.drop.any()


def test_a_one_step_student_learns_the_way_from_the_noise_of_its_pair() -> None:
    config = FlowConfig()
    one = OneStepLoss(Exact(config), config, seed=0)
    one.network.register_forward_hook(lambda module, given, output: torch.zeros_like(output))
    noise = torch.randn(ROWS, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    result = one(batch() | {"noise": noise})
    assert torch.equal(result["t"], torch.zeros_like(result["t"])) and torch.equal(one.network.seen, noise)
    torch.testing.assert_close(result["per_sample"], (POINT - noise).square().mean((1, 2, 3)))


def test_every_batch_is_paired_by_chances_of_its_own() -> None:
    seeds = []

    def spy(x0: Tensor, x1: Tensor, condition: Tensor | None, generator: torch.Generator) -> Tensor:
        seeds.append(generator.initial_seed())
        return x0

    one = stage()
    one.coupling = spy
    for start in (0, ROWS, 0):
        one(batch() | {"sample_ids": list(range(start, start + ROWS))})
    assert seeds[0] == seeds[2] != seeds[1]


def test_padding_of_captions_says_nothing() -> None:
    torch.manual_seed(0)
    encoder = T5EncoderModel(
        T5Config(vocab_size=9, d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1)
    ).eval()
    one = FlowLoss(Exact(FlowConfig()), FlowConfig(), seed=0, text_encoder=encoder)
    rows = [[3, 4, 5, 6, 1], [7, 1], [8, 2, 1]]
    ids, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for row, words in enumerate(rows):
        ids[row, : len(words)], mask[row, : len(words)] = torch.tensor(words), 1
    told = one.prompts({"input_ids": ids, "attention_mask": mask})
    assert told.text is not None and told.text_mask is not None
    assert told.text.shape == (3, 8, 8) and told.text_mask.sum(1).tolist() == [5, 2, 3]
    means = one.compared_by(told)
    assert means is not None
    for row, words in enumerate(rows):
        alone = encoder(input_ids=torch.tensor([words])).last_hidden_state[0]
        torch.testing.assert_close(told.text[row, : len(words)], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(means[row], alone.mean(0), rtol=1e-4, atol=1e-5)


def test_validation_is_the_mean_over_all_rows_at_fixed_noises() -> None:
    """Also of the last, smaller batch; and the same each time."""

    class Rows:
        def __len__(self) -> int:
            return 7

        def __getitems__(self, draws: list[SampleUse]) -> dict[str, Any]:
            latents = torch.stack([POINT[0] * (1 + draw.index) for draw in draws])
            return {"latents": latents, "class_labels": torch.zeros(len(draws), dtype=torch.long)}

    one = stage().eval()
    data: Any = Rows()
    draws = [SampleUse(index, index * 4 + k) for index in range(7) for k in range(4)]
    expected = one(data.__getitems__(draws) | {"sample_ids": [draw.sample_id for draw in draws]})[
        "per_sample"
    ]
    for size in (64, 5):
        found = validation_loss(one, data, torch.device("cpu"), batch_size=size)
        assert found == pytest.approx(float(expected.double().mean()), rel=1e-5)


def test_conditional_ot_is_told_the_classes() -> None:
    """Noise may only change places within a class: each class keeps the set of its noises."""
    plain, paired = stage(coupling="independent"), stage(coupling="conditional-ot", path="condot")
    given = batch() | {"latents": torch.randn(ROWS, 2, 3, 3, generator=torch.Generator().manual_seed(1))}
    seen = {}
    for name, one in (("plain", plain), ("paired", paired)):
        t = one(given)["t"].float().view(-1, 1, 1, 1)
        seen[name] = (one.network.seen - t * given["latents"]) / (1 - t)
    assert not torch.allclose(seen["plain"], seen["paired"], atol=1e-3)
    for label in range(3):
        rows = given["class_labels"] == label
        before, after = (
            torch.sort(seen[name][rows].flatten(1).sum(1)).values for name in ("plain", "paired")
        )
        torch.testing.assert_close(before, after, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"path": "condott"}, "unknown path 'condott'"),
        ({"path": "variance-preserving", "path_options": {"beta": 3.0}}, "option of path"),
        ({"prediction": "epsilon"}, "unknown prediction 'epsilon'"),
        ({"coupling": "optimal-transport"}, "unknown coupling"),
        (
            {"coupling": "sinkhorn", "coupling_options": {"regularization": -1.0}},
            "regularization must be positive",
        ),
        ({"prediction": "noise", "direction_weight": 0.1}, "direction_weight with prediction 'noise'"),
        ({"contrastive_weight": 1.0}, "contrastive_weight 1.0"),
        ({"coupling": "data-dependent"}, "starts from the known part"),
        ({"mask_shapes": {"rectangel": 1.0}}, "(?s)'rectangel'.*'rectangle'"),
        ({"weighting": "sigmoids"}, "(?s)unknown weighting 'sigmoids'.*'sigmoid'"),
        ({"weighting_options": {"bias": 1.0}}, "without a weighting"),
        ({"time_density": "logitnormal"}, "(?s)'logitnormal'.*'logit-normal'"),
        ({"time_uniform_from": 1.5}, "time_uniform_from 1.5"),
        ({"time_options": {"std": -1.0}, "time_density": "logit-normal"}, "std"),
    ],
)
def test_choices_that_cannot_work_are_refused_at_once(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FlowConfig(**choices)


def test_a_diffusion_model_is_one_line(images: Path, tmp_path: Path) -> None:
    """The real command: noise prediction on the VP path, weighted; the pipeline knows, and so does fine-tuning."""
    choices = ["--path", "variance-preserving", "--path-options", "beta_max", "12", "--prediction", "noise"]
    more = ["--weighting", "sigmoid", "--coupling", "conditional-ot", "--contrastive-weight", "0.05"]
    line = [images, *TINY, "--max-train-steps", 2, "--checkpointing-steps", 2]
    call(tmp_path / "cache", *line, "-o", tmp_path / "run", *choices, *more)
    pipe = LatentFlowPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.path == PATHS["variance-preserving"](beta_max=12.0)
    assert pipe.config.prediction == "noise"
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=3, solver="ddpm").images[0].size == (16, 16)

    again = [*line, "-o", tmp_path / "again", "--init-from", tmp_path / "run" / "pipeline"]
    said = call(tmp_path / "cache", *again, "--prediction", "velocity", expect=2)
    assert "was trained with prediction noise" in said and "--prediction noise" in said
    call(tmp_path / "cache", *again)
    assert LatentFlowPipeline.from_pretrained(tmp_path / "again" / "pipeline").path == pipe.path


def test_validation_has_no_contrastive_term() -> None:
    """Its rows are several noises of one image: no row is another's negative."""
    one = stage(contrastive_weight=0.5)
    assert one(batch())["loss"] < -0.1
    assert abs(one.eval()(batch())["loss"]) < 1e-4


def test_late_times_are_uniform_each_by_its_own_number() -> None:
    config = FlowConfig(time_uniform_from=0.75, time_options={"mean": 0.5, "shift": 2.0})
    late = FlowLoss(Exact(config), config, seed=0, samples=4000)
    usual, uniform = (
        stage(time_density=name, time_options={"shift": 2.0} | more)
        for name, more in (("logit-normal", {"mean": 0.5}), ("uniform", {}))
    )
    rows = batch() | {
        "sample_ids": list(range(3000 - ROWS // 2, 3000 + ROWS // 2))
    }  # the change falls into a batch
    t, before, after = (one(rows)["t"] for one in (late, usual, uniform))
    half = ROWS // 2
    assert torch.equal(t[:half], before[:half]) and torch.equal(t[half:], after[half:])
    assert not torch.equal(before[half:], after[half:])
    # Another micro-batch, and so another number of processes, changes nothing; validation stays what it was.
    alone = batch(1) | {"sample_ids": rows["sample_ids"][-1:]}
    assert torch.equal(late(alone)["t"], t[-1:])
    assert torch.equal(late.eval()(rows)["t"], before)


def test_a_weighting_means_the_same_before_and_after_the_change_of_times() -> None:
    """What a sample's loss is divided by is the density that its own time was drawn from."""
    config = FlowConfig(weighting="sigmoid", time_density="logit-normal", time_uniform_from=0.5)
    late = FlowLoss(Exact(config), config, seed=0, samples=2 * ROWS)
    uniform = stage(weighting="sigmoid", time_density="uniform")
    for one in (late, uniform):
        one.network.register_forward_hook(lambda module, given, output: output + 0.1)
    rows = batch() | {"sample_ids": list(range(ROWS, 2 * ROWS))}
    torch.testing.assert_close(late(rows)["per_sample"], uniform(rows)["per_sample"])


def test_earlier_runs_do_not_know_new_settings_and_go_on() -> None:
    assert not {"time_uniform_from", "objective_options"} & FlowConfig().describe().keys()
    assert FlowConfig(time_uniform_from=0.8).describe()["time_uniform_from"] == 0.8
    assert FlowConfig().describe()["path"] == "condot"
