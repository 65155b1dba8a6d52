"""Saving and loading, with our class and with diffusers' own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import latentflow
from latentflow.errors import UserError
from latentflow.families import FlowModel
from latentflow.models import MODELS
from latentflow.pipeline import LatentFlowPipeline
from latentflow.pipeline.base import FAMILY
from latentflow.pipeline.img2img import LatentFlowImg2ImgPipeline
from latentflow.pipeline.inpaint import LatentFlowInpaintPipeline

from .conftest import GaussianFlow, tiny_vae

SMALL: dict[str, dict[str, Any]] = {
    "dit": {"width": 16, "depth": 1, "heads": 2},
    "unet": {"channels": (8, 8), "head_dim": 8, "layers_per_block": 1},
}
CALL: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}


def images(pipe: Any, **call: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    condition = {"num_images_per_prompt": 2}
    if pipe.takes_text:
        condition = {"prompt": ["a red apple", "green tree"]}
    elif pipe.takes_classes:
        condition = {"class_labels": ["hat", 2]}
    return pipe(**condition, generator=torch.Generator().manual_seed(0), **CALL, **call).images


@pytest.fixture(scope="module")
def captions(dit_folder: Path) -> Any:
    """The images that the caption checkpoint makes."""
    return images(LatentFlowPipeline.from_pretrained(dit_folder))


def test_the_conditions_matter(captions: Any) -> None:
    assert np.abs(captions[0] - captions[1]).max() > 0.01  # the tests below compare images, not constants


@pytest.mark.parametrize("folder", ["dit_folder", "class_folder"])
def test_round_trip_is_exact(folder: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    first = LatentFlowPipeline.from_pretrained(request.getfixturevalue(folder))
    first.save_pretrained(tmp_path)
    second = LatentFlowPipeline.from_pretrained(tmp_path)
    assert np.array_equal(images(first), images(second))
    assert second.labels == first.labels
    configs = [{k: v for k, v in pipe.config.items() if not k.startswith("_")} for pipe in (first, second)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("folder", ["dit_folder", "class_folder"])
def test_stock_diffusers_opens_a_checkpoint(folder: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(folder)
    latentflow.register_with_diffusers()
    latentflow.register_with_diffusers()
    expected = images(LatentFlowPipeline.from_pretrained(path))
    for loader in (diffusers.DiffusionPipeline, diffusers.AutoPipelineForText2Image):
        pipe = loader.from_pretrained(path)
        assert type(pipe) is LatentFlowPipeline
        assert np.array_equal(images(pipe), expected)
    again = diffusers.AutoPipelineForText2Image.from_pipe(pipe)
    assert type(again) is LatentFlowPipeline
    assert np.array_equal(images(again), expected)


def test_code_in_the_folder_is_not_run(dit_folder: Path, tmp_path: Path, captions: Any) -> None:
    folder, trace = tmp_path / "pipeline", tmp_path / "ran"
    shutil.copytree(dit_folder, folder)
    for place in ("pipeline.py", "latentflow.py", "LatentFlowPipeline.py"):
        (folder / place).write_text(f"open({str(trace)!r}, 'w')\nclass LatentFlowPipeline: pass\n")
    latentflow.register_with_diffusers()
    assert np.array_equal(images(diffusers.DiffusionPipeline.from_pretrained(folder)), captions)
    assert np.array_equal(images(LatentFlowPipeline.from_pretrained(folder)), captions)
    assert not trace.exists()


def test_sharded(dit_folder: Path, tmp_path: Path, captions: Any) -> None:
    LatentFlowPipeline.from_pretrained(dit_folder).save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    assert np.array_equal(images(LatentFlowPipeline.from_pretrained(tmp_path)), captions)
    [index] = (tmp_path / "transformer").glob("*.index.json")
    index.write_text(index.read_text().replace("diffusion_pytorch", "../diffusion_pytorch"))
    with pytest.raises(UserError, match="weight_map does not name files beside it"):
        LatentFlowPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
def test_half_precision_variants(
    dit_folder: Path, tmp_path: Path, captions: Any, dtype: torch.dtype, name: str
) -> None:
    half = LatentFlowPipeline.from_pretrained(dit_folder, dtype=dtype)
    assert {half.transformer.dtype, half.vae.dtype, half.text_encoder.dtype} == {dtype}
    half.save_pretrained(tmp_path, variant=name)
    assert list((tmp_path / "transformer").glob(f"*.{name}.safetensors"))
    loaded = LatentFlowPipeline.from_pretrained(tmp_path, variant=name, dtype=dtype)
    assert np.array_equal(images(loaded), images(half))
    # A variant that is named has the type of its files; a type that is named is what they are brought to.
    named = LatentFlowPipeline.from_pretrained(tmp_path, variant=name)
    assert {named.transformer.dtype, named.vae.dtype, named.text_encoder.dtype} == {dtype}
    assert np.array_equal(images(named), images(half))
    wide = LatentFlowPipeline.from_pretrained(tmp_path, variant=name, torch_dtype=torch.float32)
    assert {wide.transformer.dtype, wide.vae.dtype, wide.text_encoder.dtype} == {torch.float32}
    widened = images(wide)
    narrow = LatentFlowPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {narrow.transformer.dtype, narrow.vae.dtype} == {torch.bfloat16}
    assert LatentFlowPipeline.from_pretrained(tmp_path, dtype=None).vae.dtype == torch.float32
    # The only files that there are need not be named, and are float32 then, as without variants.
    assert np.array_equal(images(LatentFlowPipeline.from_pretrained(tmp_path)), widened)
    assert np.abs(widened - captions).mean() < 0.02
    assert np.abs(images(half) - captions).mean() < 0.05
    mixed = LatentFlowPipeline.from_pretrained(dit_folder, dtype={"transformer": dtype})
    assert (mixed.transformer.dtype, mixed.vae.dtype) == (dtype, torch.float32)


def test_a_component_without_the_variant_is_read_from_its_plain_file(
    dit_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(dit_folder, tmp_path, dirs_exist_ok=True)
    half = LatentFlowPipeline.from_pretrained(dit_folder, dtype=torch.float16)
    half.transformer.save_pretrained(tmp_path / "transformer", variant="fp16")
    pipe = LatentFlowPipeline.from_pretrained(tmp_path, variant="fp16")
    assert pipe.transformer.dtype == torch.float16
    assert pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32
    for name, weight in half.transformer.state_dict().items():
        assert torch.equal(pipe.transformer.state_dict()[name], weight)
    assert np.isfinite(images(pipe)).all()
    plain = LatentFlowPipeline.from_pretrained(tmp_path)
    assert {plain.transformer.dtype, plain.vae.dtype} == {torch.float32}


def test_a_variant_in_shards(dit_folder: Path, tmp_path: Path) -> None:
    half = LatentFlowPipeline.from_pretrained(dit_folder, dtype=torch.float16)
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size="5KB")
    assert len(list((tmp_path / "transformer").glob("*.fp16-*.safetensors"))) > 1
    opened = LatentFlowPipeline.from_pretrained(tmp_path, variant="fp16")
    assert opened.transformer.dtype == torch.float16
    assert np.array_equal(images(opened), images(half))


def test_a_variant_that_is_not_there_is_answered_with_those_that_are(
    dit_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"`variant=fp16`, but .* has none\nIts weights have no variants: leave it out"
    ):
        LatentFlowPipeline.from_pretrained(dit_folder, variant="fp16")
    pipe = LatentFlowPipeline.from_pretrained(dit_folder, dtype=torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    pipe.save_pretrained(tmp_path, variant="ema")
    for variant in ("fp1", "fp8", "", 16):
        with pytest.raises(UserError, match=f"`variant={variant}`, but .* has none\nThere are ema, fp16"):
            LatentFlowPipeline.from_pretrained(tmp_path, variant=variant)
    with pytest.raises(UserError, match="weights of several variants: ema, fp16\nPass one"):
        LatentFlowPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("condition", [{}, {"text_dim": 16}, {"num_classes": 3}])
def test_every_network_with_every_condition(
    name: str, condition: dict[str, int], assemble: Callable[..., LatentFlowPipeline], tmp_path: Path
) -> None:
    pipe = assemble(MODELS[name](in_channels=2, sample_size=4, **SMALL[name], **condition))
    pipe.save_pretrained(tmp_path)
    loaded = LatentFlowPipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is MODELS[name]
    assert np.array_equal(images(pipe), images(loaded))
    assert images(loaded, height=12, width=10).shape == (2, 12, 10, 3)  # 6 x 5 latents: odd sides as well


KINDS = [getattr(latentflow, name) for name in FAMILY]
TASKS = {
    "Text2Image": LatentFlowPipeline,
    "Image2Image": LatentFlowImg2ImgPipeline,
    "Inpainting": LatentFlowInpaintPipeline,
}


@pytest.fixture(scope="module", params=KINDS)
def saved(
    request: pytest.FixtureRequest, dit_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    """A pipeline of each class, and the folder that it has saved."""
    pipe = request.param.from_pretrained(dit_folder, coupling="data-dependent")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    folder = tmp_path_factory.mktemp(request.param.__name__)
    pipe.save_pretrained(folder)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == request.param.__name__
    return pipe, folder


@pytest.mark.parametrize("second", KINDS)
def test_every_pipeline_from_every_other(second: Any, saved: tuple[Any, Path]) -> None:
    pipe, folder = saved
    other = second.from_pipe(pipe)
    assert type(other) is second
    assert all(other.components[name] is part for name, part in pipe.components.items())
    assert other.config.coupling == "data-dependent"
    opened = second.from_pretrained(folder)
    assert type(opened) is second
    assert opened.config.coupling == "data-dependent"


def test_stock_diffusers_opens_what_every_pipeline_has_saved(saved: tuple[Any, Path]) -> None:
    latentflow.register_with_diffusers()
    latentflow.register_with_diffusers()  # changes nothing
    pipe, folder = saved
    for opened in (diffusers.DiffusionPipeline.from_pretrained(folder), FlowModel.from_pretrained(folder)):
        opened = getattr(opened, "pipeline", opened)
        assert opened.config.coupling == "data-dependent"
        for name, weight in pipe.transformer.state_dict().items():
            assert torch.equal(opened.transformer.state_dict()[name], weight)
    assert type(diffusers.DiffusionPipeline.from_pretrained(folder)) is type(pipe)
    assert getattr(diffusers, type(pipe).__name__) is type(pipe)
    for task, kind in TASKS.items():
        auto = getattr(diffusers, f"AutoPipelineFor{task}")
        assert type(auto.from_pretrained(folder)) is kind
        assert type(auto.from_pipe(pipe)) is kind


def test_optional_components_stay_away(dit_folder: Path, tmp_path: Path) -> None:
    pipe = LatentFlowPipeline.from_pretrained(dit_folder, text_encoder=None, tokenizer=None, vae=None)
    pipe.save_pretrained(tmp_path)
    loaded = LatentFlowPipeline.from_pretrained(tmp_path)
    assert loaded.text_encoder is loaded.tokenizer is loaded.vae is loaded.scheduler is None
    loaded.set_progress_bar_config(disable=True)
    out = loaded(prompt_embeds=torch.ones(1, 3, 16), output_type="latent", num_inference_steps=1)
    assert out.images.shape == (1, 2, 4, 4)


def test_from_pipe_keeps_the_precision_of_both(dit_folder: Path) -> None:
    """diffusers' own would widen the shared networks, and so the pipeline that they came from."""
    pipe = LatentFlowPipeline.from_pretrained(dit_folder, dtype=torch.float16)
    other = LatentFlowInpaintPipeline.from_pipe(pipe)
    assert other.transformer is pipe.transformer
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float16}
    types = {"transformer": torch.bfloat16, "vae": torch.float16}
    mixed = LatentFlowPipeline.from_pretrained(dit_folder, dtype=types)
    for kind in KINDS:
        other = kind.from_pipe(mixed)
        assert (other.transformer.dtype, other.vae.dtype) == (torch.bfloat16, torch.float16)
        assert other.text_encoder.dtype == mixed.text_encoder.dtype == torch.float32
    wide = LatentFlowInpaintPipeline.from_pipe(pipe, dtype=torch.float32)
    assert wide.transformer.dtype == torch.float32


# ------------------------------------------------------------------ the hub, mocked


@pytest.fixture
def hub(dit_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def snapshot_download(name: str, **kwargs: Any) -> str:
        calls.append({"name": name, **kwargs})
        return str(dit_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return calls


def test_a_hub_id_is_downloaded_whole_and_without_code(hub: list[dict[str, Any]], captions: Any) -> None:
    pipe = LatentFlowPipeline.from_pretrained("someone/emoji", revision="v2", token="t")
    assert np.array_equal(images(pipe), captions)
    assert [(call["name"], call["revision"], call["token"]) for call in hub] == [("someone/emoji", "v2", "t")]
    assert not any(pattern.endswith((".py", "*", ".bin", ".pt")) for pattern in hub[0]["allow_patterns"])
    assert "*.safetensors" in hub[0]["allow_patterns"]


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(name: str, **kwargs: Any) -> str:
        raise LocalEntryNotFoundError("offline\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(
        UserError, match=r"no folder 'someone/emoji', and no hub .*: offline\nCheck the spelling"
    ):
        LatentFlowPipeline.from_pretrained("someone/emoji")


# ------------------------------------------------------------------ folders that are none


def test_a_run_folder_names_the_pipeline_in_it(dit_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(dit_folder, tmp_path / "run" / "pipeline")
    with pytest.raises(UserError, match=rf"Did you mean '{tmp_path}/run/pipeline'"):
        LatentFlowPipeline.from_pretrained(tmp_path / "run")


def test_pickled_weights_are_refused(dit_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(dit_folder, folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(
        LatentFlowPipeline.from_pretrained(dit_folder).transformer.state_dict(), weights.with_suffix(".bin")
    )
    weights.unlink()
    with pytest.raises((OSError, ValueError)):
        LatentFlowPipeline.from_pretrained(folder)


def test_the_family_of_pipelines_is_what_the_package_offers() -> None:
    assert set(FAMILY) == {name for name in latentflow.__all__ if name.endswith("Pipeline")}


def test_components_of_several_checkpoints_are_refused() -> None:
    with pytest.raises(
        UserError, match="the transformer's in_channels is 3, the autoencoder's latents are 2"
    ):
        LatentFlowPipeline(tiny_vae(), GaussianFlow(in_channels=3))


def test_another_kind_of_pipeline_is_named(dit_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(dit_folder, tmp_path / "sd")
    index = json.loads((dit_folder / "model_index.json").read_text())
    (tmp_path / "sd" / "model_index.json").write_text(
        json.dumps(index | {"_class_name": "StableDiffusionPipeline"})
    )
    for kind in KINDS:
        with pytest.raises(
            UserError, match=r"sd' cannot be read: Pipeline .*StableDiffusionPipeline.* expected"
        ):
            kind.from_pretrained(tmp_path / "sd")
    (tmp_path / "sd" / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanPipeline"}))
    for kind in KINDS:
        with pytest.raises(UserError, match=r"sd is a WanPipeline\nIt .*video"):
            kind.from_pretrained(tmp_path / "sd")


def test_stock_diffusers_gets_no_network_whose_weights_do_not_fit(dit_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(dit_folder, tmp_path / "pipeline")
    file = tmp_path / "pipeline" / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"depth": 2}))
    latentflow.register_with_diffusers()
    with pytest.raises(UserError, match=r"weights are missing: blocks\.1\."):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    with pytest.raises(UserError, match=r"weights are missing: blocks\.1\."):
        MODELS["dit"].from_pretrained(tmp_path / "pipeline", subfolder="transformer")


def test_weights_that_overflow_in_half_precision_are_refused(dit_folder: Path, tmp_path: Path) -> None:
    pipe = LatentFlowPipeline.from_pretrained(dit_folder)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias[0] = 1e5
    pipe.save_pretrained(tmp_path)
    assert LatentFlowPipeline.from_pretrained(tmp_path).vae.decoder.conv_out.bias[0] == 1e5
    with pytest.raises(UserError, match=r"vae: weights are not finite \(in float16\): decoder.conv_out.bias"):
        LatentFlowPipeline.from_pretrained(tmp_path, dtype=torch.float16)


def test_a_defect_of_our_own_keeps_its_traceback(dit_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: Any, **__: Any) -> None:
        raise KeyError("planted")

    for place in (
        "models.dit.check_shape",
        "pipeline.base.check_components",
        "pipeline.base.check_settings",
        "utils.components._check_values",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"latentflow.{place}", defect)
            with pytest.raises(KeyError, match="planted"):
                LatentFlowPipeline.from_pretrained(dit_folder)


def test_a_saved_folder_does_not_say_where_its_parts_came_from(dit_folder: Path, tmp_path: Path) -> None:
    LatentFlowPipeline.from_pretrained(dit_folder).save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.json"):
        assert str(dit_folder) not in file.read_text(), file
