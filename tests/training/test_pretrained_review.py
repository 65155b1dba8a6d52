"""What a fine-tune of a pretrained model computes and keeps: losses of rows, latents, precision, caches, memory."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F

from latentflow.autoencoder import latent_channels
from latentflow.config import DataConfig, FlowConfig, LoopConfig, RunConfig
from latentflow.data import find_source
from latentflow.errors import UserError
from latentflow.families.from_configs import model_from_configs
from latentflow.training.data import LatentCache
from latentflow.training.fine_tune import pretrained_base
from latentflow.training.fine_tune.memory_plan import GIB, MemoryPlanner, plan_of, refuse_too_large
from latentflow.training.fine_tune.pretrained_base import PretrainedBase, drawing_precision
from latentflow.training.fine_tune.prompts import EncodedPrompts
from latentflow.training.losses.pretrained import PretrainedLoss, in_batch
from latentflow.training.pretrained_result import _beside_network, _in_main_memory

from ..families.test_pretrained import each_family, opened, seeded
from .pretrained import photos

# of four lengths, none and the longest within what every tiny checkpoint reads
PROMPTS = ["", "a red apple on a table beside a tall bottle", "a red cat on a mat", "two dogs"]


# ---------------------------------------------------------------- numbers


@each_family
def test_a_sample_s_loss_does_not_depend_on_those_beside_it(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Prompts of different lengths, some of them dropped, from the cache."""
    _, model, tiny = opened(name)
    if model.needs_images or model.extra or not model.has_velocity:
        pytest.skip("is not fine-tuned")
    monkeypatch.setenv("LATENTFLOW_CACHE", str(tmp_path))
    latents = torch.randn(4, *model.latent_shape(tiny.side, tiny.side), generator=seeded(3))
    prompts = EncodedPrompts({"model": name})
    if model.takes_text:
        prompts.encode(model, PROMPTS, progress=False)
    loss = PretrainedLoss(model, FlowConfig(condition_dropout=0.5), seed=1).train()

    def losses(rows: list[int]) -> torch.Tensor:
        condition = (
            prompts.rows([PROMPTS[row] for row in rows])
            if model.takes_text
            else model.encode_class([row % 3 for row in rows])
        )
        batch = {"latents": latents[rows], **in_batch(condition), "sample_ids": [10 + row for row in rows]}
        with torch.no_grad():
            return loss(batch)["per_sample"]

    alone = torch.cat([losses([row]) for row in range(4)])
    torch.testing.assert_close(losses([0, 1, 2, 3]), alone, rtol=1e-5, atol=0.0)


def test_own_encodings_of_images_keep_their_deviation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Qwen-Image 2.1's training program learns samples of the posterior of opaque images."""
    _, model, _ = opened("QwenImage21Pipeline")
    monkeypatch.setenv("LATENTFLOW_CACHE", str(tmp_path / "cache"))
    source = find_source(str(photos(tmp_path / "data", 16, 2)))
    cache = LatentCache(
        data=DataConfig(data=str(tmp_path / "data"), resolution=16), framing=RunConfig.framing, model=model,
        trains_text=False, has_masks=False, needs_pixels=False, seed=0,
    )  # fmt: skip
    batch = cache.latents(cache.framed(source), lambda rows, ids: {}).__getitems__([_use(0), _use(1)])
    vae = model.vae
    images = torch.stack([_pixels(source, row) for row in range(2)])
    with torch.no_grad():
        opaque = F.pad(images, (0, 0, 0, 0, 0, vae.config.in_channels - 3), value=1.0)
        found = vae.encode(opaque.unsqueeze(2)).latent_dist
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    assert batch["latents"].shape[1] == latent_channels(vae)
    torch.testing.assert_close(batch["latents"], (found.mean.squeeze(2) - mean) / std, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(batch["latents_std"], found.std.squeeze(2) / std, atol=1e-5, rtol=1e-4)


def _use(index: int) -> Any:
    return SimpleNamespace(index=index, sample_id=index)


def _pixels(source: Any, row: int) -> torch.Tensor:
    from torchvision.transforms.functional import pil_to_tensor

    return pil_to_tensor(source.examples[row].open()).float() / 127.5 - 1


@pytest.mark.parametrize(
    ("name", "lower"), [("StableDiffusion3Pipeline", True), ("Ideogram4Pipeline", False)]
)
def test_images_are_drawn_in_a_precision_that_the_network_bears(
    name: str, lower: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Previews and prior samples of Ideogram 4 would turn grey under autocast."""
    _, model, _ = opened(name)
    monkeypatch.setattr(pretrained_base, "has_fast_bfloat16", lambda device: True)
    with drawing_precision(model, torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") == lower


# ---------------------------------------------------------------- cache


def test_settings_of_the_pipeline_have_encoded_prompts_of_their_own(
    pretrained: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stable Diffusion XL's null is zeros, or the empty prompt."""
    monkeypatch.setenv("LATENTFLOW_CACHE", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(pretrained("StableDiffusionXLPipeline"), tmp_path / "base"))
    nulls = []
    for zeros in (True, False):
        index = json.loads((folder / "model_index.json").read_text()) | {
            "force_zeros_for_empty_prompt": zeros
        }
        (folder / "model_index.json").write_text(json.dumps(index))
        base = PretrainedBase.of(str(folder))
        prompts = base.encoded_prompts(None, torch.float32)
        assert not prompts.has_null
        prompts.encode(base.open_encoders(torch.device("cpu"), torch.float32), [], progress=False)
        nulls.append(prompts.null().values["embeds"])
    assert not nulls[0].any() and nulls[1].any()


# ---------------------------------------------------------------- before anything is encoded


def test_a_tracker_that_is_not_installed_is_missed_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else name)
    with pytest.raises(UserError, match=r"--report-to tensorboard needs tensorboard"):
        LoopConfig(report_to="tensorboard")


def test_a_batch_that_may_be_split_need_not_fit_whole(
    pretrained: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, cpu = model_from_configs(pretrained("StableDiffusion3Pipeline")), torch.device("cpu")

    def config(**loop: Any) -> RunConfig:
        data = DataConfig(data="x", resolution=16)
        return RunConfig(data=data, output="x", init_from="x", loop=LoopConfig(train_batch_size=64, **loop))

    whole = MemoryPlanner(shape).plan(plan_of(config(), torch.float32)).peak
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=whole / 2 + GIB))
    with pytest.raises(UserError, match=r"this run takes .* GiB of memory"):
        refuse_too_large(shape, config(), torch.float32, cpu)
    refuse_too_large(shape, config(auto_micro_batch=True), torch.float32, cpu)


# ---------------------------------------------------------------- result


def test_all_that_draws_is_brought_to_the_device_for_a_preview(
    pretrained: Callable[[str], Path],
) -> None:
    base = PretrainedBase.of(str(pretrained("Ideogram4Pipeline")), ["max_sequence_length=32"])
    model = base.open_network(base.open_autoencoder(), torch.float32)
    parts = _beside_network(model)
    assert {id(part) for part in parts} == {id(model.vae), id(model.pipeline.unconditional_transformer)}


def test_a_result_in_another_precision_is_the_rounded_network(tmp_path: Path) -> None:
    _, model, _ = opened("FluxPipeline")
    made = _in_main_memory(model.network, torch.bfloat16)
    made.save_pretrained(tmp_path)
    read = type(model.network).from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours, theirs = (
        {name: value for name, value in one.config.items() if name[0] != "_"} for one in (model.network, read)
    )
    assert json.dumps(ours) == json.dumps(theirs)  # lists, where tuples were given
    rounded = {name: value.to(torch.bfloat16) for name, value in model.network.state_dict().items()}
    saved = read.state_dict()
    assert saved.keys() == rounded.keys()
    assert all(torch.equal(saved[name], value) for name, value in rounded.items())
