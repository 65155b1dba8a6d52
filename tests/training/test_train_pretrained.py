"""`latentflow train --init-from` a pretrained model: what it learns, and what stock diffusers opens of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from latentflow import LatentFlowPipeline
from latentflow.config import AdapterConfig, LoopConfig
from latentflow.families import Rows
from latentflow.training.fine_tune.pretrained_base import PretrainedBase
from latentflow.training.fine_tune.pretrained_settings import base_dtype
from latentflow.training.fine_tune.prompts import EncodedPrompts
from latentflow.training.losses.pretrained import PretrainedLoss

from ..families.test_family_programs import STAND_INS
from ..families.test_lora_training import LOADED
from ..families.test_pretrained import drawn, grid, images, stock
from ..families.tiny import TINY, small
from .command import call
from .pretrained import QUICK, adapter, base_flags, photos, validated

PROMPT = "a red apple"
pytestmark = pytest.mark.usefixtures("no_memorisation")


def opened(folder: Path, name: str) -> Any:
    """Return our pipeline over a saved checkpoint."""
    pipe = LatentFlowPipeline.from_pretrained(folder, family_options=TINY[name].call)
    small(pipe.model.pipeline, name)
    return pipe


def opened_by_diffusers(folder: Path, name: str) -> Any:
    """Return the stock pipeline of a saved checkpoint."""
    return small(getattr(diffusers, name.partition("-")[0]).from_pretrained(folder), name)


def ours(pipe: Any, name: str) -> torch.Tensor:
    """Draw as `stock` does: by Euler's method, on the noise levels of the pipeline's scheduler."""
    times = grid(name)
    with torch.no_grad():
        rows = pipe.model.encode_prompt([PROMPT]).repeat(2)
        found = drawn(name, pipe.model.velocity(rows, times=times), times)
        return images(name, found)[:1]


def theirs(pipe: Any, name: str) -> torch.Tensor:
    options = {"negative_prompt": ""} if "QwenImage" in name else {}  # without one it does not guide
    with torch.no_grad():
        return stock(name, [PROMPT], pipe, **options)


def train(name: str, base: Path, cache: Path, run: Path, *flags: object) -> str:
    """Train 30 steps on six images, which lower the loss on these and on two that are held out."""
    data = photos(run.parent / "data", TINY[name].side)
    line = [data, "-o", run, *base_flags(name, base), *QUICK, "--validation", 0.25, "--validation-steps", 10]
    said = call(cache, *line, "--max-train-steps", 30, "--learning-rate", "3e-3", *flags)
    assert "6 images to train on, 2 held out; condition: text" in said
    losses = validated(run)
    assert losses.keys() == {10, 20, 30} and losses[30] < losses[20] < losses[10]
    learned = json.loads((run / "learning.json").read_text())
    assert learned["after"] < learned["before"] - 2 * learned["error"]
    return said


def saved_parts(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("*/*") if file.is_file()}


def by_default(names: list[str], default: tuple[str, ...]) -> Any:
    """Parametrise a test with tiny checkpoints that open from their folder; all but a few are slow."""
    return pytest.mark.parametrize(
        "name",
        [
            name if name in default else pytest.param(name, marks=pytest.mark.slow)
            for name in names
            if name not in STAND_INS and name != "DiTPipeline"
        ],
    )


@by_default(LOADED, ("FluxPipeline-dev",))
def test_30_steps_on_8_images_learn_an_adapter_that_the_stock_pipeline_opens(
    name: str, pretrained: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    base, run = pretrained(name), tmp_path / "run"
    train(name, base, cache, run, "--lora-rank", 2, "--lora-alpha", 3)
    our_pipe, stock_pipe = opened(base, name), opened_by_diffusers(base, name)
    plain = ours(our_pipe, name)
    our_pipe.load_lora_weights(run / "adapter")
    stock_pipe.load_lora_weights(run / "adapter")  # by diffusers' own loader
    learned = ours(our_pipe, name)
    assert float((learned - plain).abs().max()) > 1e-3
    torch.testing.assert_close(theirs(stock_pipe, name), learned, rtol=0.0, atol=1e-5)
    for pipe, draw in ((our_pipe, ours), (stock_pipe, theirs)):
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        torch.testing.assert_close(draw(pipe, name), learned, rtol=0.0, atol=2e-5)
    assert {key.rpartition(".lora_")[2] for key in adapter(run)} >= {"A.weight", "B.weight"}


@by_default([*TINY], ("Flux2KleinPipeline",))
def test_a_full_training_is_a_pipeline_of_the_family_with_the_other_components_as_they_were(
    name: str, pretrained: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    base, run = pretrained(name), tmp_path / "run"
    rate = (
        "3e-3" if name == "HunyuanDiTPipeline" else "1e-3"
    )  # its 30 steps at the lower one are within the error
    said = train(name, base, cache, run, "--lora-rank", 0, "--learning-rate", rate)
    assert "parameters are trained" in said and not (run / "adapter").exists()
    result = opened_by_diffusers(run / "pipeline", name)
    assert type(result).__name__ == name.partition("-")[0]
    our_pipe = opened(run / "pipeline", name)
    torch.testing.assert_close(theirs(result, name), ours(our_pipe, name), rtol=0.0, atol=1e-5)
    before, after = (dict(pipe.model.network.named_parameters()) for pipe in (opened(base, name), our_pipe))
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert before.keys() == after.keys() and len(moved) > 0.8 * len(before)
    network = next(part for part, module in result.components.items() if module is _network(result))
    old, new = saved_parts(base), saved_parts(run / "pipeline")
    others = [file for file in old if not file.startswith(f"{network}/")]
    assert others and all(new[file] == old[file] for file in others)
    assert (run / "pipeline" / "model_index.json").read_bytes() == (base / "model_index.json").read_bytes()


def _network(pipe: Any) -> Any:
    return getattr(pipe, "transformer", None) or pipe.unet


def test_a_full_training_may_be_saved_in_bfloat16(
    pretrained: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    name, data, weights = "StableDiffusionPipeline", photos(tmp_path / "data", 16), {}
    for dtype in ("float32", "bfloat16"):
        line = [data, "-o", tmp_path / dtype, *base_flags(name, pretrained(name)), *QUICK]
        call(cache, *line, "--max-train-steps", 2, "--export-dtype", dtype)
        weights[dtype] = load_file(
            tmp_path / dtype / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
        )
    assert weights["float32"].keys() == weights["bfloat16"].keys()
    for key, value in weights["float32"].items():
        assert torch.equal(weights["bfloat16"][key], value.bfloat16())
    for part in ("vae", "text_encoder"):
        files = [
            sorted((folder / part).glob("*.safetensors"))
            for folder in (tmp_path / "bfloat16" / "pipeline", pretrained(name))
        ]
        assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    opened_by_diffusers(tmp_path / "bfloat16" / "pipeline", name)


@pytest.fixture(scope="module")
def half(pretrained: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that is stored in float16 alone, as a variant."""
    base = tmp_path_factory.mktemp("half") / "base"
    kind, folder = diffusers.StableDiffusionPipeline, pretrained("StableDiffusionPipeline")
    kind.from_pretrained(folder, torch_dtype=torch.float16).save_pretrained(base, variant="fp16")
    return base


def test_autoencoder_and_adapter_are_in_float32_whatever_the_precision(
    half: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDXL's autoencoder overflows in float16."""
    seen: dict[str, torch.dtype] = {}
    forward = PretrainedLoss.forward

    def looked_at(loss: PretrainedLoss, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        model = loss._model[0]
        network = model.network.conv_in.weight.dtype
        seen.update(vae=model.vae.dtype, network=network, latents=batch["latents"].dtype)
        return forward(loss, batch)

    monkeypatch.setattr(PretrainedLoss, "forward", looked_at)
    data = photos(tmp_path / "data", 16, 2)
    line = [data, "-o", tmp_path / "run", *base_flags("StableDiffusionPipeline", half), *QUICK]
    call(cache, *line, "--lora-rank", 2, "--max-train-steps", 1, "--mixed-precision", "bf16")
    assert seen == {"vae": torch.float32, "network": torch.bfloat16, "latents": torch.float32}
    assert all(value.dtype == torch.float32 for value in adapter(tmp_path / "run").values())
    fp16, lora = LoopConfig(mixed_precision="fp16"), AdapterConfig(lora_rank=2)
    assert base_dtype(fp16, lora, torch.device("cuda")) == torch.float16
    assert PretrainedBase.of(str(half)).open_autoencoder().dtype == torch.float32


def test_the_result_of_a_base_that_is_stored_as_a_variant_opens_without_naming_one(
    half: Path, cache: Path, tmp_path: Path
) -> None:
    data, name = photos(tmp_path / "data", 16, 2), "StableDiffusionPipeline"
    call(cache, data, "-o", tmp_path / "run", *base_flags(name, half), *QUICK, "--max-train-steps", 1)
    opened_by_diffusers(tmp_path / "run" / "pipeline", name)
    opened(tmp_path / "run" / "pipeline", name)
    vae = (half / "vae" / "diffusion_pytorch_model.fp16.safetensors").read_bytes()
    assert (tmp_path / "run/pipeline/vae/diffusion_pytorch_model.safetensors").read_bytes() == vae


def test_a_plan_reads_no_weights_and_makes_nothing(
    pretrained: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    name = "FluxPipeline-dev"
    base = tmp_path / "base"
    shutil.copytree(pretrained(name), base, ignore=shutil.ignore_patterns("*.safetensors"))
    data = photos(tmp_path / "data", 16)
    there = sorted(tmp_path.rglob("*"))
    said = call(cache, data, "-o", tmp_path / "run", *base_flags(name, base), "--lora-rank", 2, "--dry-run")
    assert sorted(tmp_path.rglob("*")) == there
    for words in (
        "memory to train an adapter of rank 2 on 1 x 16 x 16 pixels a step",
        "a FluxPipeline whose network has 0 M parameters",
        "settings: --lora-rank 2",
        "train_dreambooth_lora_flux.py",
        "12 GB: fits",
        "80 GB: fits",
    ):
        assert words in said, words
    said = call(cache, data, "-o", tmp_path / "run", *base_flags(name, base), "--lora-rank", 2, expect=2)
    assert "base" in said and "no file named" in said


def test_one_caption_for_images_that_have_none(
    pretrained: Callable[[str], Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, encoded = "StableDiffusionPipeline", []
    data = photos(tmp_path / "data", 16, 4, captions=False)
    (data / "2.txt").write_text("a blue apple")
    write = EncodedPrompts.encode

    def encode(self: EncodedPrompts, model: Any, texts: list[str], **options: Any) -> None:
        encoded.extend(texts)
        write(self, model, texts, **options)

    monkeypatch.setattr(EncodedPrompts, "encode", encode)
    line = [data, "-o", tmp_path / "run", *base_flags(name, pretrained(name)), *QUICK, "--max-train-steps", 1]
    said = call(cache, *line, "--caption", "a photo of sks dog")
    assert "3 images without a caption, given this one: a photo of sks dog" in said
    assert encoded == ["a photo of sks dog"] * 2 + ["a blue apple"] + ["a photo of sks dog"]


@pytest.mark.parametrize(
    "name", [pytest.param("StableDiffusionPipeline", marks=pytest.mark.slow), "FluxPipeline-dev"]
)
def test_without_a_condition_the_network_sees_the_empty_prompt(
    name: str, pretrained: Callable[[str], Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Rows] = []
    prompts = PretrainedLoss.prompts
    monkeypatch.setattr(
        PretrainedLoss, "prompts", lambda self, *given: (seen.append(prompts(self, *given)), seen[-1])[1]
    )
    data = photos(tmp_path / "data", 16, 2)
    line = [data, "-o", tmp_path / "run", *base_flags(name, pretrained(name)), *QUICK, "--lora-rank", 2]
    said = call(cache, *line, "--condition", "none", "--max-train-steps", 2, "--preview-steps", 2)
    assert "condition: unconditional" in said
    model = opened(pretrained(name), name).model
    with torch.no_grad():
        null = model.null(1).values
    assert seen and (tmp_path / "run" / "samples" / "step-000002.png").is_file()
    for rows in seen:
        assert all(torch.equal(rows.values[key], null[key]) for key in null)


def test_a_model_of_classes_learns_from_folders_named_as_they_are(
    pretrained: Callable[[str], Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first class has two names, the second is spelled as macOS writes it; others' images are numbered alike."""
    base, name = tmp_path / "base", "DiTPipeline"
    shutil.copytree(pretrained(name), base)
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(
        json.dumps({**index, "id2label": {"0": "tench, Tinca", "5": "café"}})
    )
    for label in ("tench", "cafe\u0301"):
        photos(tmp_path / "data" / label, 16, 2, captions=False)
    labels: list[int] = []
    prompts = PretrainedLoss.prompts

    def seen(loss: PretrainedLoss, batch: dict[str, Any], drop: Any = None) -> Any:
        labels.extend(batch["rows.labels"].tolist())
        return prompts(loss, batch, drop)

    monkeypatch.setattr(PretrainedLoss, "prompts", seen)
    line = [tmp_path / "data", "-o", tmp_path / "run", *base_flags(name, base), *QUICK]
    said = call(cache, *line, "--max-train-steps", 4, "--preview-steps", 4)
    assert "condition: class" in said and "2 classes" in said
    assert {*labels} == {0, 5}
    assert (tmp_path / "run" / "samples" / "step-000004.png").is_file()
    pipe = diffusers.DiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.labels["tench"] == 0 and pipe.labels["café"] == 5
