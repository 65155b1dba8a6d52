"""Adapters that teach pretrained models to inpaint and to draw under control images, through the command line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latentflow import LatentFlowInpaintPipeline, LatentFlowPipeline
from latentflow.inference.opening import open_pipeline
from latentflow.pipeline.generate import GenerateCall
from latentflow.training import pretrained_result

from ..families.tiny import WITH_EXTRA_CHANNELS
from .command import call, losses
from .pretrained import QUICK, adapter, base_flags, photos

pytestmark = pytest.mark.usefixtures("no_memorisation")
NAME = "StableDiffusion3Pipeline"


@pytest.mark.parametrize(
    ("coupling", "file_name"),
    [
        ("independent", "added.masks"),
        pytest.param("data-dependent", "added.masks.data-dependent", marks=pytest.mark.slow),
    ],
)
def test_a_run_learns_to_inpaint_and_opens_at_any_time(
    pretrained: Callable[[str], Path], cache: Path, tmp_path: Path, coupling: str, file_name: str
) -> None:
    data, run = photos(tmp_path / "photos", 16, 4), tmp_path / "run"
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 3:12] = 255
    Image.fromarray(mask).save(data / "0-mask.png")
    line: list[Any] = [data, "-o", run, *base_flags(NAME, pretrained(NAME)), *QUICK, "--inpainting"]
    refused = call(cache, *line, "--max-train-steps", 2, "--lora-rank", 0, expect=2)
    assert "learns it in an adapter" in refused and "--lora-rank 16" in refused
    refused = call(cache, *line, "--lora-rank", 2, "--outside-mask", 0.5, expect=2)
    assert "--outside-mask with --inpainting" in refused
    flags = ["--max-train-steps", 2, "--train-batch-size", 4, "--lora-rank", 2, "--learning-rate", 0.01]
    flags += ["--coupling", coupling]
    said = call(cache, *line, *flags)
    assert "1 mask in files beside the images" in said and len(losses(run)) == 2
    assert adapter(run)[file_name].any()

    open_run = tmp_path / "open"  # as between its last checkpoint and its result
    shutil.copytree(run, open_run, ignore=shutil.ignore_patterns("adapter"))
    image = Image.open(data / "1.png").convert("RGB")
    drawn = []
    for folder in (run, open_run):
        pipe: Any = open_pipeline(LatentFlowInpaintPipeline, str(folder), "cpu")
        assert pipe.takes_masks and pipe.model.coupling == coupling
        [filled] = pipe(
            "a red apple",
            image,
            Image.fromarray(mask),
            method="trained",
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
        ).images
        drawn.append(np.asarray(filled))
        assert np.array_equal(drawn[-1][mask == 0], np.asarray(image)[mask == 0])
    assert np.array_equal(*drawn)


@pytest.fixture
def copies_counted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each call that draws an image in which copies of training images are looked for."""
    asked: list[dict[str, Any]] = []
    calls = GenerateCall.__call__

    def drawn(pipe: Any, **options: Any) -> Any:
        asked.append(options)
        return calls(pipe, num_inference_steps=1, **options)

    def report(*given: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GenerateCall, "__call__", drawn)
            given[-1]([0])

    monkeypatch.setattr(pretrained_result, "FEW", 100)
    monkeypatch.setattr(pretrained_result, "report_memorisation", report)
    return asked


def test_a_run_learns_to_draw_under_control_images(
    pretrained: Callable[[str], Path], cache: Path, tmp_path: Path, copies_counted: list[dict[str, Any]]
) -> None:
    data, run, base = photos(tmp_path / "photos", 16, 4), tmp_path / "run", pretrained(NAME)
    line: list[Any] = [data, "-o", run, *base_flags(NAME, base), *QUICK, "--max-train-steps", 2]
    adapts = ["--lora-rank", 2, "--learning-rate", 0.01]
    assert "4 images of 4 without a control image" in call(
        cache, *line, *adapts, "--control", "image", expect=2
    )
    files = {kind: data / f"1-control-{kind}.png" for kind in ("image", "labels")}
    for number in range(4):
        edges = np.zeros((16, 16), np.uint8)
        edges[4 * number :] = 255
        Image.fromarray(edges).save(data / f"{number}-control-image.png")
        Image.fromarray(edges // 255).save(data / f"{number}-control-labels.png")
    (tmp_path / "labels.txt").write_text("sky #80c0ff\nroad\n")
    both: list[Any] = ["--control", "image", "labels", "--control-labels", tmp_path / "labels.txt"]
    refused = call(cache, *line, "--lora-rank", 0, *both, expect=2)
    assert "--control: " in refused and "Add --lora-rank 16" in refused

    flags: list[Any] = [*both, "--inpainting", "--train-batch-size", 4, "--preview-steps", 2]
    (tmp_path / "prior.txt").write_text("a pear")  # its samples are masked as well, and have no control image
    flags += ["--prior-prompts", tmp_path / "prior.txt", "--prior-samples", 1]
    call(cache, *line, *adapts, *flags)
    made = adapter(run)
    assert made["added.control.weight"].any() and made["added.masks"].any()
    assert made["added.control.labels.weight"].any() and made["added.control.labels.table"].shape == (2, 8)
    # what follows an image's own edges is like it, and no copy
    assert len(copies_counted) == 1 and "control_image" not in copies_counted[0]
    open_run = tmp_path / "open"  # as between its last checkpoint and its result
    shutil.copytree(run, open_run, ignore=shutil.ignore_patterns("adapter"))
    drawn = []
    for folder in (run, open_run):
        pipe: Any = open_pipeline(LatentFlowPipeline, str(folder), "cpu")
        assert pipe.takes_masks and pipe.model.control_kinds == ("image", "labels")
        assert pipe.model.control_labels == (("sky", "#80c0ff"), ("road", ""))
        for scale in (1.0, 0.0, {"image": 0.0}):
            drawn.append(
                pipe(
                    "a red apple", control_image={kind: Image.open(file) for kind, file in files.items()},
                    control_scale=scale, num_inference_steps=2, generator=torch.Generator().manual_seed(0),
                    output_type="pt",
                ).images
            )  # fmt: skip
    assert all(torch.equal(*pair) for pair in zip(drawn[:3], drawn[3:], strict=True))
    assert not any(torch.equal(drawn[a], drawn[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    words: list[Any] = ["a red apple", "--checkpoint", run, "--control"]
    words += [f"{kind}={file}" for kind, file in files.items()]
    call(cache, *words, "--steps", 1, "-o", tmp_path / "out.png", file="../pipelines/generate")
    assert Image.open(tmp_path / "out.png").size == (16, 16)
    card = (run / "adapter" / "README.md").read_text()
    assert "also draws under a control image and a label map" in card and "--method trained" in card
    assert "With diffusers" not in card and "how they were filled" not in card
    assert (run / "samples" / "step-000002.png").is_file()


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("FluxFillPipeline", "latentflow inpaint photo.png mask.png"),
        ("FluxControlPipeline", "--control control.png"),
        *(
            pytest.param(name, "latentflow inpaint photo.png", marks=pytest.mark.slow)
            for name in ("StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline")
        ),
    ],
)
def test_a_base_that_draws_from_images_learns_from_them(
    pretrained: Callable[[str], Path],
    cache: Path,
    tmp_path: Path,
    copies_counted: list[dict[str, Any]],
    name: str,
    files: str,
) -> None:
    """Its own input channels take the masks or control images, and the result is an ordinary adapter."""
    base, run, fills = pretrained(name), tmp_path / "run", "inpaint" in files
    side = WITH_EXTRA_CHANNELS[name].side
    data, controls = photos(tmp_path / "photos", side, 4), tmp_path / "controls"
    controls.mkdir()
    for number in range(4):
        Image.new("L", (side, side), 60 * number).save(controls / f"{number}.png")
    masked, led = ["--inpainting"], ["--control", "image", "--control-folder", controls]
    own, other = (masked, led) if fills else (led, masked)
    line: list[Any] = [data, "-o", run, *base_flags(name, base), *QUICK]
    line += ["--lora-rank", 2, "--learning-rate", 0.01, "--max-train-steps", 2]
    labels: Any = ([*led[:1], "labels"], "draws under control images, not label maps")
    for wrong, words in (
        *([] if fills else [labels]),
        ([], f"and does nothing else Add {' '.join(own[:2])}"),
        ([*own, *other], f"{other[0]}: {base}"),
        ([*own, "--prior-prompts", data / "0.txt"], "--prior-samples: "),
    ):
        said = call(cache, *line, *wrong, expect=2)
        assert words in " ".join(said.split()), said
    plan = call(cache, *line, *own, "--dry-run")
    assert (
        "cannot be counted" not in plan or "XL" in name
    )  # SDXL's config does not say what its pooled prompts are
    said = call(cache, *line, *own, "--preview-steps", 2)
    assert files in said  # the line that draws with it
    assert len(losses(run)) == 2 and (run / "samples" / "step-000002.png").is_file()
    assert not copies_counted  # it draws nothing without an image
    made = adapter(run)
    assert all("lora" in key for key in made)
    assert any(value.any() for key, value in made.items() if "lora_B" in key)
    image, mask = Image.open(data / "1.png"), Image.new("L", (side, side), 255)
    given: dict[str, Any] = {"image": image, "mask_image": mask} if fills else {"control_image": image}
    kind: Any = LatentFlowInpaintPipeline if fills else LatentFlowPipeline
    pipe: Any = open_pipeline(kind, str(run), "cpu")
    drawn = []
    for _ in range(2):  # with the adapter, and without
        random = torch.Generator().manual_seed(0)
        call_ = {**given, "num_inference_steps": 1, "output_type": "pt", "generator": random}
        drawn.append(pipe("a red apple", **call_).images)
        pipe.unload_lora_weights()
    assert not torch.equal(*drawn)
    card = (run / "adapter" / "README.md").read_text()
    assert files in card and "input channels" not in card and "from PIL import Image" in card
    stock = getattr(diffusers, name).from_pretrained(base)
    stock.load_lora_weights(run / "adapter")
    assert stock.get_active_adapters()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["FluxFillPipeline", "FluxControlPipeline", "StableDiffusionInpaintPipeline"]
)
def test_all_weights_of_a_base_that_draws_from_images_learn(
    pretrained: Callable[[str], Path], cache: Path, tmp_path: Path, name: str
) -> None:
    """The result is a pipeline of the base's class with the same inputs, and draws from the same images."""
    base, run, side = pretrained(name), tmp_path / "run", WITH_EXTRA_CHANNELS[name].side
    data, controls = photos(tmp_path / "photos", side, 4), tmp_path / "controls"
    controls.mkdir()
    for number in range(4):
        Image.new("L", (side, side), 60 * number).save(controls / f"{number}.png")
    fills = "Control" not in name
    own: list[Any] = ["--inpainting"] if fills else ["--control", "image", "--control-folder", controls]
    line: list[Any] = [data, "-o", run, *base_flags(name, base), *QUICK, *own]
    said = call(cache, *line, "--learning-rate", 0.01, "--max-train-steps", 2, "--preview-steps", 2)
    assert ("latentflow inpaint photo.png mask.png" if fills else "--control control.png") in said
    assert (run / "samples" / "step-000002.png").is_file()
    before = getattr(diffusers, name).from_pretrained(base).components
    after = getattr(diffusers, name).from_pretrained(run / "pipeline").components
    part = "unet" if "unet" in after else "transformer"
    own_weights, first = after[part].state_dict(), before[part].state_dict()
    assert (
        own_weights.keys() == first.keys()
        and after[part].config.in_channels == before[part].config.in_channels
    )
    assert any(not torch.equal(own_weights[key], first[key]) for key in first)
    assert all(
        torch.equal(value, before["vae"].state_dict()[key])
        for key, value in after["vae"].state_dict().items()
    )
    image = Image.open(data / "1.png")
    given: dict[str, Any] = {"image": image, "mask_image": Image.new("L", (side, side), 255)}
    kind: Any = LatentFlowInpaintPipeline if fills else LatentFlowPipeline
    pipe: Any = open_pipeline(kind, str(run), "cpu")
    drawn = pipe("a red apple", **(given if fills else {"control_image": image}), num_inference_steps=1)
    assert len(drawn.images) == 1
