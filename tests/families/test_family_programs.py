"""The programs on checkpoints of pretrained families, through their real command lines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image

from latentflow.errors import UserError
from latentflow.inference.sample import model_capabilities, read_capabilities
from latentflow.pipeline.tuned import read_tuned
from latentflow.web.inference_server import GenerationRequest, InferenceServer

from .test_pretrained import opened
from .tiny import TINY, WITH_EXTRA_CHANNELS, WITH_REFERENCES

#: three that differ in layout: plain latents, packed ones with an autoencoder of videos, patchified ones
LAYOUTS = ("StableDiffusion3Pipeline", "QwenImagePipeline", "Flux2KleinPipeline")
#: tiny checkpoints that are not whole once they are saved
STAND_INS = {
    "GlmImagePipeline": "its language model is a stand-in",
    "LongCatImagePipeline": "its text processor is a stand-in",
    "ZImageOmniPipeline": "its image processor is a stand-in",
    "PRXPipeline": "transformers does not open the encoder of a tiny T5Gemma by itself",
    "BriaFiboPipeline": "its pipeline has a constant of 16 pixels a cell, the tiny autoencoder 2",
    "BriaFibo2Pipeline": "its pipeline takes more layers of the text encoder than the tiny one has",
}
Program = Callable[[str], Any]


def flags(name: str, folder: Path) -> list[str]:
    """Return the flags that the tiny checkpoint needs; the size of its images, where the program takes one."""
    options = [f"{key}={json.dumps(value)}" for key, value in TINY[name].call.items()]
    return ["--checkpoint", str(folder), *(["--family-options", *options] if options else []), "--steps", "2"]


def size(name: str) -> list[str]:
    side = str(opened(name)[2].side)
    return ["--height", side, "--width", side]


def words(name: str) -> list[str]:
    return ["red apple"] if opened(name)[1].takes_text else ["--class", "3"]


each_family = pytest.mark.parametrize(
    "name", [name if name in LAYOUTS else pytest.param(name, marks=pytest.mark.slow) for name in TINY]
)


@each_family
def test_generate(name: str, folders: Callable[[str], Path], load_program: Program, tmp_path: Path) -> None:
    if name in STAND_INS:
        pytest.skip(STAND_INS[name])
    line = [*words(name), *size(name), "-o", str(tmp_path / "out.png"), *flags(name, folders(name))]
    load_program("generate").main(line)
    assert Image.open(tmp_path / "out.png").size == (opened(name)[2].side,) * 2


@pytest.mark.parametrize(
    "name", ["StableDiffusion3Pipeline", pytest.param("StableDiffusionPipeline", marks=pytest.mark.slow)]
)
def test_a_sampler_is_tuned_to_a_pretrained_model(
    name: str, folders: Callable[[str], Path], load_program: Program, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders(name), tmp_path / "copied"))
    few = ["--steps", "3", "-n", "4", "--held-out", "4", "--batch-size", "4", "--rounds", "2", "--seed", "1"]
    load_program("tune_sampler").main([str(folder), *few, *size(name)])
    (tuned,) = read_tuned(folder)
    assert tuned.held_out["tuned_mean"] < 0.9 * tuned.held_out["usual_mean"]
    drawn = ["red apple", *size(name), "--checkpoint", str(folder), "--steps", "3", "--solver"]
    for solver in ("tuned", "euler"):
        load_program("generate").main([*drawn, solver, "-o", str(tmp_path / f"{solver}.png")])
    one, other = (Image.open(tmp_path / f"{solver}.png").tobytes() for solver in ("tuned", "euler"))
    assert one != other


@pytest.mark.parametrize(("name", "usual"), [("FluxPipeline-dev", 3.5), ("ZImagePipeline", 5.0)])
def test_the_web_page_offers_the_family_s_own_guidance(name: str, usual: float) -> None:
    capabilities = model_capabilities(opened(name)[1])
    assert (capabilities.guidance, capabilities.steps) == (usual, opened(name)[1].usual_steps)


@pytest.mark.parametrize(
    ("name", "options", "takes"),
    [
        ("FluxPipeline", {}, (False, False)),
        ("FluxPipeline-dev", {}, (True, False)),
        ("FluxPipeline-dev", {"true_cfg_scale": 4.0}, (True, True)),
        ("Flux2Pipeline", {}, (True, False)),
        ("DreamLiteMobilePipeline", {}, (False, False)),
        ("ZImagePipeline", {}, (True, True)),
        ("StableDiffusion3Pipeline", {}, (True, True)),
    ],
)
def test_the_web_page_hides_guidance_that_there_is_not(
    name: str, options: dict[str, float], takes: tuple[bool, bool]
) -> None:
    """Scale and negative prompts."""
    model = opened(name)[1]
    capabilities = model_capabilities(type(model)(model.pipeline, **options))
    assert (not capabilities.distilled_guidance, capabilities.negative) == takes


def test_the_few_step_adapter_of_our_own_is_refused(
    folders: Callable[[str], Path], load_program: Program
) -> None:
    name = "StableDiffusion3Pipeline"
    for lora in ([], ["--lora", "hats.safetensors"]):
        with pytest.raises(UserError, match=r"--fast: .* has no few-step adapter"):
            load_program("generate").main(["red apple", "--fast", *lora, *flags(name, folders(name))])


@each_family
def test_images_are_inpainted_edited_and_interpolated(
    name: str,
    folders: Callable[[str], Path],
    load_program: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if name in STAND_INS:
        pytest.skip(STAND_INS[name])
    if not opened(name)[1].takes_text:
        pytest.skip("takes classes")
    side = opened(name)[2].side
    given = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    mask = np.zeros((side, side), np.uint8)
    mask[2:9, 3:10] = 255
    Image.fromarray(given).save("a.png")
    Image.fromarray(mask).save("mask.png")
    common = flags(name, folders(name))
    load_program("inpaint").main(["a.png", "mask.png", "red apple", "-o", "filled.png", *common])
    filled = np.array(Image.open("filled.png"))
    assert np.array_equal(filled[mask == 0], given[mask == 0]) and not np.array_equal(filled, given)
    line = ["a.png", "red apple", "--from", "green hat", "--method", "flowedit"]
    load_program("edit").main([*line, "-o", "edited.png", *common])
    assert Image.open("edited.png").size == (side, side)
    load_program("interpolate").main(
        [
            "--images",
            "a.png",
            "filled.png",
            "red apple",
            "green hat",
            "--frames",
            "2",
            "-o",
            "way.png",
            *common,
        ]
    )
    assert Path("way-1.png").exists() and Path("way-2.png").exists()


@each_family
def test_evaluate(
    name: str,
    folders: Callable[[str], Path],
    load_program: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name in STAND_INS:
        pytest.skip(STAND_INS[name])
    side, data = opened(name)[2].side, tmp_path / "data"
    # Some stock pipelines draw 1024 pixels by default, which are too many cells of a tiny autoencoder.
    monkeypatch.setattr(type(opened(name)[1]), "native_size", property(lambda self: (side, side)))
    data.mkdir()
    generator = np.random.default_rng(0)
    for number in range(8):
        pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        folder = data / ("1", "2")[number % 2] if name == "DiTPipeline" else data
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        if name != "DiTPipeline":
            (data / f"{number}.txt").write_text(f"red apple {number}")
    line = [str(folders(name)), str(data), "-n", "4", "--validation", "0.25", "--features", "pixels-16"]
    line += ["-o", str(tmp_path / "report.json"), *flags(name, folders(name))[2:]]
    load_program("evaluate").main(line)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["reconstruction"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_page_s_server(name: str, folders: Callable[[str], Path]) -> None:
    assert read_capabilities(str(folders(name))) is None  # opened first, then asked
    from latentflow.config import AdapterChoice

    options = tuple(f"{key}={json.dumps(value)}" for key, value in TINY[name].call.items())
    server = InferenceServer(str(folders(name)), "cpu", AdapterChoice(family_options=options))
    assert server.capabilities.text and server.facts
    seen: list[str] = []
    [image] = server.generate(
        GenerationRequest(prompt="red apple", steps=1), lambda step, count, what: seen.append(what)
    )
    assert image.size == tuple(reversed(opened(name)[1].native_size)) and seen


def test_bad_options(folders: Callable[[str], Path], load_program: Program, tmp_path: Path) -> None:
    line = ["red apple", "--checkpoint", str(folders("FluxPipeline")), "-o", str(tmp_path / "out.png")]
    with pytest.raises(UserError, match=r"max_sequence_lenght(.|\n)*max_sequence_length"):
        load_program("generate").main([*line, "--family-options", "max_sequence_lenght=3"])
    with pytest.raises(UserError, match="NAME=VALUE"):
        load_program("generate").main([*line, "--family-options", "512"])
    with pytest.raises(UserError, match="family options"):
        load_program("generate").main(
            ["red apple", "--family-options", "eta=1", "-o", str(tmp_path / "out.png")]
        )


def test_the_page_s_server_edits_by_instruction_and_fills(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tabs are those that a checkpoint can serve, and the method that a page opens with works."""
    from latentflow.config import AdapterChoice

    stock: Any = pipeline_qwenimage_edit  # which draws a megapixel
    monkeypatch.setattr(stock, "calculate_dimensions", lambda area, ratio: (int(64 * ratio), 64, None))
    Image.new("RGB", (96, 64), (200, 30, 30)).save(tmp_path / "a.png")
    Image.new("RGBA", (96, 64), (255, 255, 255, 255)).save(tmp_path / "stroke.png")
    upload, request = str(tmp_path / "a.png"), GenerationRequest(prompt="make it green", steps=1, images=1)

    def server(name: str) -> InferenceServer:
        tables = {**TINY, **WITH_REFERENCES, **WITH_EXTRA_CHANNELS}
        options = tuple(f"{key}={json.dumps(value)}" for key, value in tables[name].call.items())
        return InferenceServer(str(folders(name)), "cpu", AdapterChoice(family_options=options))

    def quiet(*_: Any) -> None:
        pass

    for name, calls in (
        ("Flux2KleinPipeline", ("generate", "inpaint", "edit")),
        ("QwenImageEditPipeline", ("edit",)),
    ):
        opened = server(name)
        assert opened.capabilities.calls == calls and opened.choices["edit"][0] == "reference"
        assert ("flowedit" in opened.choices["edit"]) == (name == "Flux2KleinPipeline")
        for method in (None, *opened.choices["edit"][:2]):
            assert len(opened.edit(request, quiet, upload, "", method, 0.9)) == 1

    filling = server("FluxFillPipeline")
    assert filling.capabilities.calls == ("inpaint",)
    settings = {"method": None, "strength": 1.0, "feather": 0, "margin": 0}
    [filled] = filling.inpaint(request, quiet, upload, [str(tmp_path / "stroke.png")], **settings)
    assert filled.size == (96, 64)
    led = server("FluxControlPipeline")
    assert led.capabilities.calls == ("generate",)
    with pytest.raises(UserError, match="draws under a control image"):
        led.generate(request, quiet)
    assert len(led.generate(replace(request, control_image=upload), quiet)) == 1
