"""A run that predicts codes (Purrception) by the real command: resumed, drawn by every solver, what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow import LatentFlowPipeline
from latentflow.autoencoder import codebook, tokenize
from latentflow.errors import UserError
from latentflow.evaluation.data import ImageSet
from latentflow.evaluation.figures import training_loss
from latentflow.evaluation.sampler import Sampler
from latentflow.families.tokens import CodeModel
from latentflow.flow import SOLVERS
from latentflow.inference.sample import model_capabilities, read_capabilities
from latentflow.models import DiT

from ..pipeline.test_tokens import tokenizer
from .command import TINY, call, losses, opened, same_state, sampled, shapes_folder, whole_and_stopped

CODES, V = ("--prediction", "codes"), 12
VQ = ("--autoencoder-class", "vq", "--codebook-size", V, "--codebook-width", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes_folder(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its own tokenizer; with that tokenizer, on another path, one that is stopped half way."""
    root = tmp_path_factory.mktemp("runs")
    line = [folder, *TINY, *CODES, "--random-flip", "--checkpointing-steps", 2]
    steps = ["--validation-steps", 2, "--preview-steps", 4]
    call(root / "cache", *line, *VQ, *steps, "--max-train-steps", 4, "-o", root / "run")
    given = [*line, "--vae", root / "run" / "autoencoder" / "autoencoder", "--path", "trigonometric"]
    given.append("--inpainting")
    whole_and_stopped(root, *given)
    return root


def test_a_resumed_run_equals_one_that_never_stopped(runs: Path) -> None:
    assert same_state(runs / "stopped", runs / "whole")
    for run in ("run", "whole"):
        found = losses(runs / run)
        assert found[0] == pytest.approx(math.log(V), abs=1e-4)  # at first all codes are alike
        assert np.isfinite(found).all() and found[-1] < found[0]


def test_the_checkpoint_is_one_of_latents_that_are_codes(runs: Path) -> None:
    folder = runs / "run" / "pipeline"
    pipe = opened(folder)
    assert isinstance(pipe.model, CodeModel) and pipe.config["prediction"] == "codes"
    assert pipe.transformer.config["out_channels"] == len(codebook(pipe.vae)) == V
    assert read_capabilities(str(folder)) == model_capabilities(pipe.model)
    assert model_capabilities(pipe.model).jump_settings == ("temperature",)
    assert "| prediction | codes |" in (folder / "README.md").read_text()
    assert '"val_loss"' in (runs / "run" / "metrics.jsonl").read_text()
    assert list((runs / "run" / "samples").glob("*.png"))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = pipe.model.encode(images)
    assert torch.equal(latents, codebook(pipe.vae)[tokenize(pipe.vae, images)].movedim(-1, 1))
    drawn = sampled(pipe, prompt=["a red circle", "a blue square"])
    assert drawn.shape == (2, 3, 8, 8)


def constant(pipe: LatentFlowPipeline) -> torch.Tensor:
    """Let the network return the same logits everywhere, and return them."""
    logits = torch.linspace(-2.0, 2.0, V)
    with torch.no_grad():
        pipe.transformer.final_layer.linear.weight.zero_()
        pipe.transformer.final_layer.linear.bias.copy_(logits)
    return logits


@pytest.mark.parametrize("run", ["run", "whole"])
def test_every_solver_ends_at_the_mean_code_of_a_constant_posterior(runs: Path, run: str) -> None:
    """The flow to a constant prediction of the data is straight: no solver leaves noise, but one that adds some."""
    pipe = opened(runs / run / "pipeline")
    logits, codes = constant(pipe), codebook(pipe.vae)
    asked = {"prompt": ["a red circle"], "guidance_scale": 3.0}
    for temperature in (1.0, 0.4):
        mean = (logits / temperature).softmax(0) @ codes
        for solver in (None, *(SOLVERS.keys() - {"euler-maruyama"})):
            x = sampled(pipe, **asked, solver=solver, temperature=temperature)
            error = (x - mean[None, :, None, None]).abs().max()
            assert error < (5e-3 if solver == "dopri5" else 2e-4), solver


@pytest.mark.parametrize("run", ["run", "whole"])
def test_the_loss_of_a_constant_posterior_is_its_cross_entropy(runs: Path, run: str) -> None:
    """In bits per token, at every time, whatever the path and the temperature of the last call."""
    pipe = opened(runs / run / "pipeline")
    logits = constant(pipe)
    sampled(pipe, prompt=["a red circle"], temperature=0.4)
    sampler = Sampler(
        model=pipe.model, pipeline=pipe, condition_kind="prompt", settings={}, seed=0, batch_size=4
    )
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = training_loss(sampler, ImageSet(images=images, captions=["a red circle"] * 6))
    expected = -float(logits.log_softmax(0)[tokenize(pipe.vae, images)].mean()) / math.log(2)
    assert found["unit"] == "bits per token"
    assert found["by_time"] == pytest.approx([expected] * 8, rel=1e-4)
    assert found["without_condition"]["value"] == pytest.approx(expected, rel=1e-4)


def test_the_programs_draw_fill_and_edit(runs: Path, folder: Path, tmp_path: Path) -> None:
    more = ["--checkpoint", runs / "run" / "pipeline", "--steps", 2]
    hot = ["--temperature", 0.3, "--solver", "heun"]
    for name, given in (("a", []), ("b", hot)):
        call(
            tmp_path,
            "a red circle",
            *more,
            *given,
            "-o",
            tmp_path / f"{name}.png",
            file="../pipelines/generate",
        )
    first, second = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in "ab")
    assert first.shape == (16, 16, 3) and not np.array_equal(first, second)
    box = ["--box", 4, 4, 12, 12]
    image, out = folder / "00.png", tmp_path / "c.png"
    call(tmp_path, image, "a red circle", *box, *more, *hot[:2], "-o", out, file="../pipelines/inpaint")
    kept = np.ones((16, 16, 1), bool)
    kept[4:12, 4:12] = False
    filled, original = (np.asarray(Image.open(path).convert("RGB")) for path in (out, image))
    assert np.array_equal(filled * kept, original * kept)
    edit = [image, "a red circle", "--from", "a blue square", *more, "-o", tmp_path / "d.png"]
    call(tmp_path, *edit, file="../pipelines/edit")
    said = call(tmp_path, "a red circle", *more, "--corrector", 1, expect=2, file="../pipelines/generate")
    assert "corrector is 1, and this checkpoint draws no tokens" in said
    said = call(tmp_path, "a red circle", *more, "--solver", "halton", expect=2, file="../pipelines/generate")
    assert "is of checkpoints of tokens" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "Add --autoencoder-class vq"),
        ([*VQ, "--weighting", "edm"], "--weighting with --prediction codes"),
        ([*VQ, "--contrastive-weight", 0.05], "--contrastive-weight with --prediction codes"),
        ([*VQ, "--objective", "mean-flow"], "--prediction codes with --objective mean-flow"),
        ([*VQ, "--network", "unet"], "--network unet with --prediction codes"),
        ([*VQ, "--patch-size", 2], "--patch-size with --prediction codes"),
        ([*VQ, "--route-share", 0.5], "--route-share with --prediction codes"),
        ([*VQ, "--alignment", "self"], "--alignment with --prediction codes"),
        ([*VQ, "--init-from", "somewhere"], "--init-from with --prediction codes"),
        ([*VQ, "--joint", "unified"], "--prediction codes"),
        ([*VQ, "--tokens"], "--prediction with --tokens"),
    ],
)
def test_what_does_not_go_with_codes_is_refused(
    folder: Path, tmp_path: Path, flags: list[str], said: str
) -> None:
    assert said in call(tmp_path, folder, *TINY, *CODES, *flags, "-o", tmp_path / "run", expect=2)


def test_a_plan_is_made_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    said = call(
        tmp_path, folder, *TINY, *CODES, *VQ, "--max-train-steps", 4, "-o", tmp_path / "run", "--dry-run"
    )
    assert "time here" in said and not (tmp_path / "run" / "pipeline").exists()


def test_other_tokenizers_and_other_uses_are_refused(runs: Path, folder: Path, tmp_path: Path) -> None:
    checkpoint = runs / "run" / "pipeline"
    said = call(tmp_path, folder, *TINY, "--init-from", checkpoint, "-o", tmp_path / "run", expect=2)
    assert "predicts codes: such models are neither fine-tuned nor distilled" in said
    said = call(tmp_path, checkpoint, folder, "-o", tmp_path / "run", expect=2, file="distill")
    assert "neither fine-tuned nor distilled" in said
    pipe = opened(checkpoint)
    with pytest.raises(UserError, match="logits over 12 tokens, but the codebook has 5 codes"):
        sampled(LatentFlowPipeline.from_pipe(pipe, vae=tokenizer(5)), prompt=["a red circle"])
    plain = LatentFlowPipeline(pipe.vae, DiT(in_channels=3, width=16, depth=1, heads=1))
    with pytest.raises(UserError, match="without logits"):
        LatentFlowPipeline(**plain.components, prediction="codes")
