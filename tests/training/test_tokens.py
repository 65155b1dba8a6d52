"""A run of tokens by the real command: the same when resumed, its result in every pipeline, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from latentflow import LatentFlowInpaintPipeline
from latentflow.autoencoder import codebook, tokenize
from latentflow.families.tokens import TokenModel
from latentflow.models import TokenDiT

from .command import TINY, call, losses, opened, same_state, sampled, shapes_folder, state, whole_and_stopped

VQ = ("--autoencoder-class", "vq", "--codebook-size", 12, "--codebook-width", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen captioned shapes; one has a mask, which tokens do not need."""
    root = shapes_folder(tmp_path_factory.mktemp("shapes"))
    Image.new("L", (16, 16), 255).save(root / "03-mask.png")
    return root


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its own tokenizer, and one that is stopped half way, with the tokenizer of the first."""
    root = tmp_path_factory.mktemp("runs")
    line = [folder, *TINY, "--tokens", "--random-flip", "--checkpointing-steps", 2, "--kappa", "cosine"]
    steps = ["--validation-steps", 2, "--preview-steps", 4]
    call(root / "cache", *line, *VQ, *steps, "--max-train-steps", 4, "-o", root / "run")
    given = [*line, "--vae", root / "run" / "autoencoder" / "autoencoder", *steps, "--no-tied-logits"]
    whole_and_stopped(root, *given)
    return root


def test_a_resumed_run_equals_one_that_never_stopped(runs: Path) -> None:
    assert same_state(runs / "stopped", runs / "whole")
    assert {"embedding.weight", "head.weight"} <= {
        ".".join(name.split(".")[-2:]) for name in state(runs / "whole")
    }
    assert opened(runs / "whole" / "pipeline").transformer.head is not None
    found = losses(runs / "whole")
    assert np.isfinite(found).all() and losses(runs / "stopped")[-1] == found[-1]


def test_one_flag_trains_tokens(runs: Path) -> None:
    pipe = opened(runs / "run" / "pipeline")
    assert isinstance(pipe.model, TokenModel) and isinstance(pipe.transformer, TokenDiT)
    assert pipe.transformer.head is None
    assert pipe.model.token_path.vocabulary == len(codebook(pipe.vae)) == 12
    assert pipe.config["token_path"]["kappa"] == "cosine" and not pipe.takes_masks
    assert list((runs / "run" / "samples").glob("*.png"))
    assert '"val_loss"' in (runs / "run" / "metrics.jsonl").read_text()
    assert "the masks of the data are not used" in (runs / "run" / "train.log").read_text()
    card = (runs / "run" / "pipeline" / "README.md").read_text()
    assert (
        "| kappa | cosine |" in card
        and "| path |" not in card
        and "Trained by discrete flow matching of tokens" in card
    )
    assert ", for inpainting as well" in card
    assert yaml.safe_load((runs / "run" / "config.yaml").read_text())["tokens"] is True
    tokens = sampled(pipe, prompt=["a red circle", "a blue square"])
    assert tokens.shape == (2, 8, 8) and int(tokens.max()) < 12


def test_the_programs_draw_and_fill(runs: Path, folder: Path, tmp_path: Path) -> None:
    checkpoint = runs / "run" / "pipeline"
    more = [
        "--checkpoint",
        checkpoint,
        "--temperature",
        0.8,
        "--corrector",
        1,
        "--solver",
        "confidence",
        "--steps",
        2,
    ]
    call(tmp_path, "a red circle", *more, "-o", tmp_path / "a.png", file="../pipelines/generate")
    assert Image.open(tmp_path / "a.png").size == (16, 16)
    image = Image.open(folder / "00.png").convert("RGB")
    box = ["--box", 4, 4, 12, 12]
    call(
        tmp_path, folder / "00.png", "a red circle", *box, *more, "-o", tmp_path / "b.png",
        file="../pipelines/inpaint",
    )  # fmt: skip
    filled, kept = np.asarray(Image.open(tmp_path / "b.png").convert("RGB")), np.ones((16, 16, 1), bool)
    kept[4:12, 4:12] = False
    assert np.array_equal(filled * kept, np.asarray(image) * kept)
    varied = [folder / "00.png", "a red circle", *more, "-o", tmp_path / "c.png"]
    said = call(tmp_path, *varied, expect=2, file="../pipelines/edit")
    assert "without --method image-to-image" in said
    call(tmp_path, *varied, "--method", "image-to-image", file="../pipelines/edit")
    assert Image.open(tmp_path / "c.png").size == (16, 16)
    pipe = opened(checkpoint, LatentFlowInpaintPipeline)
    assert pipe.model.known_tokens(torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)).equal(
        tokenize(pipe.vae, torch.zeros(1, 3, 16, 16))
    )
    said = call(
        tmp_path, "a red circle", *more[:2], "--solver", "heun", expect=2, file="../pipelines/generate"
    )
    assert "sampler of tokens" in said
    said = call(
        tmp_path, "a red circle", *more[:2], "--temperature", 0, expect=2, file="../pipelines/generate"
    )
    assert "temperature is 0" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tokens"], "Add --autoencoder-class vq"),
        (["--tokens", *VQ, "--path", "sqrt"], "--path with --tokens"),
        (["--tokens", *VQ, "--coupling", "ot"], "--coupling with --tokens"),
        (["--tokens", *VQ, "--prediction", "data"], "--prediction with --tokens"),
        (["--tokens", *VQ, "--objective", "mean-flow"], "--objective with --tokens"),
        (["--tokens", *VQ, "--time-density", "uniform"], "--time-density with --tokens"),
        (["--tokens", *VQ, "--inpainting"], "every model of tokens fills holes"),
        (["--tokens", *VQ, "--network", "unet"], "--network unet with --tokens"),
        (["--tokens", *VQ, "--patch-size", 2], "--patch-size with --tokens"),
        (["--tokens", *VQ, "--route-share", 0.5], "--route-share with --tokens"),
        (["--tokens", *VQ, "--alignment", "self"], "--alignment with --tokens"),
        (["--tokens", *VQ, "--control", "image"], "--control with --tokens"),
        (["--tokens", *VQ, "--kappa", "cosin"], "cosine"),
        (["--tokens", *VQ, "--kappa", "polynomial", "--kappa-options", "degree", 0.5], "at least 1"),
        (["--tokens", *VQ, "--token-objective", "kl"], "generalised-kl"),
        (["--kappa", "cosine"], "--kappa without --tokens"),
        (["--no-tied-logits"], "--tied-logits without --tokens"),
        (["--token-weighting", "capped"], "--token-weighting without --tokens"),
        (["--tokens", *VQ, "--init-from", "somewhere"], "--init-from with --tokens"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said(flags: list[object], said: str, tmp_path: Path) -> None:
    found = call(tmp_path, tmp_path, "-o", tmp_path / "run", *flags, expect=2)
    assert said in found
    assert not (tmp_path / "run").exists()


def test_tokens_need_a_codebook_and_start_nothing_else(runs: Path, folder: Path, tmp_path: Path) -> None:
    line = [folder, *TINY, "-o", tmp_path / "run", "--max-train-steps", 1]
    said = call(tmp_path, *line, "--init-from", runs / "run" / "pipeline", expect=2)
    assert "draws tokens: such models are neither fine-tuned nor distilled" in said
    said = call(
        tmp_path, runs / "run" / "pipeline", folder, "-o", tmp_path / "fast", expect=2, file="distill"
    )
    assert "neither fine-tuned nor distilled" in said
    planned = call(
        tmp_path, *line, "--tokens", "--autoencoder-class", "fsq", "--fsq-levels", 3, 3, "--dry-run"
    )
    assert "TokenDiT" in planned and "measured on this cpu" in planned


def test_an_autoencoder_without_codes_is_refused(folder: Path, tmp_path: Path) -> None:
    from ..autoencoder.tiny import AUTOENCODERS

    AUTOENCODERS["AutoencoderDC"][0]().save_pretrained(tmp_path / "vae")
    line = [
        folder,
        *TINY,
        "-o",
        tmp_path / "run",
        "--vae",
        tmp_path / "vae",
        "--tokens",
        "--max-train-steps",
        1,
    ]
    assert "has no codebook: its latents are no tokens" in call(tmp_path, *line, expect=2)
