"""Training steps of pretrained models: as fast as diffusers' own program, and without waiting for the GPU."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from fine_tune_pretrained import (
    SIZES,
    Setting,
    adapted_layers,
    lines,
    measure,
    ratios,
    run,
    save_checkpoint,
    save_images,
)

from latentflow.config import AdapterConfig, FlowConfig
from latentflow.families import FAMILIES
from latentflow.training.fine_tune.pretrained_adapter import PretrainedAdapter
from latentflow.training.loop.loader import to_device
from latentflow.training.losses.pretrained import PretrainedLoss, in_batch

from .test_pretrained import seeded
from .tiny import TINY, checkpoint

ROOT = Path(__file__).resolve().parents[2]
#: their networks in diffusers, or stock functions that prepare their inputs, look at values
WAITING = (
    "Lumina2Pipeline", "GlmImagePipeline", "HiDreamImagePipeline", "Ideogram4Pipeline", "HunyuanImagePipeline",
    "HunyuanImagePipeline-distilled", "QwenImage21Pipeline", "BriaFiboPipeline", "BriaFibo2Pipeline",
    "NucleusMoEImagePipeline", "ErnieImagePipeline", "LuminaPipeline", "OmniGenPipeline",
)  # fmt: skip
# the noise levels of diffusion models are found in the scheduler's table, before the network computes
FLOWS = [name for name in TINY if "beta_start" not in TINY[name].scheduler and name not in WAITING]
QUICK = ("StableDiffusion3Pipeline", "FluxPipeline-dev", "Flux2KleinPipeline", "QwenImagePipeline")
SCRIPT = os.environ.get("DIFFUSERS_KLEIN_SCRIPT", "")
needs_script = pytest.mark.skipif(
    not SCRIPT, reason="DIFFUSERS_KLEIN_SCRIPT names no copy of train_dreambooth_lora_flux2_klein.py"
)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FLOWS]
)
def test_a_loss_looks_at_no_value_on_the_device(name: str) -> None:
    """Each look makes the CPU wait until a GPU is done. Tensors on the meta device have no values: a look is an error,
    as is a tensor that was left on the CPU. Prompts are dropped as well."""
    pipe: Any = deepcopy(checkpoint(name))
    model: Any = FAMILIES[name.partition("-")[0]](pipe, **TINY[name].call)
    with torch.no_grad():
        latents = model.encode(
            torch.rand(2, 3, TINY[name].side, TINY[name].side, generator=seeded(3)) * 2 - 1
        )
        rows = model.encode_prompt(["a red apple", "a small house"])
    loss = PretrainedLoss(model, FlowConfig(condition_dropout=0.999), seed=1)
    batch = {"latents": latents, **in_batch(rows), "sample_ids": [0, 1]}
    model.network.to("meta").requires_grad_(True)
    found = loss.train()(to_device(batch, torch.device("meta")))
    found["loss"].backward()
    assert found["loss"].device.type == "meta"


def test_a_lora_in_float32_computes_in_bfloat16_beside_a_base_in_bfloat16() -> None:
    """Also under autocast; its gradients are float32, and those of a base in float32 but for rounding."""
    pipe: Any = deepcopy(checkpoint("FluxPipeline-dev"))
    model: Any = FAMILIES["FluxPipeline"](pipe, **TINY["FluxPipeline-dev"].call)
    with torch.no_grad():
        rows = model.encode_prompt(["a red apple"])
    batch = {
        "latents": torch.randn(1, *model.latent_shape(16, 16), generator=seeded(4)),
        **in_batch(rows),
        "sample_ids": [0],
    }
    pipe.transformer.to(torch.bfloat16)
    PretrainedAdapter(model, AdapterConfig(lora_rank=2))
    learned = [weight for weight in model.network.parameters() if weight.requires_grad]
    for number, weight in enumerate(learned):
        assert weight.dtype == torch.float32
        nn.init.normal_(weight, std=0.1, generator=seeded(number))
    seen: set[torch.dtype] = set()
    for layer in model.network.modules():
        if isinstance(layer, nn.Linear | nn.LayerNorm):
            layer.register_forward_hook(
                lambda layer, given, output: seen.update((given[0].dtype, output.dtype))
            )

    def gradient() -> torch.Tensor:
        model.network.zero_grad()
        PretrainedLoss(model, FlowConfig(), seed=1)(batch)["loss"].backward()
        found = [weight.grad for weight in learned if weight.grad is not None]
        assert len(found) == len(learned) and {value.dtype for value in found} == {torch.float32}
        return torch.cat([value.flatten() for value in found])

    with torch.autocast("cpu", torch.bfloat16):
        low = gradient()
    assert seen == {torch.bfloat16}
    pipe.transformer.float()
    high = gradient()
    assert float(torch.cosine_similarity(low, high, dim=0)) > 0.99


def test_the_benchmark_prints_medians_and_ratios_of_pairs() -> None:
    made = {"ours": [3.0, 2.0], "theirs": [2.0, 2.0], "memory ours": [1.0, 1.0], "memory theirs": [2.0, 4.0]}
    assert ratios(made) == [1.0, 1.5]
    assert lines(made) == [
        "| images/s | 2.500 | 2.000 | 1.250 [1.000..1.500] |",
        "| memory, GB | 1.00 | 3.00 | 0.375 [0.250..0.500] |",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("inpainting", [False, True])
def test_the_benchmark_runs_our_command(inpainting: bool, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", SIZES["tiny"])
    save_images(tmp_path / "images", 64)
    assert len(adapted_layers(tmp_path / "model")) == 16
    setting = Setting("bfloat16", True, 64, 2, 1, inpainting)
    found = run("ours", setting, tmp_path, Path(), warm_up=1, steps=2)
    assert len(found["seconds"]) == 2 and min(found["seconds"]) > 0 and found["memory"] > 1e8


@pytest.mark.slow
@needs_script
def test_diffusers_program_runs_in_the_benchmark(tmp_path: Path) -> None:
    found = measure(Setting("float32", False, 64, 2, 1), "tiny", Path(SCRIPT), 1, 1, 2, tmp_path)
    assert found.keys() == {"ours", "theirs", "memory ours", "memory theirs"}


@pytest.mark.gpu
@needs_script
@pytest.mark.parametrize("precision", ["bfloat16", "nf4"])
def test_a_network_of_4b_trains_as_fast_as_in_diffusers_program(precision: str, tmp_path: Path) -> None:
    """FLUX.2 klein's shape at 512 pixels, rank 16: images per second at least its, peak memory at most its."""
    found = measure(Setting(precision, False, 512, 16, 1), "4b", Path(SCRIPT), 3, 10, 40, tmp_path)
    print("\n".join(lines(found)))
    assert statistics.median(ratios(found)) >= 1.0
    assert statistics.median(ratios(found, "memory ")) <= 1.0


@pytest.mark.gpu
def test_masks_cost_little_in_a_network_of_4b(tmp_path: Path) -> None:
    """FLUX.2 klein's shape at 512 pixels, rank 16: with masks at least 0.9 of the images per second without."""
    save_checkpoint(tmp_path / "model", SIZES["4b"])
    save_images(tmp_path / "images", 512)
    plain = Setting("bfloat16", False, 512, 16, 1)
    speeds = []
    for _ in range(3):
        seconds = [
            statistics.median(run("ours", setting, tmp_path, Path(), warm_up=10, steps=40)["seconds"])
            for setting in (plain, replace(plain, inpainting=True))
        ]
        speeds.append(seconds[0] / seconds[1])
    assert statistics.median(speeds) >= 0.9


@pytest.mark.gpu
def test_beside_a_base_in_nf4_an_adapter_learns_and_draws(tmp_path: Path) -> None:
    """By the commands, in processes of their own; the second draws with the quantised base as well."""
    save_checkpoint(tmp_path / "model", SIZES["tiny"])
    save_images(tmp_path / "images", 64, count=8)
    output = tmp_path / "run"
    line = ["train", tmp_path / "images", "--init-from", tmp_path / "model", "-o", output, "--resolution", 64]
    line += ["--quantize", "nf4", "--lora-rank", 4, "--learning-rate", "1e-3", "--validation", 0.25]
    line += ["--validation-steps", 10, "--max-train-steps", 30, "--preview-steps", 30, "--log-steps", 1]
    command(line)
    rows = [json.loads(row) for row in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert len(losses) == 3 and losses[2] < losses[0]
    line = ["generate", "a red apple", "--checkpoint", tmp_path / "model", "--lora", output / "adapter"]
    line += ["--quantize", "nf4", "--steps", 4, "--height", 64, "--width", 64, "-o", tmp_path / "drawn.png"]
    command(line)
    pixels = np.asarray(Image.open(tmp_path / "drawn.png"))
    assert pixels.shape == (64, 64, 3) and pixels.std() > 0


def command(arguments: list[Any]) -> None:
    """Run `latentflow` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "latentflow", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
