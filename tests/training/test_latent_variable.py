"""Training with a latent variable: what it costs, what it must bring, and the run of the real command."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from latentflow import LatentFlowEditPipeline, LatentFlowImg2ImgPipeline
from latentflow.config import FlowConfig, LatentVariableConfig
from latentflow.evaluation.sampler import VARIATIONS, Sampler
from latentflow.models import Condition, DiT
from latentflow.training import trained_model
from latentflow.training.losses import flow_loss
from latentflow.training.losses.distribution_matching import GeneratorLoss
from latentflow.training.losses.flow import FlowLoss
from latentflow.training.losses.latent_variable import LatentVariable

from .command import TINY, call, losses, opened, same_state, sampled, save_images

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


def batch(rows: int = 6) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {"latents": torch.randn(rows, 4, 4, 4, generator=generator), "sample_ids": [*range(40, 40 + rows)]}


def network(kind: str = "path", **settings: Any) -> DiT:
    torch.manual_seed(0)
    made = DiT(
        in_channels=4, width=16, depth=1, heads=2, latent_variable=kind, latent_variable_dim=3, **settings
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return made


def test_the_cost_rises_with_the_run_to_beta_times_the_rate() -> None:
    config = LatentVariableConfig(latent_variable_beta=0.5, latent_variable_warmup_steps=20)
    rate = torch.tensor([2.0, 2.0, 2.0, 4.0])
    for samples in (1000, 100_000):  # a run that goes on for longer costs the same
        latent = LatentVariable(config, samples, 10)
        assert latent.cost(rate, [0, 50, 200, 999]).tolist() == [0.0, 0.25, 1.0, 2.0]
    constant = LatentVariable(replace(config, latent_variable_warmup_steps=0), 1000, 10)
    assert constant.cost(rate, [0, 50, 200, 999]).tolist() == [1.0, 1.0, 1.0, 2.0]


def test_a_row_depends_on_its_id_alone_and_the_loss_has_its_cost() -> None:
    config = LatentVariableConfig(latent_variable_beta=0.7, latent_variable_warmup_steps=0)
    loss = FlowLoss(network(), FlowConfig(), 0, latent_variable=LatentVariable(config)).train()
    whole, part = loss(batch()), loss({name: value[2:5] for name, value in batch().items()})
    torch.testing.assert_close(whole["per_sample"][2:5], part["per_sample"])
    expected = whole["per_sample"].mean() + 0.7 * whole["kl"]
    torch.testing.assert_close(whole["loss"].detach(), expected)
    whole["loss"].backward()
    assert all(parameter.grad is not None for parameter in loss.parameters())


@pytest.mark.parametrize("objective", ["mean-flow", "shortcut", "consistency"])
def test_average_velocities_are_learned_under_it_as_well(objective: str) -> None:
    given = network("image", interval_conditioning=True)
    loss = flow_loss(given, FlowConfig(objective=objective), 0).train()
    found = loss(batch())
    found["loss"].backward()
    assert found["kl"] > 0
    assert all(parameter.grad is not None for parameter in given.z_encoder.parameters())  # type: ignore[union-attr]


def test_a_generator_is_matched_under_z_of_the_prior_and_its_encoder_stays() -> None:
    given, seen = network("image", interval_conditioning=True), []

    def teacher(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        seen.append(condition.z)
        return torch.zeros_like(x)

    options: dict[str, Any] = {"teacher": teacher, "step_counts": [1], "every": 1}
    loss = GeneratorLoss(given, FlowConfig(objective="consistency"), 0, **options).train()
    loss({**batch(2000), "sample_ids": [*range(2000)]})["loss"].backward()
    assert seen[0].shape == (2000, 3)
    torch.testing.assert_close(seen[0].std(0), torch.ones(3), atol=0.1, rtol=0.0)
    assert all(parameter.grad is None for parameter in given.z_encoder.parameters())  # type: ignore[union-attr]


def test_collapse_is_said_once_with_a_beta_to_try() -> None:
    latent = LatentVariable(LatentVariableConfig(latent_variable_beta=0.02), 1000)
    assert latent.watch(50, 0.0) == []  # beta still rises
    assert latent.watch(500, 0.3) == []
    assert "posterior collapse: KL 0.001 nats" in latent.watch(600, 0.001)[0]
    assert latent.watch(700, 0.001) == []
    assert latent.watch(800, 0.2) == []
    assert "--latent-variable-beta 0.002" in latent.watch(900, 0.01)[0]
    assert LatentVariable(LatentVariableConfig(latent_variable_beta=0.0), 1000).watch(900, 0.0) == []


def test_under_much_weight_it_is_plain_flow_matching() -> None:
    """The validation loss is that of a network without a latent variable, within half a percent."""
    from latent_variable import Perceptron, even_gaussians, fit

    found = {}
    for kind in (None, "image"):
        torch.manual_seed(0)
        one = Perceptron(2, kind, dim=2)
        fit(one, even_gaussians, steps=200, seed=0, beta=1e3, batch=128)
        loss = FlowLoss(one, FlowConfig(time_density="uniform"), 1).eval()
        held_out = even_gaussians(8000, torch.Generator().manual_seed(1))[:, :, None, None]
        with torch.no_grad():
            found[kind] = loss({"latents": held_out, "sample_ids": [*range(8000)]})
    assert found["image"]["kl"] < 1e-3
    plain = float(found[None]["per_sample"].mean())
    assert float(found["image"]["per_sample"].mean()) == pytest.approx(plain, rel=5e-3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, the same in two parts, and a checkpoint of a network without a latent variable."""
    root = tmp_path_factory.mktemp("run")
    images = save_images(root / "images", *(f"{number}.png" for number in range(12)))
    line = [
        images,
        *TINY,
        "--checkpointing-steps",
        1,
        "--latent-variable",
        "image",
        "--latent-variable-dim",
        3,
    ]
    call(root / "cache", *line, "--max-train-steps", 2, "-o", root / "run")
    call(root / "cache", *line, "--max-train-steps", 1, "-o", root / "parts")
    call(root / "cache", *line, "--max-train-steps", 2, "-o", root / "parts", "--allow-changes")
    pipe = opened(root / "run" / "pipeline")
    settings = {name: value for name, value in pipe.transformer.config.items() if name[0] != "_"}
    plain = DiT(**settings | {"latent_variable": None, "latent_variable_dim": None})
    type(pipe).from_pipe(pipe, transformer=plain).save_pretrained(root / "plain" / "pipeline")
    return root


def test_a_run_is_resumed_to_the_bit_and_its_pipeline_opens(run: Path) -> None:
    assert same_state(run / "run", run / "parts")
    assert all(torch.isfinite(torch.tensor(losses(run / "run"))))
    pipe = opened(run / "run" / "pipeline")
    assert pipe.model.latent_variable == "image"
    assert pipe.transformer.config.latent_variable_dim == 3
    assert "It also draws variations of an image" in (run / "run" / "pipeline" / "README.md").read_text()
    assert opened(run / "plain" / "pipeline").model.latent_variable is None


def awake(pipe: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if "z_encoder" not in name:  # whose variances would be large
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return pipe


def test_z_is_of_the_samples_own_generator(run: Path) -> None:
    pipe = awake(opened(run / "run" / "pipeline"))

    def drawn(*seeds: int, **settings: Any) -> Any:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sampled(pipe, generator=generators, num_images_per_prompt=len(seeds), **settings)

    both = drawn(3, 4)
    torch.testing.assert_close(drawn(4), both[1:], atol=1e-5, rtol=1e-4)
    noise = torch.zeros(2, *pipe.model.latent_shape(16, 16))
    by_z = drawn(3, 4, latents=noise)  # the same noise, and another z
    assert not torch.allclose(by_z[0], by_z[1], atol=1e-3)


def test_guidance_leads_away_from_the_null_under_the_same_z(run: Path) -> None:
    pipe = opened(run / "run" / "pipeline")
    model = type(pipe).from_pipe(pipe, transformer=network("image", num_classes=2), id2label=None).model
    z = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    rows = model.rows_of(Condition(class_labels=torch.tensor([0, 1]), z=z), 2)
    assert rows.kept["z"] is z
    x, t = model.noise(2, 16, 16, torch.Generator().manual_seed(0)), torch.tensor(0.4)
    with torch.no_grad():
        under, null = model.velocity(rows, 1.0)(x, t), model.velocity(model.unconditional(rows), 1.0)(x, t)
        torch.testing.assert_close(model.velocity(rows, 3.0)(x, t), null + 3.0 * (under - null))


def test_an_image_is_varied_by_its_own_z(run: Path) -> None:
    pipe = awake(opened(run / "run" / "pipeline"))
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        q = pipe.transformer.z_encoder(pipe.model.encode(2 * image[None] - 1))
        rows = pipe.model.with_latent_variable(
            pipe.model.unlabelled(4000), like=pipe.model.encode(2 * image[None] - 1)
        )
    z = rows.kept["z"]
    torch.testing.assert_close(z.mean(0), q.mean[0], atol=0.1, rtol=0.0)
    torch.testing.assert_close(z.std(0), (0.5 * q.log_variance[0]).exp(), atol=0.0, rtol=0.1)
    alike = partial(sampled, pipe, num_images_per_prompt=2)
    assert not torch.allclose(alike(like=image), alike(), atol=1e-3)
    settings = {"num_inference_steps": 1}
    sampler = Sampler(
        model=pipe.model, pipeline=pipe, condition_kind="nothing", settings=settings, seed=0, batch_size=2
    )
    several = sampler.sample([""] * 3, VARIATIONS, "variations", like=torch.rand(3, 3, 16, 16) * 2 - 1)
    assert several.shape == (3, 3, 16, 16)
    other = alike(like=[Image.new("RGB", (20, 20), "red")] * 2, num_images_per_prompt=1)
    assert other.shape == alike(like=image).shape and not torch.allclose(other, alike(like=image), atol=1e-3)


def test_images_are_drawn_anew_and_inverted_under_their_own_z(run: Path) -> None:
    pipe = opened(run / "run" / "pipeline")
    pipe = type(pipe).from_pipe(pipe, transformer=network("path"))
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    anew = LatentFlowImg2ImgPipeline.from_pipe(pipe)
    anew.set_progress_bar_config(disable=True)
    kept = anew(image=image, strength=0.0, output_type="latent").images
    torch.testing.assert_close(kept, pipe.encode_images(2 * image - 1))
    edit = LatentFlowEditPipeline.from_pipe(pipe)
    edit.set_progress_bar_config(disable=True)
    assert float(edit.invert(image, num_inference_steps=60).error.max()) < 0.03  # type: ignore[union-attr]
    frames = edit.interpolate(image=[*image], frames=3, num_inference_steps=60, output_type="latent").images
    torch.testing.assert_close(frames[[0, 2]], kept, atol=0.05, rtol=0.0)


def test_the_programs_draw_variations_and_refuse_what_has_no_z(run: Path) -> None:
    Image.new("RGB", (30, 20), "green").save(run / "like.png")
    draw = partial(call, run / "cache", file="../pipelines/generate")
    common = ["--like", run / "like.png", "-n", 2, "--steps", 1]
    draw("--checkpoint", run / "run" / "pipeline", *common, "-o", run / "out.png")
    assert (run / "out-2.png").is_file()
    said = draw("--checkpoint", run / "plain" / "pipeline", *common, "-o", run / "no.png", expect=2)
    assert "this checkpoint has no latent variable" in said and "--latent-variable image" in said
    said = draw("--checkpoint", run / "run" / "pipeline", "--like", run / "none.png", expect=2)
    assert "none.png" in said


def test_a_base_is_extended_and_keeps_its_own(run: Path) -> None:
    tune = [run / "images", "--resolution", 16, "--train-batch-size", 4, "--max-train-steps", 1]
    tune += ["--prior-samples", 0, "--validation", 0.2]
    base = ["--init-from", run / "plain" / "pipeline", "--latent-variable", "path", "--learning-rate", 1e-9]
    call(run / "cache", *tune, *base, "-o", run / "tuned")
    pipe, plain = (opened(run / name / "pipeline") for name in ("tuned", "plain"))
    assert pipe.model.latent_variable == "path"
    noise = torch.randn(1, *pipe.model.latent_shape(16, 16), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        sampled(pipe, latents=noise), sampled(plain, latents=noise), atol=1e-5, rtol=0.0
    )
    said = call(run / "cache", *tune, *base[:2], "--latent-variable-beta", 1, "-o", run / "other", expect=2)
    assert "neither --latent-variable nor a checkpoint that has one" in " ".join(said.split())
    own = ["--init-from", run / "run" / "pipeline", "-o", run / "other"]
    said = call(run / "cache", *tune, *own, "--latent-variable-dim", 5, expect=2)
    assert "--latent-variable-dim 5, and that of the checkpoint is 3" in said
    said = call(run / "cache", *tune, *own, "--latent-variable-warmup-steps", 5, expect=2)
    assert "--latent-variable-warmup-steps 5, and the checkpoint has a latent variable" in " ".join(
        said.split()
    )


@pytest.mark.parametrize(
    ("base", "flags", "first"),
    [("run", ["--init-from"], 1.0), ("plain", ["--latent-variable", "image", "--init-from"], 0.0)],
)
def test_the_weight_of_one_that_has_learnt_does_not_rise_again(
    run: Path, base: str, flags: list[str], first: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[LatentVariable] = []

    def make(*arguments: Any, **options: Any) -> LatentVariable:
        made.append(LatentVariable(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(trained_model, "LatentVariable", make)
    line = [run / "images", "--resolution", 16, "--max-train-steps", 100, "--prior-samples", 0, "--dry-run"]
    given = [*flags, run / base / "pipeline", "--latent-variable-beta", 0.5, "-o", run / "dry"]
    call(run / "cache", *line, *given)
    assert made[-1].cost(torch.ones(2), [0, 10**6]).tolist() == [0.5 * first, 0.5]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--latent-variable-beta", 1], "settings of a latent variable, and neither"),
        (["--latent-variable", "image", "--latent-variable-beta", -1], "--latent-variable-beta is -1"),
        (["--latent-variable", "image", "--latent-variable-dim", 0], "--latent-variable-dim is 0"),
        (
            ["--latent-variable", "path", "--latent-variable-warmup-steps", -1],
            "--latent-variable-warmup-steps is -1",
        ),
        (
            ["--latent-variable", "path", "--tokens", "--autoencoder-class", "vq"],
            "--latent-variable with --tokens",
        ),
        (
            ["--latent-variable", "path", "--init-from", "x", "--lora-rank", 4],
            "--latent-variable with --lora-rank",
        ),
    ],
)
def test_bad_flags_are_refused(flags: list[object], said: str, tmp_path: Path) -> None:
    assert said in call(tmp_path, tmp_path, "-o", tmp_path / "run", *flags, expect=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_one_step_from_noise_to_two_points() -> None:
    """Where plain flow matching goes to the mean, 1 away from either, one step under a z of the path comes near them.

    A part p of z between the two adds about p to the square of W2, and an excess of d on one side 4 d.
    """
    from latent_variable import TASKS

    measure, beta, steps = TASKS["two-points"]
    found = measure(seed=0, steps=steps, beta=beta)
    assert found["plain"] == pytest.approx(1.0, abs=0.1)
    assert found["w2"] < 0.3, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "drawn", "times"), [("eight-gaussians", "component", 3.0), ("moons", "prior", 1.5)]
)
def test_four_steps_end_nearer_than_plain_flow_matching_trained_as_long(
    task: str, drawn: str, times: float
) -> None:
    """Beyond the distance of two real sets, z of new data, or of the prior, makes it lower by a factor."""
    from latent_variable import TASKS

    measure, beta, steps = TASKS[task]
    found = measure(seed=0, steps=steps, beta=beta)
    assert times * found[drawn] < found["plain"], found
