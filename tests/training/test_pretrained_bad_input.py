"""What a fine-tune of a pretrained model refuses, through its command line, and what it says."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from ..families.tiny import WITH_EXTRA_CHANNELS
from .command import call
from .pretrained import QUICK, base_flags, photos

pytestmark = pytest.mark.usefixtures("no_memorisation")
NAME = "StableDiffusionPipeline"
LORA = ["--lora-rank", "2", "--max-train-steps", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("data"), 16, 4)


@pytest.fixture
def line(pretrained: Callable[[str], Path], tmp_path: Path) -> list[Any]:
    return ["-o", tmp_path / "run", *base_flags(NAME, pretrained(NAME)), *QUICK]


def without_weights(folder: Path, to: Path) -> Path:
    """Copy a checkpoint's configs, and nothing that could be loaded."""
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors")))


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lora-rank 2 --lora-layers attn9", "--lora-layers attn9: UNet2DConditionModel has no such layers"),
        ("--lora-rank 2 --lora-layers attn9", "mid_block.attentions.*.transformer_blocks.*.attn1.to_q"),
        ("--lora-rank 64", "--lora-rank 64 is above what the layer down_blocks.0"),
        ("--lora-rank 64", "At most 8"),
        ("--lora-rank 2 --masks alpha", "--masks alpha: masks weight the loss"),
        ("--lora-rank 2 --optimizer muon", "--optimizer muon with an adapter"),
        ("--lora-rank 2 --quantize nf4", "--quantize nf4 needs a GPU"),
        ("--quantize nf4 --lora-rank 0", "--quantize nf4: quantised weights cannot learn"),
        (
            "--quantize int8",
            "--quantize int8: quantised weights cannot learn",
        ),  # small: no adapter by default
        ("--mixed-precision fp16", "--mixed-precision fp16 needs a GPU"),
        ("--resolution 17", "--resolution 17 is not a multiple of 2"),
        ("--resolution 17", "Use --resolution 16."),
        ("--outside-mask 2", "--outside-mask is 2.0"),
        ("--family-options clip_skips=1", "Did you mean clip_skip?"),
        ("--family-options clip_skip", "Give NAME=VALUE"),
        ("--depth 3", "takes no --depth\nLeave it out."),
        ("--path ddpm", "takes no --path\n"),
        ("--prediction data", "takes no --prediction\n"),
        ("--vae VAE", "takes no --vae\n"),
        ("--vae VAE --latents-as-is", "takes no --vae --latents-as-is\nLeave them out."),
        ("--text-width 16", "takes no --text-width\n"),
        ("--latent-channels 8", "takes no --latent-channels\n"),
        ("--inpainting", "StableDiffusionPipeline, which cannot be given input channels for masks"),
        ("--mask-shapes ellipse 1", "--mask-shapes without --inpainting"),
        ("--route-share 0.5", "takes no --route-share\n"),
        ("--size-conditioning", "takes no --size-conditioning\n"),
        ("--ema-lengths 0.1", "takes no --ema-lengths\n"),
        ("--lr-layer-decay 0.8", "takes no --lr-layer-decay\n"),
        ("--preset tiny", "takes no --network-preset"),
    ],
)
def test_flags_that_cannot_be_had_are_refused_before_anything_is_encoded(
    flags: str, words: str, line: list[Any], data: Path, pretrained: Callable[[str], Path], tmp_path: Path
) -> None:
    given = shlex.split(flags.replace("VAE", str(pretrained(NAME) / "vae")))
    said = call(tmp_path / "cache", data, *line, "--max-train-steps", 2, *given, expect=2)
    assert words in said
    assert not (tmp_path / "cache" / "prompts").exists() and not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "StableDiffusionInstructPix2PixPipeline",
            "a StableDiffusionInstructPix2PixPipeline, cannot be fine-tuned: it draws from images",
        ),
        ("CogView4ControlPipeline", "it draws from images"),
        ("QwenImageEditPipeline", "a QwenImageEditPipeline, cannot be fine-tuned: it draws from images"),
        ("SanaSprintPipeline", "it is a consistency model, which has no velocity"),
        ("LatentConsistencyModelPipeline", "it is a consistency model, which has no velocity"),
        ("GlmImagePipeline", "its network follows a plan of the image, and there are none of your images"),
    ],
)
def test_models_that_are_not_fine_tuned(
    name: str, words: str, data: Path, cache: Path, pretrained: Callable[[str], Path], tmp_path: Path
) -> None:
    flags = ["--init-from", pretrained(name), "--resolution", 32, *LORA]
    said = call(cache, data, "-o", tmp_path / "run", *flags, expect=2)
    assert words in said and ("text-to-image" in said or name not in WITH_EXTRA_CHANNELS)


def test_an_adapter_that_stock_diffusers_could_not_load_is_refused(
    cache: Path, pretrained: Callable[[str], Path], tmp_path: Path
) -> None:
    name = "LuminaPipeline"
    data = photos(tmp_path / "data", 64, 2)
    flags = base_flags(name, pretrained(name))
    said = call(cache, data, "-o", tmp_path / "run", *flags, *QUICK, *LORA, expect=2)
    assert "diffusers loads no adapters into a LuminaPipeline" in said and "leave --lora-rank out" in said


# ---------------------------------------------------------------- captions and classes


def test_images_without_captions(data: Path, line: list[Any], cache: Path, tmp_path: Path) -> None:
    bare = photos(tmp_path / "bare", 16, 4, captions=False)
    said = call(cache, bare, *line, *LORA, expect=2)
    assert "bare has no captions" in said and '--caption "a photo of sks dog"' in said
    assert "--condition none trains without" in said
    for image in bare.glob("*.png"):
        image.with_suffix(".txt").write_text(" \n")
    for flags in ([], ["--missing-caption", "empty"], ["--missing-caption", "skip"]):
        said = call(cache, bare, *line, *LORA, *flags, expect=2)
        assert "caption" in said and "Traceback" not in said
    said = call(cache, bare, *line, *LORA, "--caption", " ", expect=2)
    assert "--caption is empty" in said
    said = call(cache, bare, *line, *LORA, "--caption", "a dog", "--condition", "none", expect=2)
    assert "--caption with --condition none" in said
    for label in ("cat", "dog"):
        photos(tmp_path / "sorted" / label, 16, 2, captions=False)
    assert "sorted has no captions" in call(cache, tmp_path / "sorted", *line, *LORA, expect=2)


@pytest.fixture(scope="module")
def class_base(pretrained: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT whose index names two classes, the first by two names, as the published ones do."""
    folder = Path(shutil.copytree(pretrained("DiTPipeline"), tmp_path_factory.mktemp("base") / "dit"))
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {"0": "tench, Tinca", "1": "café hat"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_classes_that_a_pretrained_model_lacks(class_base: Path, cache: Path, tmp_path: Path) -> None:
    flags = ["-o", tmp_path / "run", "--init-from", class_base, "--resolution", 16, *QUICK]
    for label in ("tench", "dog", "Tench"):
        photos(tmp_path / "data" / label, 16, 2, captions=False)
    said = call(cache, tmp_path / "data", *flags, expect=2)
    assert "dit has no classes named Tench, dog" in said and "It knows" in said and "café hat" in said
    said = call(cache, photos(tmp_path / "words", 16, 2), *flags, expect=2)
    assert "draws classes, and" in said and "words has captions" in said
    said = call(cache, photos(tmp_path / "none", 16, 2, captions=False), *flags, expect=2)
    assert "none has none" in said and "folders named as its classes" in said
    shutil.rmtree(tmp_path / "data" / "Tench")
    (tmp_path / "data" / "dog").rename(tmp_path / "data" / "café hat")
    said = call(cache, tmp_path / "data", *flags, *LORA, expect=2)
    assert "diffusers loads no adapters into a DiTPipeline" in said


# ---------------------------------------------------------------- memory, files


def test_too_little_memory_is_said_before_anything_is_read(
    data: Path, line: list[Any], cache: Path, pretrained: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base = without_weights(pretrained(NAME), tmp_path / "base")
    line[line.index("--init-from") + 1] = base
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=2**30 + 2**18))
    flags = [*line, "--max-train-steps", 2]
    said = call(cache, data, *flags, expect=2)
    assert "GiB of memory, and cpu has 1.0 (--dry-run counts it" in said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_latents_as_data_are_refused(
    data: Path, line: list[Any], cache: Path, pretrained: Callable[[str], Path], tmp_path: Path
) -> None:
    vae = pretrained(NAME) / "vae"
    call(cache, data, "-o", tmp_path / "latents", "--vae", vae, "--resolution", 16, file="precompute")
    said = call(cache, tmp_path / "latents", *line, *LORA, expect=2)
    assert "latents holds latents, and a pretrained model encodes images itself" in said


def test_a_checkpoint_that_is_not_whole(
    data: Path, line: list[Any], pretrained: Callable[[str], Path], tmp_path: Path
) -> None:
    """Weights of each component are missing: it is named, and nothing is trained."""
    for part in ("text_encoder", "vae", "unet"):
        base = Path(shutil.copytree(pretrained(NAME), tmp_path / part))
        for file in (base / part).glob("*.safetensors"):
            file.unlink()
        line[line.index("--init-from") + 1] = base
        said = call(tmp_path / "cache", data, *line, *LORA, expect=2)
        assert f"{tmp_path}/{part}" in said and "again" in said, said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_cache_that_cannot_be_written(data: Path, line: list[Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    said = call(tmp_path / "file" / "cache", data, *line, *LORA, expect=2)
    assert "encoded prompts cannot be kept" in said and "set LATENTFLOW_CACHE to a folder" in said


def test_damaged_encoded_prompts_are_encoded_anew(data: Path, line: list[Any], tmp_path: Path) -> None:
    call(tmp_path / "cache", data, *line, *LORA)
    kept = sorted((tmp_path / "cache" / "prompts").rglob("*.safetensors"))
    before = [file.read_bytes() for file in kept]
    assert len(kept) == 5  # four captions and the empty one
    os.truncate(kept[0], len(before[0]) // 2)
    kept[1].write_bytes(b"")
    call(tmp_path / "cache", data, *line, *LORA, "--max-train-steps", 3)
    assert [file.read_bytes() for file in kept] == before


# ---------------------------------------------------------------- going on


def test_a_run_goes_on_only_with_its_own_settings(
    data: Path, line: list[Any], cache: Path, tmp_path: Path
) -> None:
    masked = Path(shutil.copytree(data, tmp_path / "masked"))
    Image.new("L", (16, 16), 255).save(masked / "1-mask.png")
    call(cache, masked, *line, *LORA)
    again = [masked, *line, *LORA, "--max-train-steps", 3]
    for changes in (
        {
            "--lora-alpha 8": "adapter.lora_alpha: None -> 8.0",
            "--resolution 32": "images.resolution: 16 -> 32",
            "--buckets": "framing.buckets: False -> True",
            "--condition-dropout 0.5": "flow.condition_dropout: 0.1 -> 0.5",
            "--outside-mask 0.5": "outside_mask: 0.1 -> 0.5",
            "--train-batch-size 2": "batch: 1 -> 2",
        },
        {"--quantize int8": "quantize: None -> int8", "--masks none": "captions, classes or masks"},
        {"--lora-rank 0": "adapter: "},
    ):
        said = call(cache, *again, *shlex.split(" ".join(changes)), expect=2)
        assert "was made with other settings" in said, said
        assert [words for words in changes.values() if words not in said] == [], said
    (masked / "0.txt").write_text("a green apple")
    assert "data: other images, captions" in call(cache, *again, expect=2)
    (masked / "0.txt").write_text("a red apple 0")
    call(cache, *again)


def test_a_run_does_not_go_on_beside_other_weights(
    data: Path, line: list[Any], cache: Path, pretrained: Callable[[str], Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(pretrained(NAME), tmp_path / "base"))
    line[line.index("--init-from") + 1] = base
    call(cache, data, *line, *LORA)
    for part, word in (("vae", "autoencoder: another one than before"), ("unet", "adapter.base")):
        file = base / part / "diffusion_pytorch_model.safetensors"
        kept = file.read_bytes()
        save_file({key: value * 1.01 for key, value in load_file(file).items()}, file, {"format": "pt"})
        assert word in call(cache, data, *line, *LORA, "--max-train-steps", 3, expect=2)
        file.write_bytes(kept)


@pytest.mark.parametrize("flag", ["--quantize int8", "--family-options a=1", "--outside-mask 0"])
def test_a_model_of_our_own_takes_no_settings_of_pretrained_ones(
    flag: str, data: Path, cache: Path, tmp_path: Path
) -> None:
    flags = ["-o", tmp_path / "run", "--condition", "none", *QUICK, *flag.split()]
    assert f"{flag.split()[0]} is for pretrained models of diffusers" in call(cache, data, *flags, expect=2)
