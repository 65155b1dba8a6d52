"""A checkpoint on any path, with any prediction, samples with any solver: the exact network of one Gaussian."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from latentflow.errors import UserError
from latentflow.flow import PATHS, PREDICTIONS, SOLVERS, make
from latentflow.pipeline import LatentFlowPipeline

from .conftest import quiet, tiny_vae

MEAN, STD = 0.75, 0.5
EVERY = [(path, prediction) for path in PATHS for prediction in PREDICTIONS]


class GaussianOnPath(ModelMixin, ConfigMixin):
    """The exact prediction of data N(MEAN, STD^2), on any path: the flow carries x0 to MEAN + STD x0."""

    @register_to_config
    def __init__(
        self, path: str, prediction: str, mistake: float = 0.0, in_channels: int = 2, sample_size: int = 4
    ) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.largest = 0.0

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        self.largest = max(self.largest, float(x.abs().max()))
        c = make(PATHS, self.config.path, "path").at(t.double(), x.double())
        xt = x.double() * (1 + c.sigma**2).sqrt() if self.config.path == "variance-exploding" else x.double()
        score = -(xt - c.alpha * MEAN) / ((c.alpha * STD) ** 2 + c.sigma**2)
        data, noise = MEAN - c.alpha * STD**2 * score, -c.sigma * score
        velocity = c.d_alpha * data + c.d_sigma * noise
        exact = {"data": data, "noise": noise, "score": score, "velocity": velocity}[self.config.prediction]
        return (exact + self.config.mistake * torch.sin(20 * x)).to(x.dtype)


def pipeline(path: str, prediction: str, **options: Any) -> LatentFlowPipeline:
    return quiet(
        LatentFlowPipeline(
            tiny_vae(), GaussianOnPath(path, prediction), path=path, prediction=prediction, **options
        )
    )


def error(pipe: LatentFlowPipeline, **arguments: Any) -> Tensor:
    """How far samples end from where the exact flow ends, in units of STD."""
    x0 = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    arguments = {"num_images_per_prompt": 3, "output_type": "latent", "num_inference_steps": 20} | arguments
    end: Tensor = pipe(latents=x0, generator=torch.Generator().manual_seed(1), **arguments).images
    return (end - MEAN - STD * x0).abs() / STD


@pytest.mark.parametrize(("path", "prediction"), EVERY)
def test_every_path_and_prediction_ends_at_the_data(path: str, prediction: str) -> None:
    pipe = pipeline(path, prediction)
    assert error(pipe).max() < 0.02
    assert pipe.transformer.largest < 6  # what the network sees has about unit variance


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", ["condot", "variance-preserving"])
def test_a_network_that_errs_a_little_is_not_made_to_err_much(path: str, prediction: str) -> None:
    """Every conversion divides by something that vanishes at an end of time: no sample may show it."""
    network = GaussianOnPath(path, prediction, mistake=0.02)
    pipe = quiet(LatentFlowPipeline(tiny_vae(), network, path=path, prediction=prediction))
    assert error(pipe).max() < 0.2


@pytest.mark.parametrize("solver", [name for name, solver in SOLVERS.items() if not solver.stochastic])
@pytest.mark.parametrize(
    ("path", "prediction"), [("variance-preserving", "noise"), ("trigonometric", "data")]
)
def test_every_solver_follows_another_path(solver: str, path: str, prediction: str) -> None:
    assert error(pipeline(path, prediction), solver=solver).max() < (
        0.3 if SOLVERS[solver].order == 1 else 0.05
    )


@pytest.mark.parametrize("solver", [name for name, solver in SOLVERS.items() if solver.stochastic])
def test_stochastic_solvers_reach_the_same_distribution(solver: str) -> None:
    pipe = pipeline("variance-preserving", "noise")
    drawn = pipe(
        num_images_per_prompt=500,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        num_inference_steps=50,
        solver=solver,
    ).images  # 16,000 numbers: standard errors 0.004 and 0.003, and the bias of 50 steps
    assert abs(drawn.mean() - MEAN) < 0.03
    assert abs(drawn.std() - STD) < 0.05


def test_a_diffusers_scheduler_steps_a_model_of_another_path() -> None:
    """The scheduler knows the straight path only; the model is carried over to it."""
    pipe = pipeline("variance-preserving", "noise", scheduler=FlowMatchEulerDiscreteScheduler())
    assert error(pipe, num_inference_steps=100).max() < 0.1


def test_path_and_prediction_are_saved_with_the_checkpoint(tmp_path: Path) -> None:
    pipe = pipeline("variance-preserving", "noise", path_options={"beta_max": 12.0})
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    config = LatentFlowPipeline.load_config(tmp_path)
    assert (config["path"], config["path_options"]) == ("variance-preserving", {"beta_max": 12.0})
    assert config["prediction"] == "noise"
    shell = LatentFlowPipeline(
        tiny_vae(), None, **{k: config[k] for k in ("path", "path_options", "prediction")}
    )
    assert shell.path == pipe.path


def test_a_checkpoint_that_says_nothing_is_velocity_on_the_straight_path(dit_folder: Path) -> None:
    pipe = LatentFlowPipeline.from_pretrained(dit_folder)
    assert pipe.path == PATHS["condot"]()
    assert pipe.config.prediction == "velocity"


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"(?s)unknown path 'variance-preservin'.*variance-preserving"):
        pipeline("variance-preservin", "noise")
    with pytest.raises(UserError, match=r"(?s)unknown prediction 'nose'.*noise"):
        pipeline("condot", "nose")
    with pytest.raises(UserError, match=r"(?s)beta_mox.*beta_max"):
        pipeline("variance-preserving", "noise", path_options={"beta_mox": 1.0})
