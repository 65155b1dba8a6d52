"""Samplers that were tuned to a checkpoint: the command, the file, and the calls that take them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from latentflow import LatentFlowImg2ImgPipeline, LatentFlowInpaintPipeline, LatentFlowPipeline
from latentflow.errors import UserError
from latentflow.flow import integrate, time_grid
from latentflow.flow.tuning import FINE
from latentflow.inference.tuning import HEUN_STEPS, tune_samplers
from latentflow.pipeline.tuned import FILE, fitting, read_tuned

from .conftest import quiet, tiny_dit

FEW = ("-n", 4, "--held-out", 3, "--batch-size", 4, "--device", "cpu")


@pytest.fixture(scope="module")
def tuned_folder(class_folder: Path, load_program: Callable[[str], Any], tmp_path_factory: Any) -> Path:
    """A checkpoint of classes that was tuned for 2 and 3 steps at guidance 4."""
    folder = tmp_path_factory.mktemp("tuned") / "pipeline"
    shutil.copytree(class_folder, folder)
    load_program("tune_sampler").main([str(word) for word in (folder, "--steps", 2, 3, *FEW)])
    return folder


@pytest.fixture
def copied(tuned_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tuned_folder, tmp_path / "copied"))


def open_pipe(folder: Path, kind: Any = LatentFlowPipeline) -> Any:
    return quiet(kind.from_pretrained(folder))


def test_the_file_holds_numbers_and_what_they_reach(tuned_folder: Path, class_folder: Path) -> None:
    two, three = read_tuned(tuned_folder)
    assert (two.steps, three.steps, two.guidance, two.height, two.width) == (2, 3, 4.0, 8, 8)
    assert (tuned_folder / FILE).stat().st_size < 4000 and two.network
    assert three.held_out["noises"] == 3
    assert three.held_out["tuned_mean"] < three.held_out["usual_mean"]
    files = {path.relative_to(tuned_folder) for path in tuned_folder.rglob("*")}
    assert files - {path.relative_to(class_folder) for path in class_folder.rglob("*")} == {Path(FILE)}


def test_several_numbers_of_steps_share_the_fine_trajectories(
    copied: Path, load_program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = (copied / FILE).read_text()
    for steps in (2, 3):
        load_program("tune_sampler").main(
            [str(word) for word in (copied, "--steps", steps, *FEW, "--overwrite")]
        )
    assert (copied / FILE).read_text() == both
    model, asked = open_pipe(copied).model, [0]
    usual = type(model).velocity

    def counted(*given: Any) -> Any:
        inner = usual(*given)

        def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            asked[0] += len(x)
            return inner(x, t)

        return velocity

    monkeypatch.setattr(type(model), "velocity", counted)
    each = []
    for steps in ([2], [3], [2, 3]):
        asked[0] = 0
        tune_samplers(model, steps, count=4, held_out=3)
        each.append(asked[0])
    assert each[2] == each[0] + each[1] - 7 * FINE - 3 * 2 * HEUN_STEPS


def test_a_latent_variable_is_drawn_as_in_a_call(
    assemble: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = assemble(tiny_dit(latent_variable="path", latent_variable_dim=3))
    seen: list[torch.Tensor] = []

    def velocity(own: Any, rows: Any, *_: Any) -> Any:
        seen.append(rows.kept["z"])
        raise EOFError  # enough was seen

    monkeypatch.setattr(type(pipe.model), "velocity", velocity)
    with pytest.raises(EOFError):
        tune_samplers(pipe.model, [2], count=2, seed=5)
    with pytest.raises(EOFError):
        pipe(num_images_per_prompt=2, generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)])
    assert torch.equal(*seen) and not torch.equal(seen[0][0], seen[0][1])


def test_a_call_of_these_steps_takes_it_and_says_so(tuned_folder: Path, caplog: Any) -> None:
    pipe = open_pipe(tuned_folder)
    noise = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    call = {"class_labels": [0, 1], "latents": noise, "output_type": "latent"}
    with caplog.at_level(logging.INFO, logger="latentflow"):
        drawn = pipe(**call, num_inference_steps=3).images
    assert "3 steps of the sampler that was tuned to this checkpoint" in caplog.text
    numbers = read_tuned(tuned_folder)[1].numbers
    with torch.no_grad():
        velocity = pipe.model.velocity(pipe.model.encode_class([0, 1]), 4.0)
        expected = integrate(velocity, noise, numbers.times, numbers.solver())
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(drawn, pipe(**call, solver="tuned").images)  # the most steps there are
    assert torch.equal(
        pipe(**call, num_inference_steps=2, solver="tuned").images, pipe(**call, num_inference_steps=2).images
    )
    # Every image for itself, to rounding.
    alone = pipe(**call | {"class_labels": 1, "latents": noise[1:]}, num_inference_steps=3).images
    torch.testing.assert_close(alone, drawn[1:], atol=1e-5, rtol=1e-5)


def test_other_calls_draw_as_before(tuned_folder: Path, class_folder: Path) -> None:
    tuned, plain = open_pipe(tuned_folder), open_pipe(class_folder)
    noise = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    same = {"class_labels": 1, "latents": noise, "output_type": "latent", "num_inference_steps": 3}
    sigmas = [1.0 - t for t in time_grid(3).tolist()[:-1]]
    for change in (
        {"guidance_scale": 2.0},
        {"num_inference_steps": 4},
        {"solver": "heun"},
        {"sigmas": sigmas},
    ):
        assert torch.equal(tuned(**same | change).images, plain(**same | change).images)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            {"num_inference_steps": 5},
            "none was tuned for 5 steps, guidance 4, 8 x 8 .*\n.*2 steps at guidance 4, 8 x 8, 3",
        ),
        (
            {"guidance_scale": 3.0},
            "none was tuned for guidance 3, .*\n.*tune-sampler CHECKPOINT --guidance 3",
        ),
        ({"height": 16, "num_inference_steps": 2}, "none was tuned for 2 steps, guidance 4, 8 x 16"),
        ({"sigmas": [1.0, 0.5]}, "with sigmas"),
    ],
)
def test_what_it_was_not_tuned_for_is_refused(tuned_folder: Path, call: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        open_pipe(tuned_folder)(class_labels=1, solver="tuned", **call)


def test_another_network_than_it_was_tuned_to_is_refused(copied: Path) -> None:
    pipe = open_pipe(copied)
    with torch.no_grad():
        next(p for p in pipe.transformer.parameters() if p.ndim == 1).add_(0.1)
    with pytest.raises(UserError, match=r"other weights than .*\n.*--overwrite"):
        pipe(class_labels=1, num_inference_steps=3, solver="tuned")
    assert fitting(pipe.model, 3, 4.0, 8, 8) is None
    pipe = open_pipe(copied)
    pipe.transformer._merged_adapter = True
    with pytest.raises(UserError, match="adapters change the network"):
        pipe(class_labels=1, num_inference_steps=3, solver="tuned")
    pipe(class_labels=1, num_inference_steps=3)


def test_holes_and_images_that_are_kept_do_not_take_it(
    tuned_folder: Path, class_folder: Path, images: Any
) -> None:
    fill, change = (
        open_pipe(tuned_folder, LatentFlowInpaintPipeline),
        open_pipe(tuned_folder, LatentFlowImg2ImgPipeline),
    )
    image, mask = images(), torch.ones(1, 1, 8, 8)
    with pytest.raises(UserError, match="fills no holes"):
        fill(class_labels=1, image=image, mask_image=mask, solver="tuned", method="repaint")
    with pytest.raises(UserError, match="a strength below 1"):
        change(class_labels=1, image=image, strength=0.5, solver="tuned")


def test_the_command_replaces_nothing_unless_told(copied: Path, load_program: Any) -> None:
    main, before = load_program("tune_sampler").main, (copied / FILE).read_text()
    with pytest.raises(UserError, match=r"(?s)a sampler of 2 steps at guidance 4 already.*--overwrite"):
        main([str(word) for word in (copied, "--steps", 2, *FEW)])
    assert (copied / FILE).read_text() == before
    main([str(word) for word in (copied, "--steps", 2, *FEW, "--overwrite", "--seed", 9)])
    assert [one.steps for one in read_tuned(copied)] == [2, 3] and (copied / FILE).read_text() != before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["owner/name"], "."),
        (["{folder}", "--steps", "0"], "--steps"),
        (["{folder}", "--steps", "4", "2"], "of 2 steps at guidance 4 already"),
        (["{folder}", "--prompts", "{folder}/none.txt"], "."),
        (["{folder}", "--guidance", "nan"], "--guidance"),
    ],
)
def test_bad_input_of_the_command(copied: Path, load_program: Any, line: list[str], message: str) -> None:
    with pytest.raises((UserError, OSError), match=message):
        load_program("tune_sampler").main([word.format(folder=copied) for word in line])


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found | {"solvers": 3},
        lambda found: {"solvers": [{**found["solvers"][0], "times": [0.0, "a", 1.0]}]},
        lambda found: {"solvers": [{**found["solvers"][0], "increments": [[0.5], [0.1, 9.0]]}]},
        lambda found: {"solvers": [{k: v for k, v in found["solvers"][0].items() if k != "network"}]},
    ],
)
def test_a_damaged_file_is_named(copied: Path, damage: Callable[[dict[str, Any]], Any]) -> None:
    found = json.loads((copied / FILE).read_text())
    (copied / FILE).write_text(json.dumps(damage(found)))
    with pytest.raises(UserError, match=r"tuned_solvers\.json|stored solver"):
        open_pipe(copied)(class_labels=1, num_inference_steps=2)
