"""What requests of the web page do, without a browser and without Gradio."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentflow.config import AdapterChoice
from latentflow.errors import UserError
from latentflow.inference.sample import Capabilities, model_capabilities, read_capabilities
from latentflow.web.inference_server import GenerationRequest, InferenceServer, painted


def silent(done: int, total: int, what: str) -> None:
    pass


@pytest.fixture(scope="module")
def server(caption_checkpoint: Path) -> InferenceServer:
    return InferenceServer(str(caption_checkpoint), "cpu")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)).save(path)
    return path


REQUEST = GenerationRequest(prompt="red apple", steps=2)


def test_two_at_once_get_what_each_would_get_alone(server) -> None:
    requests = [
        replace(REQUEST, prompt=("red apple", "blue hat")[i % 2], seed=i, steps=3, images=1 + i % 2)
        for i in range(4)
    ]
    alone = [server.generate(request, silent) for request in requests]
    start = threading.Barrier(len(requests))

    def ask(request: GenerationRequest) -> list[Image.Image]:
        start.wait()
        return server.generate(request, silent)

    with ThreadPoolExecutor(len(requests)) as threads:
        together = list(threads.map(ask, requests))
    assert [[image.tobytes() for image in images] for images in together] == [
        [image.tobytes() for image in images] for images in alone
    ]
    assert len({images[0].tobytes() for images in alone}) == len(requests)


def test_progress_counts_the_steps(server) -> None:
    seen: list[tuple[int, int]] = []
    server.generate(replace(REQUEST, steps=4), lambda done, total, what: seen.append((done, total)))
    assert seen == [(0, 1), *((i, 4) for i in (1, 2, 3, 4))]


def test_what_progress_raises_ends_a_request_at_its_step(server) -> None:
    class Left(Exception):  # noqa: N818
        pass

    steps = []

    def leave(done: int, total: int, what: str) -> None:
        steps.append(done)
        if done == 2:
            raise Left

    with pytest.raises(Left):
        server.generate(replace(REQUEST, steps=50), leave)
    assert steps == [0, 1, 2]
    assert len(server.generate(REQUEST, silent)) == 1  # the next one is drawn


def test_only_what_was_painted_over_changes(server, image) -> None:
    stroke = Image.new("RGBA", (48, 32))  # the canvas is four times as large
    stroke.paste((255, 0, 255, 255), (16, 8, 32, 24))
    stroke.save(image.with_name("stroke.png"))
    [result] = server.inpaint(REQUEST, silent, str(image), [str(image.with_name("stroke.png"))])
    changed = (np.asarray(result) != np.asarray(Image.open(image))).any(-1)
    hole = np.zeros((8, 12), bool)
    hole[2:6, 4:8] = True
    assert not changed[~hole].any() and changed[hole].mean() > 0.5


def test_strokes_that_do_not_meet_the_pixels_are_rounded() -> None:
    stroke = Image.new("RGBA", (4, 4))
    stroke.paste((0, 0, 0, 255), (0, 0, 2, 1))  # half of the first pixel
    stroke.paste((0, 0, 0, 255), (2, 2, 3, 3))  # a quarter of the last
    assert np.asarray(painted([stroke], (2, 2))).tolist() == [[255, 0], [0, 0]]


@pytest.mark.parametrize("method", ["flowedit", "inversion", "image-to-image"])
def test_editing(server, image, method) -> None:
    def edited(strength: float, images: int = 1) -> list[Image.Image]:
        request = replace(REQUEST, images=images)
        return server.edit(request, silent, str(image), "blue hat", method, strength)

    assert edited(1.0)[0].size == (12, 8)
    assert edited(1.0)[0].tobytes() != edited(0.0)[0].tobytes()
    assert len(edited(1.0, images=2)) == (1 if method == "inversion" else 2)


def test_large_uploads_are_shrunk_and_that_is_said(server, image, tmp_path) -> None:
    Image.new("RGB", (400, 200)).save(tmp_path / "large.png")
    shrunk, note = server.opened(str(tmp_path / "large.png"))
    assert shrunk.size == (32, 16)  # four times the 8 pixels of the training
    assert note == "The image was reduced from 400 x 200 to 32 x 16 pixels."
    assert server.opened(str(image))[1] == ""


# ---------------------------------------------------------------- adapters


@pytest.fixture
def adapted(caption_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint with a few-step adapter in its folder, and folders of other adapters."""
    pytest.importorskip("peft", reason='needs peft: pip install -e ".[lora]"')
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from ..pipeline.adapters import make_adapter

    folder = tmp_path / "mine" / "pipeline"
    shutil.copytree(caption_checkpoint, folder)
    make_adapter(folder, tmp_path / "runs" / "hats" / "adapter", seed=1, words=["beanie"])
    make_adapter(folder, tmp_path / "runs" / "boots" / "adapter", seed=2)
    make_adapter(folder, folder / "fast", seed=3)
    file = folder / "fast" / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    facts = json.loads(metadata["latentflow"]) | {
        "few_steps": {"step_counts": [1, 2], "folded_guidance": 3.0}
    }
    save_file(load_file(file), file, metadata | {"latentflow": json.dumps(facts)})
    return folder


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({}, []),
        ({"fast": True, "steps": 2}, ["--fast"]),
        ({"lora": (("hats", 0.55),)}, ["--lora", "runs/hats:0.55"]),
        ({"lora": (("boots", -1.5), ("hats", 1.0))}, ["--lora", "runs/boots:-1.5", "--lora", "runs/hats"]),
        (
            {"fast": True, "steps": 2, "lora": (("boots", 1),)},
            ["--fast", "--lora", "runs/boots"],
        ),
    ],
    ids=["none", "fast", "one", "two", "both"],
)
def test_the_image_is_that_of_generate_with_the_same_flags(
    adapted, settings, flags, load_program, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server = InferenceServer("mine", "cpu", lora_folder="runs")
    server.generate(REQUEST, silent)  # what another request has used is not left behind
    server.generate(replace(REQUEST, lora=(("hats", 1.0),)), silent)
    [image] = server.generate(replace(REQUEST, prompt="red beanie", seed=7, **settings), silent)
    line = [
        "red beanie",
        "--checkpoint",
        "mine",
        "--device",
        "cpu",
        "--seed",
        "7",
        "--steps",
        "2",
        "-o",
        "out.png",
    ]
    load_program("generate").main([*line, *flags])
    with Image.open("out.png") as expected:
        assert image.tobytes() == expected.tobytes()


def test_adapters_change_what_is_drawn_and_what_is_known(adapted, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    server = InferenceServer("mine", "cpu", lora_folder="runs")
    settings = [{}, {"fast": True}, {"lora": (("hats", 1.0),)}, {"lora": (("hats", 0.5),)}]
    requests = [replace(REQUEST, prompt="red beanie", **each) for each in settings]
    assert len({server.generate(request, silent)[0].tobytes() for request in requests}) == len(requests)
    assert server.unknown_words(requests[0], "red beanie") == ["beanie"]
    assert server.unknown_words(requests[2], "red beanie") == []
    assert len(server._opened) == 2  # and no more are kept
    fast = server.capabilities_with(server.choice(True, ()))
    assert (fast.steps, fast.distilled_guidance) == (2, True)
    assert server.capabilities_with(server.choice(False, ())).steps == 16


def test_no_file_is_opened_that_is_not_offered(adapted, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    server = InferenceServer("mine", "cpu", AdapterChoice(lora=("runs/hats:0.5",)))
    assert [*server.adapters] == ["hats"] and server.adapters["hats"].chosen
    for name in ("runs/boots", "boots", str(tmp_path / "runs" / "boots"), "owner/name", "hats:1", ""):
        with pytest.raises(UserError, match="unknown LoRA"):
            server.generate(replace(REQUEST, lora=((name, 1.0),)), silent)
    for weight in (2.1, float("nan"), "1", None):
        with pytest.raises(UserError, match="lora_weight is"):
            replace(REQUEST, lora=(("hats", weight),))
    with pytest.raises(UserError, match="fast must be"):
        replace(REQUEST, fast="yes")  # type: ignore[arg-type]


def test_an_adapter_of_another_base_is_refused_by_its_name(adapted, class_checkpoint, tmp_path) -> None:
    pipe = InferenceServer(str(adapted), "cpu").pipe
    pipe.transformer.blocks[0].attn.proj.weight.data[0, 0] += 0.01
    pipe.save_pretrained(tmp_path / "other")
    runs = str(tmp_path / "runs")
    server = InferenceServer(str(tmp_path / "other"), "cpu", lora_folder=runs)
    with pytest.raises(UserError, match="the adapter hats was made for a base with other weights") as error:
        server.generate(replace(REQUEST, lora=(("hats", 1.0),)), silent)
    assert runs not in f"{error.value.what}{error.value.fix}"
    assert len(server.generate(REQUEST, silent)) == 1  # without it all is well


# ---------------------------------------------------------------- control images


def test_control_images_lead_as_those_of_generate(
    control_checkpoint, image, load_program, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server = InferenceServer(str(control_checkpoint), "cpu")
    assert server.capabilities == model_capabilities(server.pipe.model)
    assert server.capabilities.control == ("image", "labels")
    assert "draws under label maps" in server.facts
    ids = np.random.default_rng(1).integers(0, 2, (8, 8), np.uint8)
    Image.fromarray(ids).save("ids.png")  # greys that nobody could tell apart
    colours = np.array([(0, 0, 255), (0, 255, 0)], np.uint8)
    assert np.array_equal(server.control("labels", str(tmp_path / "ids.png")).convert("RGB"), colours[ids])
    assert server.control("image", str(image)).size == (12, 8)
    request = GenerationRequest(steps=2, seed=3)
    led = replace(
        request, control_image=str(image), control_labels=str(tmp_path / "ids.png"),
        control_image_scale=2.0, control_labels_scale=0.5,
    )  # fmt: skip
    [drawn] = server.generate(led, silent)
    line = ["--checkpoint", control_checkpoint, "--device", "cpu", "--seed", 3, "--steps", 2, "-o", "out.png"]
    words = ["--control", f"image={image}", "labels=ids.png", "--control-scale", "image=2,labels=0.5"]
    load_program("generate").main([*map(str, [*line, *words])])
    with Image.open("out.png") as expected:
        assert drawn.tobytes() == expected.tobytes()
    [plain] = server.generate(request, silent)
    assert plain.tobytes() != drawn.tobytes()
    [without] = server.generate(replace(led, control_image_scale=0, control_labels_scale=0), silent)
    assert without.tobytes() == plain.tobytes()
    [alone] = server.generate(
        replace(led, control_image=None), silent
    )  # a scale of what is not there is none
    assert alone.tobytes() not in (plain.tobytes(), drawn.tobytes())


def test_control_images_that_cannot_be_used_are_named_without_the_servers_folder(
    control_checkpoint, tmp_path
) -> None:
    server = InferenceServer(str(control_checkpoint), "cpu")
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / "ids.png")
    (tmp_path / "text.png").write_text("no image")
    for kind, name, message in (("labels", "ids.png", "the label 7"), ("image", "text.png", "not an image")):
        with pytest.raises(UserError, match=message) as error:
            server.control(kind, str(tmp_path / name))
        assert name in error.value.what and str(tmp_path) not in f"{error.value.what}{error.value.fix}"
    for kind in ("image", "labels"):
        with pytest.raises(UserError, match=f"control_{kind}_scale"):
            GenerationRequest(**{f"control_{kind}_scale": 11})


# ---------------------------------------------------------------- checkpoints


def test_what_a_checkpoint_takes_is_known_before_it_is_loaded(caption_checkpoint) -> None:
    server = InferenceServer(str(caption_checkpoint), "cpu")
    assert not server._opened
    assert server.capabilities == Capabilities(text=True, labels=(), masks=False)
    assert model_capabilities(server.pipe.model) == server.capabilities
    messages: list[str] = []
    InferenceServer(str(caption_checkpoint), "cpu").generate(REQUEST, lambda *step: messages.append(step[2]))
    assert messages == ["Loading the model", *["Generating"] * 3]


@pytest.mark.parametrize(
    ("pipe", "network", "labels", "masks"),
    [
        ({"id2label": {"0": "hat", "1": "tree"}}, {"num_classes": 2}, ("hat", "tree"), False),
        ({"id2label": None}, {"num_classes": 3}, ("0", "1", "2"), False),
        ({}, {"num_classes": None, "text_dim": None, "condition_channels": 80}, (), True),
    ],
)
def test_what_configs_say_of_classes_and_masks(pipe, network, labels, masks, tmp_path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(pipe))
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(network))
    found = read_capabilities(str(tmp_path))
    assert found == Capabilities(text=False, labels=labels, masks=masks)
    assert found.condition == bool(labels)


def test_a_checkpoint_that_is_none_is_refused_before_a_page_is_shown(tmp_path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        InferenceServer(str(tmp_path / "nowhere"), "cpu")


def test_the_page_is_built_without_torch_and_every_request_loads_the_models_first(caption_checkpoint) -> None:
    """The page is up before torch is, whose import takes longer. Whoever imports beside it would see half a library."""
    pytest.importorskip("gradio", reason='needs Gradio: pip install -e ".[app]"')
    script = f"""
import sys
from latentflow.errors import UserError
from latentflow.web import inference_server as web, page
def half_loaded(*arguments):
    assert not {{"torch", "diffusers", "transformers"}} & set(sys.modules)
    raise UserError("in time")
web.InferenceServer.open = half_loaded
server, request = web.InferenceServer({str(caption_checkpoint)!r}), web.GenerationRequest(prompt="red")
quiet, upload = lambda *_: None, {str(caption_checkpoint / "nothing.png")!r}
page.build(server)
for call in (
    lambda: server.choices,
    lambda: server.facts,
    lambda: server.opened(upload),
    lambda: server.unknown_words(request, "red"),
    lambda: server.generate(request, quiet),
    lambda: server.inpaint(request, quiet, upload, []),
    lambda: server.edit(request, quiet, upload, "", None, 1),
):
    try:
        call()
    except UserError as error:
        assert error.what == "in time", error
    else:
        raise AssertionError("not asked for")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
