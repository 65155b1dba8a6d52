"""Training average velocities: what a step computes, how a velocity model is extended, and what the pipeline does."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentflow import LatentFlowPipeline
from latentflow.config import FineTuningConfig, FlowConfig, LoopConfig
from latentflow.errors import UserError
from latentflow.flow import MeanFlow, total_derivative
from latentflow.models import Condition
from latentflow.training.fine_tune.base import with_base_flow
from latentflow.training.fine_tune.prior import prior_prompts
from latentflow.training.losses import flow_loss
from latentflow.training.losses.average_velocity import AverageVelocityLoss, refuse_unfit
from latentflow.training.losses.flow import FlowLoss
from latentflow.training.trained_model import _copy_weights

from ..models.tiny import build
from .command import TINY, call

ROWS = 24


def network(**arguments: Any) -> Any:
    usual = {"num_classes": 3, "time_scale": 1.0, "interval_conditioning": True}
    return build("dit", **(usual | arguments))


def stage(one: Any = None, **options: float) -> AverageVelocityLoss:
    config = FlowConfig(objective="mean-flow", objective_options=options)
    made = flow_loss(one or network(), config, 0)
    assert isinstance(made, AverageVelocityLoss)
    return made


def batch(numbers: list[int] | None = None) -> dict[str, Any]:
    numbers = list(range(ROWS)) if numbers is None else numbers
    g = torch.Generator().manual_seed(5)
    latents = torch.randn(ROWS, 4, 4, 4, generator=g)
    labels = torch.arange(ROWS) % 3
    return {"latents": latents[numbers], "sample_ids": numbers, "class_labels": labels[numbers]}


def test_a_sample_is_a_pure_function_of_its_number() -> None:
    """The same loss in any company, and gradients that are the mean of the parts'."""
    one = stage(share=0.5, guidance=2.0, mixing=0.3)
    together = one(batch())
    parts = [one(batch(numbers)) for numbers in (list(range(7)), list(range(7, ROWS)))]
    for name in ("per_sample", "t"):
        torch.testing.assert_close(
            torch.cat([part[name] for part in parts]), together[name], rtol=1e-4, atol=1e-6
        )


def test_what_is_minimised_and_what_is_shown() -> None:
    result = stage(power=1.0)(batch())
    error = result["per_sample"]
    torch.testing.assert_close(result["loss"], (error / (error + 1e-3)).mean())
    torch.testing.assert_close(result["error"], error.mean())
    torch.testing.assert_close(stage(power=0.0)(batch())["loss"], error.mean())


def test_the_target_is_the_identity() -> None:
    """The error of a step by finite differences along (v, 1) in place of the derivative."""
    one = stage(share=1.0)
    model, seen = one.network, {}
    inner = one.target

    def spy(sample: Any, condition: Condition, end: Tensor, progress: Any) -> Tensor:
        seen.update(sample=sample, condition=condition, end=end)
        return inner(sample, condition, end, progress)

    one.target = spy  # type: ignore[method-assign]
    per_sample = one(batch())["per_sample"]
    sample, end, condition = seen["sample"], seen["end"], seen["condition"]
    exact = copy.deepcopy(model).double()
    x, r, v, h = sample.xt.double(), sample.t, sample.velocity.double(), 2.0**-9
    with torch.no_grad():
        ahead, behind = (exact(x + s * h * v, r + s * h, condition, end=end) for s in (1, -1))
        length = (end.float() - r).view(-1, 1, 1, 1)
        target = v + length * (ahead - behind) / (2 * h)
        expected = (exact(x, r, condition, end=end) - target).square().mean((1, 2, 3))
    torch.testing.assert_close(per_sample.double(), expected, rtol=2e-2, atol=1e-3)


def test_where_no_interval_has_a_length_no_derivative_is_taken() -> None:
    one = stage(share=1e-9, power=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latentflow.flow.few_step.mean_flow.total_derivative", None)
        result = one(batch())
    plain = FlowLoss(one.network, FlowConfig(), 0)
    assert "error" not in plain(batch())
    assert torch.isfinite(result["loss"])


@pytest.mark.parametrize("options", [{}, {"guidance": 3.0, "mixing": 0.5, "improved": 1}])
def test_the_tangent_is_float32_and_weights_learn_under_autocast(
    options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = stage(share=1.0, **options)
    made: list[Tensor] = []

    def spy(*given: Any) -> Tensor:
        made.append(total_derivative(*given))
        return made[-1]

    monkeypatch.setattr("latentflow.flow.few_step.mean_flow.total_derivative", spy)
    full = one(batch())
    with torch.autocast("cpu", torch.bfloat16):
        half = one(batch())
    assert made[0].dtype == made[1].dtype == torch.float32
    if not options:  # no bfloat16 anywhere before it
        assert torch.equal(made[0], made[1])
    torch.testing.assert_close(half["per_sample"], full["per_sample"], rtol=0.2, atol=0.05)
    half["loss"].backward()
    # Autocast remembers nothing of the passes without gradients: every weight has one.
    assert all(weight.grad is not None for weight in one.network.parameters() if weight.requires_grad)


def test_a_run_resumes_bit_for_bit(images: Path, tmp_path: Path) -> None:
    """Whatever is taken together: captions, masks, guidance, the network's own velocity, bfloat16."""
    options = ["guidance", 2, "share", 0.7, "mixing", 0.4, "improved", 1]
    line = [images, *TINY, "--objective", "mean-flow", "--objective-options", *options, "--inpainting"]
    line += ["--mixed-precision", "bf16", "--lr-scheduler", "constant"]

    def losses(run: str, *stops: int) -> list[float]:
        for steps in stops:
            call(tmp_path, *line, "-o", tmp_path / run, "--max-train-steps", steps)
        rows = [json.loads(row) for row in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "loss" in row]

    assert losses("resumed", 2, 4) == losses("straight", 4)


def test_guidance_leaves_dropped_rows_alone() -> None:
    one = stage(guidance=3.0)
    g = torch.Generator().manual_seed(1)
    sample = (
        FlowConfig().choices().path.sample(*torch.randn(2, 6, 4, 4, 4, generator=g), torch.full((6,), 0.5))
    )
    condition = Condition(class_labels=torch.arange(6) % 3, drop=torch.arange(6) < 2)
    velocity = one._velocity(sample, condition, torch.ones(6, dtype=torch.bool))
    assert torch.equal(velocity[:2], sample.velocity[:2])
    null = one.network(sample.xt, sample.t, condition.unconditional())
    torch.testing.assert_close(velocity[2:], (null + 3.0 * (sample.velocity - null))[2:].detach())


def test_an_extended_velocity_model_is_that_model_over_any_length() -> None:
    old = network(interval_conditioning=False)
    new = network(seed=7)
    for parameter in new.length_embedder.mlp[2].parameters():
        torch.nn.init.zeros_(parameter)  # as it is before `build` perturbs it
    _copy_weights(old, new)
    x, t = torch.randn(3, 4, 4, 4), torch.tensor([0.1, 0.5, 0.9])
    cond = Condition(class_labels=torch.arange(3))
    for end in (None, t, 1.0):
        assert torch.equal(new(x, t, cond, end=end), old(x, t, cond))
    assert set(dict(new.named_parameters())) - set(dict(old.named_parameters())) == {
        f"length_embedder.mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    assert torch.equal(
        type(new)(interval_conditioning=True).length_embedder.mlp[2].weight, torch.zeros(256, 256)
    )
    with pytest.raises(ValueError, match="no interval_conditioning"):
        old(x, t, cond, end=1.0)


def test_the_end_matters_once_it_is_learned() -> None:
    model, x, t = network(), torch.randn(3, 4, 4, 4), torch.tensor([0.1, 0.5, 0.9])
    assert torch.equal(model(x, t), model(x, t, end=t))
    assert not torch.allclose(model(x, t), model(x, t, end=1.0), atol=1e-3)


@pytest.mark.parametrize(
    ("choices", "what"),
    [
        ({"path": "variance-preserving"}, "--path variance-preserving"),
        ({"prediction": "data"}, "--prediction data"),
        ({"weighting": "edm"}, "--weighting edm"),
        ({"direction_weight": 0.5}, "--direction-weight"),
        ({"contrastive_weight": 0.05}, "--contrastive-weight"),
        ({"objective_options": {"guidence": 3}}, "guidence"),
        ({"objective_options": {"guidance": 3}, "condition_dropout": 0.0}, "--condition-dropout 0"),
        ({"objective": "flow-matching", "objective_options": {"guidance": 3}}, "no options"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(choices: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError) as refused:
        FlowConfig(**({"objective": "mean-flow"} | choices))
    assert what in str(refused.value)


def test_networks_and_runs_that_cannot_are_refused() -> None:
    with pytest.raises(UserError, match="takes the end of an interval"):
        stage(network(interval_conditioning=False))
    with pytest.raises(UserError, match="without a condition"):
        stage(network(num_classes=None), guidance=2.0)
    config = FlowConfig(objective="mean-flow")
    with pytest.raises(UserError, match="--shard with mean-flow"):
        refuse_unfit(config, LoopConfig(shard=True))
    with pytest.raises(UserError, match="--route-share with --objective mean-flow"):
        refuse_unfit(config, LoopConfig(), routed=True)
    refuse_unfit(config, LoopConfig(), bare=True)
    refuse_unfit(FlowConfig(), LoopConfig(shard=True), routed=True)


def test_times_lean_to_the_data_whatever_else_is_said_of_them() -> None:
    def median(**choices: Any) -> float:
        half = torch.tensor([0.5], dtype=torch.float64)
        return float(FlowConfig(objective="mean-flow", **choices).choices().density.quantile(half).logit())

    assert FlowConfig(objective="mean-flow").choices().settings == MeanFlow()
    assert median() == median(time_options={"std": 0.8}) == pytest.approx(0.4)
    assert median(time_options={"mean": 0.0}) == median(time_density="logit-normal") == pytest.approx(0.0)


def test_the_command_from_scratch_and_from_a_velocity_model(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pipeline draws in four evaluations without being told, in one when asked; so does a fine-tune's."""
    velocity, scratch, tuned = tmp_path / "velocity", tmp_path / "scratch", tmp_path / "tuned"
    few = ["--max-train-steps", 2]
    bare = ["--condition", "none", "--objective", "mean-flow", "--objective-options", "guidance", 2]
    said = call(tmp_path, images, "-o", tmp_path / "bare", *TINY, *bare, expect=2)
    assert "without a condition" in said and "autoencoder" not in said  # before anything is trained
    mean_flow = ["--objective", "mean-flow", "--objective-options", "guidance", 2, "share", 0.5]
    call(tmp_path, images, "-o", scratch, *TINY, *few, *mean_flow)
    call(tmp_path, images, "-o", velocity, *TINY, *few)
    start = ["--init-from", velocity / "pipeline"]
    call(tmp_path, images, "-o", tuned, *TINY, *few, *mean_flow, *start)
    assert not LatentFlowPipeline.from_pretrained(velocity / "pipeline").few_steps.average
    assert "average" not in (velocity / "pipeline" / "model_index.json").read_text()
    assert LatentFlowPipeline.from_pretrained(scratch / "pipeline").transformer.config.time_scale == 1.0
    pipe = LatentFlowPipeline.from_pretrained(tuned / "pipeline")
    assert pipe.few_steps.average and pipe.usual_guidance == 1.0 and pipe.usual_steps == 4
    ends: list[float] = []
    inner = type(pipe.transformer).forward

    def forward(self: Any, x: Tensor, t: Tensor, cond: Any = None, **more: Any) -> Any:
        ends.append(float(more["end"][0]) if "end" in more else -1.0)
        return inner(self, x, t, cond, **more)

    monkeypatch.setattr(type(pipe.transformer), "forward", forward)
    pipe.set_progress_bar_config(disable=True)
    for asked, expected in (({}, [0.25, 0.5, 0.75, 1.0]), ({"num_inference_steps": 1}, [1.0])):
        ends.clear()
        pipe("an image", output_type="latent", **asked)
        assert ends == expected
    ends.clear()
    pipe("an image", output_type="latent", solver="euler", num_inference_steps=2, guidance_scale=4.0)
    assert ends == [-1.0, -1.0]  # an ordinary solver follows the velocity; the guidance was learned along
    base, more = str(tuned / "pipeline"), FlowConfig(objective="mean-flow", objective_options={"share": 0.4})
    kept = with_base_flow(more, base, {"objective", "objective_options"})  # what is not said stays as it was
    assert kept.objective_options == {"guidance": 2.0, "share": 0.4}
    none, line = prior_prompts(base, FineTuningConfig(), 9, 0)
    assert none == [] and "guidance was distilled into it" in line
    with pytest.raises(UserError, match="guidance was distilled into it"):
        prior_prompts(base, FineTuningConfig(prior_samples=5), 9, 0)
    again = tmp_path / "again"  # a fine-tune of it learns average velocities without being told, guided alike
    call(tmp_path, images, "-o", again, *TINY, *few, "--init-from", tuned / "pipeline")
    assert LatentFlowPipeline.from_pretrained(again / "pipeline").config.folded_guidance == 2.0
