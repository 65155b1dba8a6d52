"""Half precision, and weights stored in float8: every pipeline draws nearly what it draws in float32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from latentflow.pipeline import LatentFlowPipeline
from latentflow.pipeline.img2img import LatentFlowImg2ImgPipeline

from .adapters import make_adapter
from .conftest import quiet, seeds
from .test_offload import NETWORKS, draw, sequential, tiny_pipe

FLOAT8, HALF = torch.float8_e4m3fn, torch.bfloat16


@pytest.fixture(params=NETWORKS)
def pipe(request: pytest.FixtureRequest) -> LatentFlowPipeline:
    return tiny_pipe(NETWORKS[request.param]())


# Largest difference of a value of an image in [0, 1], or of a latent, from float32's: twice what was seen.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.06), (torch.float16, 0.006)], ids=str)
def test_half_precision_draws_nearly_the_same(
    dtype: torch.dtype, bound: float, pipe: LatentFlowPipeline, images: Any
) -> None:
    expected = draw(pipe, images())
    pipe.to(dtype)
    for name, made in draw(pipe, images()).items():
        assert made.dtype == torch.float32
        assert (made - expected[name]).abs().max() < bound, name


def stored(pipe: LatentFlowPipeline, compute: torch.dtype | None) -> dict[str, list[str]]:
    """Store the weights of network and autoencoder in float8; return component -> names of those that are."""
    narrow = {}
    for name in ("transformer", "vae"):
        component = getattr(pipe, name)
        component.enable_layerwise_casting(FLOAT8, compute)
        narrow[name] = [key for key, value in component.named_parameters() if value.dtype == FLOAT8]
    return narrow


@pytest.mark.parametrize(("compute", "bound"), [(torch.float32, 0.34), (HALF, 0.37)], ids=str)
def test_float8_is_the_network_with_its_weights_rounded(
    compute: torch.dtype, bound: float, pipe: LatentFlowPipeline, images: Any
) -> None:
    expected = draw(pipe, images())
    pipe.vae.to(compute)  # diffusers leaves the norms of its autoencoder in the type that they have
    rounded = tiny_pipe(copy.deepcopy(pipe.transformer).to(compute), copy.deepcopy(pipe.vae))
    narrow = stored(pipe, compute)
    with torch.no_grad():
        for component, names in narrow.items():
            for name in names:
                weight = getattr(rounded, component).get_parameter(name)
                weight.copy_(weight.to(FLOAT8))
    made, wanted = draw(pipe, images()), draw(rounded, images())
    for name in made:
        assert torch.equal(made[name], wanted[name]), name
        assert (made[name] - expected[name]).abs().max() < bound, name
    assert pipe.transformer.dtype == compute
    again = {
        name: [key for key, value in getattr(pipe, name).named_parameters() if value.dtype == FLOAT8]
        for name in narrow
    }
    assert again == narrow and sum(map(len, narrow.values())) > 20


def test_what_float8_leaves_out(pipe: LatentFlowPipeline) -> None:
    pipe.transformer.enable_layerwise_casting(compute_dtype=HALF)
    weights = dict(pipe.transformer.named_parameters())
    kept = {name for name, value in weights.items() if value.dtype != FLOAT8}
    assert {weights[name].dtype for name in kept} == {HALF}
    parts = ("embedder", "norm", "final_layer", "qk_scale", "register_tokens", "pos_embed")
    assert all(any(part in name for part in parts) for name in kept)
    assert all("norm" not in name and "embedder" not in name for name in weights.keys() - kept)


def test_float8_and_offloading_together(pipe: LatentFlowPipeline, images: Any, monkeypatch: Any) -> None:
    pipe.transformer.enable_layerwise_casting(FLOAT8, torch.float32)
    expected = draw(pipe, images())
    sequential(pipe, monkeypatch)
    for name, made in draw(pipe, images()).items():
        assert torch.equal(made, expected[name]), name


def test_pipelines_that_share_components_leave_them_as_they_are(images: Any) -> None:
    pipe = tiny_pipe(NETWORKS["DiT of captions"]())
    pipe.transformer.to(HALF)
    pipe.text_encoder.to(torch.float16)
    other = quiet(LatentFlowImg2ImgPipeline.from_pipe(pipe))
    assert other.transformer is pipe.transformer and other.config.path == pipe.config.path
    assert [part.dtype for part in (pipe.vae, pipe.transformer, pipe.text_encoder)] == [
        torch.float32, HALF, torch.float16,
    ]  # fmt: skip
    assert other("a red apple", images(), num_inference_steps=2, output_type="pt").images.isfinite().all()
    LatentFlowImg2ImgPipeline.from_pipe(pipe, dtype=torch.float32)
    assert pipe.transformer.dtype == torch.float32


def test_loading_in_half_is_converting(dit_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def drawn(pipe: Any) -> Any:
        return quiet(pipe)("a red apple", generator=seeds(0), num_inference_steps=2, output_type="pt").images

    loaded = drawn(LatentFlowPipeline.from_pretrained(dit_folder, dtype=HALF))
    assert torch.equal(drawn(LatentFlowPipeline.from_pretrained(dit_folder).to(HALF)), loaded)
    assert "DiT that should be kept" not in capfd.readouterr().err  # diffusers' own warning, of no modules


def test_an_adapter_beside_float8(dit_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    make_adapter(dit_folder, tmp_path, lora_layers=("all",))
    plain, pipe = (quiet(LatentFlowPipeline.from_pretrained(dit_folder)) for _ in range(2))
    pipe.load_lora_weights(tmp_path)
    pipe.transformer.enable_layerwise_casting(FLOAT8, torch.float32)
    weights = {name: value.dtype for name, value in pipe.transformer.named_parameters()}
    assert {dtype for name, dtype in weights.items() if ".lora_" in name} == {torch.float32}
    assert any(dtype == FLOAT8 for name, dtype in weights.items() if "base_layer.weight" in name)
    plain.load_lora_weights(tmp_path)
    with torch.no_grad():
        for name, weight in plain.transformer.named_parameters():
            if weights[name] == FLOAT8:
                weight.copy_(weight.to(FLOAT8))
    one, other = (
        each("a red apple", generator=seeds(0), num_inference_steps=2, output_type="pt").images
        for each in (plain, pipe)
    )
    assert torch.equal(one, other)
