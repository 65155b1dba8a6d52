"""`latentflow distill`: students of tiny checkpoints, by every method, through the command."""

from __future__ import annotations

import copy
import functools
import json
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import metadata_load
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from latentflow import LatentFlowImg2ImgPipeline, LatentFlowPipeline
from latentflow.config import AdapterChoice, FlowConfig
from latentflow.errors import UserError
from latentflow.flow import OBJECTIVES
from latentflow.inference.opening import open_pipeline
from latentflow.models import Condition
from latentflow.pipeline import sampling as pipeline_sampling
from latentflow.training.distill import METHODS, open_teacher
from latentflow.training.loop.random_numbers import CounterRandom
from latentflow.training.losses import flow_loss
from latentflow.training.losses.average_velocity import ProgressiveLoss, VelocityTeacher
from latentflow.training.losses.distribution_matching import FakeLoss, GeneratorLoss
from latentflow.training.losses.flow import FlowLoss
from latentflow.training.report.folder import read_run

from ..models.tiny import build
from .command import TINY, call, losses, opened, sampled, save_images

FEW = ["--max-train-steps", 2, "--train-batch-size", 4, "--lr-warmup-steps", 2, "--validation", 0.2]
PAIRS = ["--pairs", 6, "--pairs-steps", 2]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """Captions, and masks."""
    folder = tmp_path_factory.mktemp("teacher")
    call(folder, images, "-o", folder / "run", *TINY, "--max-train-steps", 2, "--inpainting")
    return folder / "run" / "pipeline"


def distill(folder: Path, *arguments: Any, expect: int = 0) -> str:
    return call(folder, *arguments, file="distill", expect=expect)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_student_that_draws_as_it_was_made_for(
    method, teacher, images, tmp_path, monkeypatch
) -> None:
    run = tmp_path / "run"
    said = distill(tmp_path, teacher, images, "-o", run, "--method", method, *FEW, *PAIRS, "--guidance", 3)
    assert "guidance 3 distilled in" in said
    pipe = opened(run / "pipeline")
    counts = (1,) if method == "one-step" else (1, 2, 4)
    assert pipe.few_steps.step_counts == counts and pipe.usual_steps == counts[-1]
    objective = METHODS[method].objective
    assert pipe.few_steps.average == OBJECTIVES[objective].average
    assert pipe.few_steps.consistency == (objective == "consistency")
    assert pipe.usual_guidance == 1.0 and pipe.config.folded_guidance == 3.0
    evaluations: list[float] = []
    pipe.transformer.register_forward_pre_hook(lambda module, given: evaluations.append(float(given[1][0])))
    pipe("an image", output_type="latent")
    assert len(evaluations) == counts[-1]
    evaluations.clear()
    warned: list[str] = []
    monkeypatch.setattr(pipeline_sampling.log, "warning", lambda text, *values: warned.append(text % values))
    pipe("an image", output_type="latent", num_inference_steps=3)
    assert len(evaluations) == 3
    made_for = " or ".join(map(str, counts))
    assert warned == [f"3 steps are asked for; the checkpoint was trained to draw in {made_for}"]
    assert ("straightness" in said) == METHODS[method].pairs
    # Previews: two rows of eight images for each number of steps, and two of holes.
    preview = Image.open(sorted((run / "samples").glob("*.png"))[-1])
    assert preview.height == (2 * len(counts) + 2) * (16 + 2) + 2
    card = (run / "pipeline" / "README.md").read_text()
    assert ("1 steps." if len(counts) == 1 else "1 and 2 and 4 steps, two rows each.") in card


def test_a_student_may_be_an_adapter(teacher, images, tmp_path) -> None:
    """It brings the input that the teacher lacks; the pipeline follows it while it is in effect, and not after."""

    def student(name: str, *more: Any) -> Path:
        run = tmp_path / name
        distill(tmp_path, teacher, images, "-o", run, *FEW, "--lora-rank", 2, "--guidance", 2, *more)
        return run

    def drawn(pipe: Any, **more: Any) -> Tensor:
        return sampled(pipe, prompt="an image", **{"num_inference_steps": None} | more)

    def same(one: Any, other: Any, **more: Any) -> None:
        torch.testing.assert_close(drawn(one, **more), drawn(other, **more), rtol=1e-4, atol=1e-5)

    run = student("run", "--license", "cc-by-4.0")
    assert all(
        metadata_load(run / part / "README.md")["license"] == "cc-by-4.0" for part in ("pipeline", "adapter")
    )
    whole, pipe = opened(run / "pipeline"), opened(teacher)
    before, config = drawn(pipe), dict(pipe.config)
    pipe.load_lora_weights(run / "adapter")
    assert pipe.few_steps == whole.few_steps and pipe.usual_steps == 4 and pipe.usual_guidance == 1.0
    for steps in (1, 4):
        same(pipe, whole, num_inference_steps=steps)
    pipe.disable_lora()
    assert not pipe.few_steps and torch.equal(drawn(pipe), before)
    pipe.enable_lora()
    assert pipe.few_steps == whole.few_steps
    pipe.unload_lora_weights()
    assert not pipe.few_steps and torch.equal(drawn(pipe), before)
    assert {name: value for name, value in pipe.config.items() if name in config} == config
    # A second one with the same step counts brings its own embedder; a consistency model leaves nothing behind.
    other = student("other", "--seed", 5)
    pipe.load_lora_weights(run / "adapter", adapter_name="a")
    pipe.load_lora_weights(other / "adapter", adapter_name="b")
    second = opened(other / "pipeline")
    for name, expected in (("a", whole), ("b", second), ("a", whole)):
        pipe.set_adapters(name)
        same(pipe, expected)
    sharing = LatentFlowImg2ImgPipeline.from_pipe(pipe)
    assert sharing.few_steps == whole.few_steps
    pipe.unload_lora_weights()
    assert not sharing.few_steps
    pipe.load_lora_weights(student("third", "--method", "consistency") / "adapter")
    assert pipe.few_steps.consistency
    pipe.unload_lora_weights()
    assert not LatentFlowImg2ImgPipeline.from_pipe(pipe).few_steps and torch.equal(drawn(pipe), before)
    # Fused and saved it is the student.
    pipe.load_lora_weights(run / "adapter")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    fused = opened(tmp_path / "fused")
    assert fused.few_steps == whole.few_steps
    same(fused, whole)
    # So it is when merged without peft, as --fast does with the adapter that a checkpoint brings.
    shutil.copytree(teacher, tmp_path / "with fast")
    shutil.copytree(run / "adapter", tmp_path / "with fast" / "fast")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latentflow.pipeline.adapters.USE_PEFT_BACKEND", False)
        quick = open_pipeline(
            LatentFlowPipeline, str(tmp_path / "with fast"), "cpu", AdapterChoice(fast=True)
        )
    quick.set_progress_bar_config(disable=True)
    assert quick.few_steps == whole.few_steps
    same(quick, whole)
    with pytest.raises(UserError, match="has no few-step adapter"):
        open_pipeline(LatentFlowPipeline, str(teacher), "cpu", AdapterChoice(fast=True))


def test_the_teacher_is_followed_guided_whatever_it_predicts() -> None:
    """On its own path or another, under a condition or none, at a time for each row."""
    close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)
    x, t = torch.randn(3, 4, 4, 4), torch.tensor([0.2, 0.5, 0.9])
    condition = Condition(class_labels=torch.arange(3), drop=torch.tensor([False, False, True]))
    for prediction, path in (("velocity", "condot"), ("noise", "variance-preserving")):
        network = build("dit", num_classes=3)
        model = LatentFlowPipeline(None, network, prediction=prediction, path=path).model
        under, null = (
            torch.cat([model.velocity(rows[[row]], 1.0)(x[[row]], t[row]) for row in range(3)])
            for rows in (model.rows_of(given, 3) for given in (condition, condition.unconditional()))
        )
        expected = null + 3.0 * (under - null)
        close(VelocityTeacher(model, 3.0)(x, t, condition), expected)
        torch.testing.assert_close(expected[2], null[2])
        close(VelocityTeacher(model, 1.0)(x, t, condition), under)


def few_classes(first: int = 0) -> dict[str, Any]:
    """Return a batch of six samples, numbered from ``first``."""
    latents = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    ids = [*range(first, first + 6)]
    return {"latents": latents, "sample_ids": ids, "class_labels": torch.arange(6) % 3}


def student() -> Any:
    """Return a network for losses of students."""
    return build("dit", num_classes=3, interval_conditioning=True)


def teacher_of(network: Any, guidance: float = 1.0) -> VelocityTeacher:
    return VelocityTeacher(LatentFlowPipeline(None, copy.deepcopy(network)).model, guidance)


@pytest.mark.parametrize(
    "method", [name for name, one in METHODS.items() if one.loss is None and not one.pairs]
)
def test_a_student_of_itself_has_nothing_to_learn_but_intervals(method) -> None:
    """Where an interval has no length the target is the teacher's velocity."""
    network, options = student(), {"share": 1e-9, "power": 0.0}
    config = FlowConfig(objective=method, objective_options=options, condition_dropout=0.0)
    own = flow_loss(network, config, 0, teacher=teacher_of(network))
    torch.testing.assert_close(own(few_classes())["per_sample"], torch.zeros(6), rtol=0, atol=1e-9)
    guided = flow_loss(network, config, 0, teacher=teacher_of(network, 3.0))
    assert float(guided(few_classes())["per_sample"].min()) > 1e-4


def test_pairs_are_the_teachers_and_are_drawn_once(teacher, images, tmp_path, monkeypatch) -> None:
    run, pairs = tmp_path / "run", tmp_path / "pairs"
    flags = [*FEW, *PAIRS, "--pairs-folder", pairs, "--pairs-solver", "euler", "--method", "reflow"]
    distill(tmp_path, teacher, images, "-o", run, *flags)
    held = load_file(pairs / "000000.safetensors")
    asked = json.loads((pairs / "drawn.json").read_text())["asked"]
    assert len(asked) == 6 == len(held["noise"])
    again = sampled(opened(teacher), prompt=asked, latents=held["noise"], solver="euler", guidance_scale=4.0)
    torch.testing.assert_close(again, held["latents"], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("latentflow.training.fine_tune.teacher_samples._draw", None)
    distill(tmp_path, teacher, images, "-o", tmp_path / "second", *flags)
    said = distill(tmp_path, teacher, images, "-o", tmp_path / "third", *flags, "--guidance", 2, expect=2)
    assert "drawn otherwise:\n  guidance: 4.0 -> 2.0\n" in said
    said = distill(tmp_path, run / "pipeline", images, "-o", tmp_path / "fourth", *flags, expect=2)
    assert "checkpoint" in said and "drawn otherwise" in said


def _stop_at(steps: int) -> Any:
    """What the processes of a run agree on that gets SIGTERM in this step."""
    asked = iter(range(1, 100))
    return lambda accelerator, here: signal.SIGTERM if next(asked) >= steps else 0


@pytest.mark.parametrize(
    "method",
    [
        "shortcut --method-options share 0.7 finest 2",
        pytest.param("progressive --method-options finest 2", marks=pytest.mark.slow),
        "distribution-matching",
    ],
)
def test_a_student_resumes_bit_for_bit(method, teacher, images, tmp_path) -> None:
    line = [teacher, images, *FEW, "--max-train-steps", 4, "--method", *method.split()]
    line += ["--lr-scheduler", "constant", "--log-steps", 1]
    distill(tmp_path, *line, "-o", tmp_path / "straight")
    # Stopped, not ended: how far a run has come is part of what some methods do.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latentflow.training.loop.fit.most_of_any_process", _stop_at(2))
        said = distill(tmp_path, *line, "-o", tmp_path / "resumed", expect=143)
    assert "resume with:\n  latentflow distill" in said
    assert "resume with" not in distill(tmp_path, *line, "-o", tmp_path / "resumed")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ("--method mean-flo", "mean-flow"),
        ("--guidance 0", "--guidance is 0"),
        ("--step-counts 4 2", "--step-counts 4 2"),
        ("--step-counts 0", "--step-counts 0"),
        ("--method-options guidance 3", "use --guidance"),
        ("--method mean-flow --method-options finest 4", "finest"),
        ("--method reflow --method-options share 1", "which has none"),
        ("--method reflow --pairs 0", "--pairs is 0"),
        ("--method reflow --pairs-solver ddpm", "forgets the first noise"),
        ("--shard", "--shard"),
        ("--condition none", "the data have none"),
        ("--size-conditioning", "must be as"),
        ("--method distribution-matching --method-options share 1", "which has none"),
        ("--method progressive --early-stop 2", "--early-stop with progressive"),
        ("--method reflow --early-stop 2", "--early-stop with reflow"),
    ],
)
def test_bad_input_is_refused(flags, what, teacher, images, tmp_path) -> None:
    line = [teacher, images, "-o", tmp_path / "run", *FEW, *flags.split()]
    assert what.lower() in distill(tmp_path, *line, expect=2).lower()


def test_a_teacher_that_is_none_or_takes_no_guidance_is_refused(images, tmp_path) -> None:
    said = distill(tmp_path, images, images, "-o", tmp_path / "run", *FEW, expect=2)
    assert "is not a pipeline folder" in said
    call(tmp_path, images, "-o", tmp_path / "bare", *TINY, "--max-train-steps", 1, "--condition", "none")
    bare = tmp_path / "bare" / "pipeline"
    said = distill(tmp_path, bare, images, "-o", tmp_path / "run", *FEW, "--guidance", 2, expect=2)
    assert "no classes or captions to follow" in said
    more = ["--condition", "none", "--method", "consistency"]
    assert "guidance 1 distilled in" in distill(tmp_path, bare, images, "-o", tmp_path / "few", *FEW, *more)
    few = tmp_path / "few" / "pipeline"
    assert LatentFlowPipeline.from_pretrained(few).few_steps.consistency


def test_a_students_student_has_the_guidance_that_it_learned(teacher, images, tmp_path) -> None:
    first = tmp_path / "first"
    distill(tmp_path, teacher, images, "-o", first, *FEW, "--guidance", 3)
    tuned = ["--init-from", first / "pipeline", *TINY, "--max-train-steps", 1]
    said = call(tmp_path, images, "-o", tmp_path / "tuned", *tuned, "--objective", "flow-matching")
    assert "guidance 3 is already in the weights of" in said
    follower = open_teacher(str(first / "pipeline"), None)
    assert (follower.guidance, follower.folded_guidance) == (1.0, 3.0)
    with pytest.raises(UserError, match="guidance 3 is already in the weights"):
        open_teacher(str(first / "pipeline"), 4.0)


def test_a_new_stage_learns_from_what_the_last_one_has_become() -> None:
    network, options = student(), {"share": 1.0, "finest": 4}
    config = FlowConfig(objective="progressive", objective_options=options)
    numbers = {"samples": 72, "samples_per_step": 8}  # stages begin at 24 and 48
    stage = ProgressiveLoss(network, config, 0, teacher=teacher_of(network), **numbers)
    first = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.01)

    def lengths(start: int) -> set[float]:
        batch = few_classes(start)
        r, t = stage.interval(batch, CounterRandom(0, batch["sample_ids"]))
        stage(batch)
        return set((t - r).tolist())

    assert lengths(0) == {0.25} and int(stage.earlier_stage) == 0
    torch.testing.assert_close(dict(stage.earlier.state_dict()), dict(first), rtol=0, atol=0)
    assert lengths(18) == {0.25} and int(stage.earlier_stage) == 0  # up to 23, of one step with 16
    assert lengths(24) == {0.5} and int(stage.earlier_stage) == 1
    torch.testing.assert_close(dict(stage.earlier.state_dict()), dict(network.state_dict()), rtol=0, atol=0)
    assert lengths(48) == {1.0} and int(stage.earlier_stage) == 2
    assert lengths(24) == {0.5} and int(stage.earlier_stage) == 2  # a step tried again does not go back
    assert not any(weight.requires_grad for weight in stage.earlier.parameters())
    assert "earlier_stage" in stage.state_dict()  # a resumed run knows


def generator(dropout: float, samples_per_step: int, **options: Any) -> GeneratorLoss:
    network, config = student(), FlowConfig(objective="consistency", condition_dropout=dropout)
    options |= {"teacher": teacher_of(network), "samples_per_step": samples_per_step}
    return GeneratorLoss(network, config, 0, **options)


def test_a_generator_that_draws_as_its_teacher_is_left_alone_and_has_its_turns() -> None:
    """The fake network begins as the teacher: their velocities agree, and nothing pulls."""
    made = generator(0.0, 6, step_counts=(1, 2, 4), every=3)
    fake = FakeLoss(made)
    for step in range(6):
        result = made(few_classes(6 * step))
        assert bool(result) == (step % 3 == 2)
        fake(few_classes())["loss"].backward()
        if result:
            torch.testing.assert_close(result["per_sample"], torch.zeros(6), rtol=0, atol=1e-9)
    with torch.no_grad():
        for weight in made.fake.parameters():
            weight.mul_(1.1)
    its_turn = few_classes(12)
    together = made(its_turn)["per_sample"]
    assert float(together.min()) > 1e-6
    # A sample is a pure function of its number, whatever its company.
    single = [{name: value[row : row + 1] for name, value in its_turn.items()} for row in range(6)]
    alone = torch.cat([made(batch)["per_sample"] for batch in single])
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-7)
    weights = torch.arange(6.0)
    torch.testing.assert_close(made(its_turn | {"weights": weights})["loss"], (weights * together).mean())
    assert not any(name.startswith("fake") for name, _ in made.named_parameters())


def test_a_generator_drops_as_many_conditions_as_asked_and_none_in_validation() -> None:
    """And its fake network, and the fake's own lesson, are under the conditions that it drew under."""
    made = generator(0.25, 400, step_counts=(1,), every=1)
    fake, given = FakeLoss(made), list[Any]()
    made.fake.register_forward_pre_hook(lambda module, arguments: given.append(arguments[2]))
    batch = few_classes()
    many = {name: batch[name].repeat_interleave(67, 0)[:400] for name in ("latents", "class_labels")}
    made(many | {"sample_ids": list(range(400))})
    fake(batch)
    assert made.generated is not None
    dropped = made.generated.condition.drop
    assert float(dropped.double().mean()) == pytest.approx(0.25, abs=5 * (0.1875 / 400) ** 0.5)
    assert len(given) == 2
    for one in given:
        assert torch.equal(one.drop, dropped) and torch.equal(one.class_labels, many["class_labels"])
    made.eval()(batch)
    assert not made.generated.condition.drop.any()


def test_classes_that_the_teacher_does_not_know_are_refused(tmp_path) -> None:
    names = [f"{label}/{number}.png" for label in ("red", "blue", "green") for number in range(4)]
    two, three = save_images(tmp_path / "two", *names[:8]), save_images(tmp_path / "three", *names)
    call(tmp_path, two, "-o", tmp_path / "teacher", *TINY, "--max-train-steps", 1)
    known = tmp_path / "teacher" / "pipeline"
    said = distill(tmp_path, known, three, "-o", tmp_path / "run", *FEW, expect=2)
    assert "does not know the classes" in said and "green" in said
    distill(tmp_path, known, two, "-o", tmp_path / "run", *FEW)


def test_a_finished_run_says_how_it_goes_on(teacher, images, tmp_path) -> None:
    """By its own program, with its own settings."""
    run = tmp_path / "run"
    distill(tmp_path, teacher, images, "-o", run, *FEW, "--method", "shortcut", "--guidance", 2)
    words = shlex.split(read_run(run).resume())
    assert words[:2] == ["latentflow", "distill"]
    assert "guidance 2 distilled in" in distill(tmp_path, *words[2:])


def test_a_teachers_coupling_does_not_part_pairs() -> None:
    network = build("dit", num_classes=3)
    config = FlowConfig(coupling="ot", condition_dropout=0.0)
    stage, batch = FlowLoss(network, config, 0), few_classes()
    pairs = batch | {"noise": torch.randn(6, 4, 4, 4)}
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    t = stage(pairs)["t"].float().view(-1, 1, 1, 1)
    torch.testing.assert_close(seen[0], t * batch["latents"] + (1 - t) * pairs["noise"])
