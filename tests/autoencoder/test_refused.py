"""What `latentflow train --vae` refuses: one sentence each, through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentflow.autoencoder import encode, load_autoencoder
from latentflow.cli import given, parse
from latentflow.config import PRESETS, RunConfig

from ..training.command import TINY, call, save_images
from .test_tiny import SIZES, published
from .tiny import AUTOENCODERS, SIDE


def kl(folder: Path, **options: Any) -> None:
    AUTOENCODERS["AutoencoderKL"][0]().save_pretrained(folder, **options)


def pipeline_without(folder: Path) -> None:
    folder.mkdir()
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "IFPipeline", "unet": ["diffusers", "x"]})
    )


def video(folder: Path) -> None:
    diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2, up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
    ).save_pretrained(folder)  # fmt: skip


def with_transparency(folder: Path) -> None:
    kind = diffusers.AutoencoderKL
    kind(in_channels=4, out_channels=4, block_out_channels=(8,), norm_num_groups=4).save_pretrained(folder)


def pickled(folder: Path) -> None:
    kl(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def half_a_file(folder: Path) -> None:
    kl(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def tiny(folder: Path) -> None:
    folder.mkdir()
    published(diffusers.AutoencoderTiny(latent_channels=4, **SIZES), folder)


def tiny_with_unknown_keys(folder: Path) -> None:
    tiny(folder)
    file = folder / "decoder.safetensors"
    save_file({**load_file(file), "9.mystery.weight": torch.zeros(3)}, file)


def half_a_tiny(folder: Path) -> None:
    tiny(folder)
    file = folder / "decoder.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def tiny_without_encoder(folder: Path) -> None:
    tiny(folder)
    (folder / "encoder.safetensors").unlink()


REFUSED: dict[Callable[[Path], None], str] = {
    pipeline_without: "is a pipeline without an autoencoder",
    video: "of class AutoencoderKLCogVideoX, does not take RGB images",
    with_transparency: "of class AutoencoderKL, does not take RGB images",
    pickled: "has no file of weights (.safetensors)",
    half_a_file: "diffusion_pytorch_model.safetensors cannot be read",
    tiny_with_unknown_keys: "decoder.layers.8.mystery.weight",
    half_a_tiny: "decoder.safetensors cannot be read",
    tiny_without_encoder: "has decoder.safetensors but no encoder.safetensors",
    lambda folder: folder.write_bytes(b"x"): "is a file, and an autoencoder is a folder",
}


@pytest.mark.parametrize("make", REFUSED)
def test_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "vae")
    data = save_images(tmp_path / "data", "a.png", "b.png", size=(SIDE, SIDE))
    line = [
        data,
        "-o",
        tmp_path / "run",
        "--vae",
        tmp_path / "vae",
        "--resolution",
        SIDE,
        "--condition",
        "none",
    ]
    output = call(tmp_path / "cache", *line, *TINY, expect=2)
    assert REFUSED[make] in output
    error = output[output.lower().index("error") :]
    assert len(error.strip().splitlines()) <= 4, error


def test_weights_in_half_precision_alone_are_opened(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AUTOENCODERS["AutoencoderKL"][0]().half()
    vae.save_pretrained(tmp_path / "vae", variant="fp16")
    loaded, images = load_autoencoder(tmp_path / "vae"), torch.rand(1, 3, SIDE, SIDE)
    with torch.no_grad():
        assert loaded.dtype == torch.float32
        assert torch.equal(encode(loaded, images), encode(vae.float().eval(), images))


def test_another_number_of_channels_than_the_checkpoint_s(tmp_path: Path) -> None:
    data = save_images(tmp_path / "data", *(f"{number}.png" for number in range(8)), size=(SIDE, SIDE))
    line = [
        data,
        "--resolution",
        SIDE,
        "--condition",
        "none",
        "--max-train-steps",
        1,
        "--preview-steps",
        0,
        *TINY,
    ]
    call(tmp_path / "cache", *line, "-o", tmp_path / "run")
    build, channels, _ = AUTOENCODERS["VQModel"]
    build().save_pretrained(tmp_path / "vae")
    more = ["--init-from", tmp_path / "run", "--vae", tmp_path / "vae", "-o", tmp_path / "more"]
    output = call(tmp_path / "cache", *line, *more, expect=2)
    assert f"the transformer's in_channels is 4, the autoencoder's latents are {channels}" in output


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--vae V --latent-channels 8 --autoencoder-steps 9", ["--latent-channels", "--autoencoder-steps"]),
        ("--init-from C --perceptual-weight 0.1", ["--perceptual-weight"]),
        ("--joint unified --autoencoder-steps 9 --latent-channels 8", ["--autoencoder-steps"]),
        (
            "--joint alignment --alignment encoder --alignment-encoder E --vae V --latent-channels 8",
            ["--latent-channels"],
        ),
        ("--latent-channels 8 --autoencoder-steps 9", []),
        ("--vae V --network-preset tiny", []),  # a preset may have an autoencoder of its own
    ],
)
def test_flags_of_an_autoencoder_that_is_not_trained_are_named(line: str, named: list[str]) -> None:
    argv = ["DATA", "-o", "run", *line.split()]
    config = parse(RunConfig, argv, prog="latentflow train", presets=PRESETS)
    warning = config.unused_flags(given(RunConfig, argv, flags_only=True))
    assert warning.rpartition(": ")[2] == ", ".join(named)
    assert ("that of" in warning) == bool(named and ("--vae" in line or "--init-from" in line))
