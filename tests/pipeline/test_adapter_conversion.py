"""Adapters of our own networks, written in each layout and read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from latentflow.errors import UserError
from latentflow.pipeline import LatentFlowPipeline
from latentflow.pipeline.adapter_conversion import LAYOUTS, in_layout, write_in_layout
from latentflow.pipeline.adapter_layouts import layout_of

from .adapters import make_adapter
from .conftest import awake, quiet, tiny_dit, tiny_text, tiny_vae
from .test_adapter_layouts import tiny_unet

pytest.importorskip("peft", reason='needs peft: pip install -e ".[lora]"')
FILE = "pytorch_lora_weights.safetensors"
NAMED = {"diffusers": "diffusers", "comfyui": "ComfyUI", "kohya": "kohya"}
NETWORKS: dict[str, Callable[[], Any]] = {
    "DiT": lambda: awake(tiny_dit(text_dim=16)),
    "UNet": tiny_unet,
}


@pytest.fixture(scope="module", params=NETWORKS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline with captions."""
    to: Path = tmp_path_factory.mktemp(request.param) / "pipeline"
    LatentFlowPipeline(tiny_vae(), NETWORKS[request.param](), **tiny_text()).save_pretrained(to)
    return to


def image(base: Path, adapter: Path | None = None) -> np.ndarray:
    """Return one image with values in [0, 1], (1, 8, 8, 3)."""
    pipe = quiet(LatentFlowPipeline.from_pretrained(base))
    if adapter is not None:
        pipe.load_lora_weights(adapter)
    generator = torch.Generator().manual_seed(0)
    drawn: np.ndarray = pipe(
        "a red apple", generator=generator, output_type="np", num_inference_steps=2
    ).images
    return drawn


@pytest.mark.parametrize("dora", [False, True])
def test_every_layout_gives_the_same_image(base: Path, tmp_path: Path, dora: bool) -> None:
    """With the text encoder's layers, and an alpha that is not the rank; what the file says of its base stays."""
    make_adapter(
        base, tmp_path / "made", lora_alpha=5.0, lora_text_encoder=True, lora_dora=dora, lora_layers=["all"]
    )
    expected = image(base, tmp_path / "made")
    assert np.abs(expected - image(base)).max() > 0.01
    for layout in LAYOUTS:
        write_in_layout(tmp_path / "made" / FILE, file := tmp_path / f"{layout}.safetensors", layout)
        assert np.abs(image(base, file) - expected).max() < 1e-5, layout
        assert layout_of(load_file(file)) == NAMED[layout]
        with safe_open(file, "pt") as opened:
            assert "latentflow" in opened.metadata()
    names = load_file(tmp_path / "kohya.safetensors")
    assert {name[:9] for name in names} == {"lora_unet", "lora_te1_"}


def test_words_are_refused(base: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path, words=["zebra"])
    for layout in ("comfyui", "kohya"):
        with pytest.raises(
            UserError, match=r"brings new words, which .* cannot hold\nLeave it in diffusers'"
        ):
            write_in_layout(tmp_path / FILE, tmp_path / "other", layout)
    assert not (tmp_path / "other").exists()
    write_in_layout(tmp_path / FILE, tmp_path / "same", "diffusers")
    same, made = load_file(tmp_path / "same"), load_file(tmp_path / FILE)
    assert same.keys() == made.keys() and all(torch.equal(same[name], made[name]) for name in made)


def test_adapters_whose_strength_or_names_are_unknown() -> None:
    layer = {"transformer.x.lora_A.weight": torch.ones(2, 3), "transformer.x.lora_B.weight": torch.ones(4, 2)}
    with pytest.raises(UserError, match="unknown layout 'comfy'\ndid you mean 'comfyui'"):
        in_layout(layer, None, "comfy")
    for settings in ({"transformer.r": 2}, {"transformer.r": 2, "transformer.lora_alpha": None}):
        with pytest.raises(UserError, match=r"its settings for the transformer lack an alpha \(lora_alpha\)"):
            in_layout(layer, settings, "kohya")
    down, up = layer
    for broken in ({down: layer[down]}, {up: layer[up]}, {**layer, up: torch.ones(4, 3)}):
        with pytest.raises(UserError, match=r"lacks a factor of transformer\.x, or its factors differ"):
            in_layout(broken, None, "kohya")
    kohya = in_layout(layer, None, "kohya")
    with pytest.raises(UserError, match="is in another layout: kohya"):
        in_layout(kohya, None, "comfyui")
    with pytest.raises(UserError, match="is no LoRA adapter"):
        in_layout({"transformer.x.hada_w1_a": torch.ones(2, 2)}, None, "kohya")
    with pytest.raises(UserError, match=r"x\.lora_B\.bias, which is not read back from ComfyUI's layout"):
        in_layout({**layer, "transformer.x.lora_B.bias": torch.ones(4)}, None, "comfyui")


def test_alpha_over_rank_is_in_the_tensors() -> None:
    """By each layer's own: patterns and rank-stabilised scales count, and kohya's alpha says that there is nothing
    left to multiply."""
    layers = {
        f"transformer.{name}.lora_{side}.weight": torch.ones(shape)
        for name in ("a", "b.c")
        for side, shape in (("A", (4, 3)), ("B", (5, 4)))
    }
    settings = {
        "transformer.r": 4, "transformer.lora_alpha": 6.0, "transformer.alpha_pattern": {"c": 2.0},
        "transformer.use_rslora": True,
    }  # fmt: skip
    written = in_layout(layers, settings, "kohya")
    expected = {
        "lora_unet_a.lora_down.weight": torch.ones(4, 3), "lora_unet_a.lora_up.weight": torch.full((5, 4), 3.0),
        "lora_unet_a.alpha": torch.tensor(4), "lora_unet_b_c.lora_down.weight": torch.ones(4, 3),
        "lora_unet_b_c.lora_up.weight": torch.ones(5, 4), "lora_unet_b_c.alpha": torch.tensor(4),
    }  # fmt: skip
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(written[name].float(), value.float()), name
