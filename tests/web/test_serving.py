"""The page as programs and strangers meet it: a server in this process, over HTTP."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio", reason='needs Gradio: pip install -e ".[app]"')
import httpx

from latentflow.flow import EDITING, SOLVERS
from latentflow.flow.inpainting import INPAINTING
from latentflow.web import page
from latentflow.web.inference_server import GenerationRequest, InferenceServer, Progress
from latentflow.web.serving import start
from latentflow.web.tab import USUAL

from .conftest import MARKUP


class Held(InferenceServer):
    """A server that draws "hold" for as long as somebody wants it."""

    def __init__(self, checkpoint: str) -> None:
        super().__init__(checkpoint, "cpu")
        self.drawn: list[str] = []
        self.steps = 0
        self.go_on = threading.Event()

    def _sample(
        self, kind: str, request: GenerationRequest, progress: Progress, **settings: Any
    ) -> list[Image.Image]:
        if request.prompt in ("hold", "next") or (request.prompt or "").isdigit():
            progress(0, 1, "Drawing")
            self.drawn.append(request.prompt or "")
            end = time.monotonic() + 60
            while request.prompt == "hold" and time.monotonic() < end and not self.go_on.wait(0.01):
                self.steps += 1
                progress(self.steps, 1000, "Drawing")
            return [Image.new("RGB", (8, 8))]
        return super()._sample(kind, request, progress, **settings)


@contextlib.contextmanager
def serving(server: InferenceServer, uploads: Path, **settings: Any) -> Iterator[httpx.Client]:
    """Serve a page whose uploads are kept in a folder."""
    with pytest.MonkeyPatch.context() as patch, socket.socket() as probe:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        page = start(server, "127.0.0.1", port, **settings)
        try:
            with httpx.Client(base_url=f"{page.local_url}gradio_api", timeout=60) as client:
                yield client
        finally:
            page.close()


@pytest.fixture(scope="module")
def served(
    caption_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Held, httpx.Client]]:
    server = Held(str(caption_checkpoint))
    with serving(server, tmp_path_factory.mktemp("uploads"), allowed_hosts=["draw.example"]) as client:
        yield server, client


@pytest.fixture
def server(served: Any) -> Held:
    server: Held = served[0]
    server.drawn.clear()
    server.go_on.clear()
    return server


@pytest.fixture
def client(served: Any) -> httpx.Client:
    client: httpx.Client = served[1]
    return client


def begin(client: httpx.Client, tab: str = "generate", **values: Any) -> str:
    """Ask for an image, and return the event."""
    answer = client.post(f"/call/v2/{tab}", json=values)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["event_id"])


def result(client: httpx.Client, event: str, tab: str = "generate") -> tuple[str, Any]:
    """Listen for the answer: "complete" or "error", and its data."""
    lines = client.get(f"/call/v2/{tab}/{event}").text.splitlines()
    start = next(i for i, line in enumerate(lines) if line in ("event: complete", "event: error"))
    return lines[start].removeprefix("event: "), json.loads(lines[start + 1].removeprefix("data: "))


def ask(client: httpx.Client, tab: str = "generate", **values: Any) -> tuple[str, Any]:
    """Ask for an image and listen for the answer."""
    return result(client, begin(client, tab, **values), tab)


def listening(client: httpx.Client, event: str) -> contextlib.AbstractContextManager[httpx.Response]:
    """Listen in the background while the block runs, and leave then."""
    return client.stream("GET", f"/call/v2/generate/{event}")


def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def config_of(client: httpx.Client) -> dict[str, Any]:
    """Return what the page is built from."""
    config: dict[str, Any] = client.get(f"{root_of(client)}/config").json()
    return config


def root_of(client: httpx.Client) -> str:
    return str(client.base_url).removesuffix("/gradio_api/")


def paint(client: httpx.Client, name: str, content: bytes, kind: str = "layer") -> None:
    """Send what a window has painted, as the editor does."""
    editor = next(part["id"] for part in config_of(client)["components"] if part["type"] == "imageeditor")
    data = {"component_id": editor, "session_hash": "me", "fn_name": "accept_blobs", "type": kind}
    data |= {"id": name, "index": str(10**12)}
    sent = client.post("/component_server", data=data, files={"file": ("a.png", content)})
    assert sent.status_code == 200


def upload(client: httpx.Client, name: str, content: bytes) -> dict[str, Any]:
    [path] = client.post("/upload", files={"files": (name, content)}).json()
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


# ---------------------------------------------------------------- what programs get


def test_a_program_takes_the_choices_that_the_page_offers(client) -> None:
    def pixels(**values: Any) -> bytes:
        state, data = ask(client, prompt="red apple", seed=5, new_seed=False, steps=3, **values)
        assert state == "complete", data
        gallery, seed, unknown = data
        assert (seed, unknown) == (5, "") and gallery[0]["caption"] == "seed 5"
        return client.get(gallery[0]["image"]["url"]).content

    usual, heun, euler = pixels(), pixels(solver="heun"), pixels(solver="euler")
    assert usual == pixels(solver=USUAL) and len({heun, euler}) == 2
    image = upload(client, "a.png", encoded(Image.new("RGB", (8, 8), "red")))
    stroke = upload(client, "stroke.png", encoded(Image.new("RGBA", (8, 8), "white")))
    strokes = {"background": None, "layers": [stroke], "composite": None}
    for values in (
        {"tab": "inpaint", "image": image, "strokes": strokes, "method": "repaint", "feather": 2},
        {"tab": "edit", "image": image, "method": "image-to-image", "strength": 0.5},
    ):
        assert ask(client, prompt="red apple", steps=2, **values)[0] == "complete"


def test_a_download_keeps_the_texts_in_an_image(server, client, monkeypatch) -> None:
    """Those that a pipeline would write into its images, such as their prompt."""
    image = Image.new("RGB", (8, 8))
    image.info["parameters"] = "red apple"
    monkeypatch.setattr(server, "_sample", lambda *_, **__: [image])
    _, (gallery, *_) = ask(client, prompt="red apple")
    content = client.get(gallery[0]["image"]["url"]).content
    assert Image.open(io.BytesIO(content)).info == {"parameters": "red apple"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"solver": "huen"}, "Unknown solver 'huen'. Did you mean 'heun'?"),
        ({"solver": ["heun"]}, "solver must be text"),
        ({"seed": -1, "new_seed": False}, "seed is -1. Give a whole number from 0 to 4294967295."),
        ({"seed": 2**70, "new_seed": False}, f"seed is {2**70}. Give a whole number"),
        ({"seed": None, "new_seed": False}, "seed is None"),
        ({"steps": 201}, "steps is 201. Give a whole number from 1 to 200."),
        ({"steps": "many"}, "steps is 'many'"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": True}, "steps is True"),
        ({"images": 17}, "images is 17. Give a whole number from 1 to 16."),
        ({"images": 0}, "images is 0"),
        ({"guidance": "NaN"}, "guidance is 'NaN'. Give a finite number from 0 to 20"),
        ({"prompt": 3}, "prompt must be text"),
        ({"prompt": "a" * 1001}, "prompt has 1001 characters"),
        ({"negative_prompt": {}}, "negative_prompt must be text"),
        ({"tab": "edit", "image": None}, "there is no image"),
        ({"tab": "edit", "image": "a", "method": "flowedti"}, "did you mean 'flowedit'"),
        ({"tab": "edit", "image": "a", "method": 3}, "method must be text"),
        (
            {"tab": "edit", "image": "a", "strength": 1.5},
            "strength is 1.5. Give a finite number from 0 to 1.",
        ),
        ({"tab": "edit", "image": "text", "strength": 0.5}, "a.png is not an image"),
        ({"tab": "edit", "image": "huge"}, "a.png is too large: 7200 x 7200 pixels"),
        ({"tab": "edit", "image": "http"}, "Nothing is fetched from other addresses"),
        ({"tab": "edit", "image": "elsewhere"}, "was not uploaded"),
        ({"tab": "edit", "image": {}}, "validation error"),
        ({"tab": "inpaint", "image": "a", "strokes": None}, "nothing is painted over"),
        ({"tab": "inpaint", "image": "a", "strokes": {"id": "none"}}, "nothing is painted over"),
        ({"tab": "inpaint", "image": "a", "strokes": None, "margin": 65}, "margin is 65"),
        ({"tab": "inpaint", "image": "a", "strokes": None, "feather": -1}, "feather is -1"),
    ],
)
def test_a_program_is_told_what_was_wrong(client, tmp_path, values, message) -> None:
    (tmp_path / "elsewhere.png").write_bytes(encoded(Image.new("RGB", (8, 8))))
    contents = {
        "a": encoded(Image.new("RGB", (8, 8), "red")),
        "text": b"no image",
        "huge": encoded(Image.new("1", (7200, 7200))),
    }
    elsewhere = {"http": "http://192.0.2.1/a.png", "elsewhere": str(tmp_path / "elsewhere.png")}
    values = {"tab": "generate", "prompt": "red apple", "steps": 2} | values
    if (name := str(values.get("image"))) in elsewhere:
        values["image"] = {"path": elsewhere[name], "meta": {"_type": "gradio.FileData"}}
    elif name in contents:
        values["image"] = upload(client, "a.png", contents[name])
    state, data = ask(client, **values)
    assert state == "error"
    assert message.lower() in data["error"].lower()
    assert os.environ["GRADIO_TEMP_DIR"] not in data["error"]  # nor does it say where the server keeps files


def test_a_loaded_page_offers_its_choices_and_sends_images_to_other_tabs(client) -> None:
    _, (gallery, *_) = ask(client, prompt="red apple", seed=5, new_seed=False, images=2, steps=1)

    def outputs_of(event: dict[str, Any], *data: Any) -> list[Any]:
        body = {"data": data, "fn_index": event["id"], "session_hash": "me"}
        found: list[Any] = client.post("/run/predict", json=body).json()["data"]
        return found

    headers, offered, sent = [], [], []
    for event in config_of(client)["dependencies"]:
        if event["targets"][0][1] == "load":
            [output] = outputs_of(event)
            if isinstance(output, str):
                headers.append(output)
            else:
                offered.append([name for name, _ in output["choices"]])
        elif event["api_name"].startswith("image_at"):
            sent.append(Path(outputs_of(event, None, gallery)[0]["path"]).read_bytes())
    choices = [SOLVERS, INPAINTING, SOLVERS, [*EDITING, "image-to-image"], SOLVERS]
    assert offered == [[USUAL, *names] for names in choices]
    [header] = headers
    assert re.findall('class="fact">(.*?)<', header) == ["8 x 8 pixels", "text prompts"]
    assert sent == [Path(gallery[0]["image"]["path"]).read_bytes()] * 6  # the first, as none is selected


def test_words_that_the_checkpoint_does_not_know_are_named(client, server, monkeypatch) -> None:
    asked: list[list[str]] = []

    def unknown_words(prompts: list[str]) -> list[str]:
        asked.append(prompts)
        return ["<b>zeppelin", "blorp"]

    monkeypatch.setattr(server.pipe, "unknown_words", unknown_words, raising=False)
    body = {"prompt": "red <b>zeppelin blorp", "negative_prompt": "blorp", "steps": 1}
    messages = client.get("/queue/data", params={"session_hash": begin(client, **body)}).text
    assert asked == [["red <b>zeppelin blorp", "blorp"]]
    lines = map(json.loads, re.findall("(?m)^data: (.*)$", messages))
    [shown] = [message for message in lines if message["msg"] == "log"]
    assert shown["level"] == "warning" and shown["log"].endswith(": &lt;b&gt;zeppelin, blorp")
    assert ask(client, **body)[1][2] == "<b>zeppelin, blorp"


def test_names_that_are_none_are_refused_with_a_sentence(client) -> None:
    for values, name in (({"solvre": "heun"}, "solvre"), ({"prompt": "red"}, "image")):
        answer = client.post("/call/v2/edit", json=values)
        assert answer.status_code == 422 and name in answer.json()["detail"]


def test_an_upload_that_made_room_is_asked_for_again(client) -> None:
    image = upload(client, "gone.png", encoded(Image.new("RGB", (8, 8), "blue")))
    Path(image["path"]).unlink()
    assert ask(client, "edit", prompt="red", image=image)[1]["error"] == (
        "gone.png is no longer stored. Upload it again."
    )


def test_drawn_images_take_the_room_of_the_oldest_files(client, monkeypatch) -> None:
    old = Path(upload(client, "old.png", encoded(Image.new("RGB", (8, 8), "green")))["path"])
    os.utime(old, (0, 0))
    assert ask(client, prompt="red apple", steps=1)[0] == "complete"
    assert old.exists()
    monkeypatch.setattr("latentflow.web.tab.MOST_KEPT", 1000)
    assert ask(client, prompt="red apple", steps=1)[0] == "complete"
    assert not old.exists()


# ---------------------------------------------------------------- whose turn it is


def test_requests_are_drawn_in_their_order_and_no_more_wait_than_is_said(server, client, monkeypatch) -> None:
    with listening(client, begin(client, prompt="hold")):
        until(lambda: server.drawn)
        events = [begin(client, prompt=str(i)) for i in range(page.MOST_WAITING)]
        refused = client.post("/call/v2/generate", json={"prompt": "one more"})
        assert refused.status_code == 503 and "full" in refused.json()["detail"]
        large = client.post("/call/v2/generate", json={"prompt": "a" * 900_000})
        assert large.status_code == 413
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(listening(client, event)) for event in events[:4]]
            monkeypatch.setattr("latentflow.web.tab.PATIENCE", 1.0)
            server.go_on.set()
            for stream in streams:
                assert "event: complete" in stream.read().decode()
    assert server.drawn == ["hold", "0", "1", "2", "3"]
    # Nobody listens for the other twelve: none is drawn, and all together hold nobody up for longer than one.
    until(lambda: client.get("/queue/status").json()["queue_size"] == 0, 5)
    state, data = result(client, events[-2])
    assert state == "error" and "The client left" in data["error"]
    assert server.drawn == ["hold", "0", "1", "2", "3"]


def test_a_client_that_leaves_ends_its_request_at_the_next_step(server, client) -> None:
    with listening(client, begin(client, prompt="hold")):
        until(lambda: server.drawn)
        waiting = begin(client, prompt="0")
        with listening(client, waiting):
            assert client.get("/queue/status").json()["queue_size"] == 1
        until(lambda: client.get("/queue/status").json()["queue_size"] == 0)
    assert ask(client, prompt="next")[0] == "complete"
    steps = server.steps
    time.sleep(0.1)
    assert server.steps == steps
    assert server.drawn == ["hold", "next"]


def test_cancel_ends_the_running_request_and_no_other(server, client) -> None:
    events = config_of(client)["dependencies"]
    generate = next(event["id"] for event in events if event["api_name"] == "generate")
    event = begin(client, prompt="hold")
    with listening(client, event):
        until(lambda: server.drawn)
        waiting = begin(client, prompt="next")
        with listening(client, waiting):
            body = {"session_hash": event, "fn_index": generate, "event_id": event}
            assert client.post("/cancel", json=body).status_code == 200
            until(lambda: server.drawn == ["hold", "next"])
            steps = server.steps
            time.sleep(0.1)
            assert server.steps == steps


# ---------------------------------------------------------------- what strangers get


def test_the_guard_stands_before_everything(client) -> None:
    stranger = {"host": "evil.example"}
    for path in ("", "config", "gradio_api/info", "gradio_api/queue/data?session_hash=a"):
        address = f"{root_of(client)}/{path}"
        assert client.get(address, headers=stranger).status_code == 421
        if "data" not in path:
            assert client.get(address, headers={"host": "draw.example"}).status_code == 200
    for headers in (stranger, {"origin": "http://evil.example"}):
        files = {"files": ("a.png", b"a")}
        assert client.post("/upload", files=files, headers=headers).status_code in (403, 421)
        assert client.post("/call/generate", json={"data": []}, headers=headers).status_code in (403, 421)
    assert client.get("/file=http://192.0.2.1/a.png").status_code == 403


def test_no_upload_is_read_as_a_program(client, tmp_path, monkeypatch) -> None:
    """A file of any name may be PostScript, which Pillow hands to Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    program, image = (
        upload(client, "a.png", script),
        upload(client, "b.png", encoded(Image.new("RGB", (8, 8)))),
    )
    layer = {"background": None, "layers": [program], "composite": program}
    for kind in ("layer", "background", "composite"):
        paint(client, "mine", script, kind)
    for values in (
        {"tab": "edit", "image": program},
        {"tab": "inpaint", "image": program, "strokes": None},
        {"tab": "inpaint", "image": image, "strokes": layer},
        {"tab": "inpaint", "image": image, "strokes": {"id": "mine"}},
    ):
        state, data = ask(client, prompt="red apple", **values)
        assert state == "error" and "is not an image" in data["error"], data
    for event in config_of(client)["dependencies"]:  # what the page itself asks when a file is dropped
        if event["targets"] and event["targets"][0][1] == "change" and event["inputs"]:
            body = {"data": [program], "fn_index": event["id"], "session_hash": "me"}
            assert client.post("/queue/join", json=body).status_code == 200
            assert "is not an image" in client.get("/queue/data", params={"session_hash": "me"}).text
    assert not (tmp_path / "executed").exists()


def test_what_was_painted_in_a_window_is_taken_once_it_is_drawn(client) -> None:
    image = upload(client, "b.png", encoded(Image.new("RGB", (8, 8), "red")))
    stroke = Image.new("RGBA", (8, 8))
    stroke.paste("white", (0, 0, 4, 8))
    paint(client, "../painted", encoded(stroke))
    values = {"prompt": "red apple", "steps": 2, "image": image, "strokes": {"id": "../painted"}}
    state, data = ask(client, "inpaint", **values)
    assert state == "complete", data
    drawn = Image.open(io.BytesIO(client.get(data[0][0]["image"]["url"]).content))
    assert drawn.crop((4, 0, 8, 8)).getcolors() == [(32, (255, 0, 0))]
    assert drawn.crop((0, 0, 4, 8)).getcolors() != [(32, (255, 0, 0))]


def test_a_name_and_a_password_are_asked_for(class_checkpoint, tmp_path) -> None:
    """By the page of a checkpoint of classes."""
    server = InferenceServer(str(class_checkpoint), "cpu")
    with serving(server, tmp_path, auth=("anna", "a:b")) as locked:
        refuse_without_password(locked)
        assert MARKUP not in locked.get(f"{root_of(locked)}/").text
        state, data = ask(locked, class_label="hta", steps=1)
        assert state == "error" and data["error"].startswith("unknown class 'hta'. Did you mean 'hat'?")
        assert "<" not in data["error"]
        for label, message in (
            (None, "no class is chosen. Choose one: hat"),
            (["hat"], "class_label must be text"),
        ):
            assert ask(locked, class_label=label)[1]["error"].startswith(message)
        assert ask(locked, class_label=MARKUP, steps=1)[0] == "complete"
        assert ask(locked, steps=1)[0] == "complete"  # the first class is chosen


def test_no_adapter_is_opened_but_those_that_are_offered(caption_checkpoint, tmp_path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(caption_checkpoint, folder)
    (folder / "glow").mkdir()
    (folder / "glow" / "pytorch_lora_weights.safetensors").write_bytes(b"no adapter")
    with serving(InferenceServer(str(folder), "cpu"), tmp_path / "uploads") as client:
        for values, message in (
            ({"lora": ["/etc"]}, "unknown LoRA '/etc'. Choices: glow"),
            ({"lora": [str(folder / "glow")]}, "unknown LoRA"),
            ({"lora": "glow"}, "lora must be a list of names"),
            ({"lora": ["glow"], "lora_weight_1": 3}, "lora_weight is 3"),
            ({"lora": ["glow"]}, "the adapter glow could not be read"),
        ):
            state, data = ask(client, prompt="red apple", steps=1, **values)
            assert state == "error" and message in data["error"], data
            assert str(folder) not in data["error"] or str(folder) in str(values)
        assert ask(client, prompt="red apple", steps=1)[0] == "complete"
        answer = client.post("/call/v2/generate", json={"prompt": "red", "fast": True})
        assert answer.status_code == 422  # there is no switch, as there is no such adapter


def test_uploads_lead_what_a_program_asks_for(control_checkpoint, tmp_path) -> None:
    with serving(InferenceServer(str(control_checkpoint), "cpu"), tmp_path / "uploads") as client:

        def pixels(**values: Any) -> bytes:
            state, data = ask(client, seed=5, new_seed=False, steps=1, **values)
            assert state == "complete", data
            return client.get(data[0][0]["image"]["url"]).content

        image = upload(client, "a.png", encoded(Image.new("RGB", (8, 8), "red")))
        layout = upload(client, "b.png", encoded(Image.new("L", (8, 8), 1)))
        plain, by_image, by_labels = pixels(), pixels(control_image=image), pixels(control_labels=layout)
        assert len({plain, by_image, by_labels}) == 3
        both: dict[str, Any] = {"control_image": image, "control_labels": layout}
        assert pixels(**both, control_image_scale=0, control_labels_scale=0) == plain
        assert pixels(**both, control_image_scale=0) == by_labels
        state, data = ask(client, steps=1, control_labels=image)
        assert state == "error" and "a.png" in data["error"] and str(tmp_path) not in data["error"], data
        elsewhere = {"path": str(Path(__file__)), "meta": {"_type": "gradio.FileData"}}
        assert ask(client, steps=1, control_image=elsewhere)[0] == "error"


def refuse_without_password(client: httpx.Client) -> None:
    requests = {
        "/config": "GET",
        "/gradio_api/info": "GET",
        "/gradio_api/queue/data?session_hash=a": "GET",
        "/gradio_api/upload": "POST",
        "/gradio_api/queue/join": "POST",
        "/gradio_api/call/generate": "POST",
    }
    root = root_of(client)
    for path, method in requests.items():
        body = {"json": {"data": [], "session_hash": "a", "fn_index": 0}} if method == "POST" else {}
        assert client.request(method, root + path, **body).status_code == 401, path
    for password, status in (("a", 400), ("a:b", 200)):
        login = {"username": "anna", "password": password}
        assert client.post(f"{root}/login", data=login).status_code == status
    assert client.get(f"{root}/config").status_code == 200


def test_tokens_are_drawn_by_the_settings_that_the_page_has_for_them(token_checkpoint, tmp_path) -> None:
    from latentflow import LatentFlowPipeline
    from latentflow.inference.sample import sample_images

    pipe = LatentFlowPipeline.from_pretrained(token_checkpoint)
    with serving(InferenceServer(str(token_checkpoint), "cpu"), tmp_path / "uploads") as client:
        image = upload(client, "a.png", encoded(Image.new("RGB", (16, 16), "red")))
        strokes = {
            "background": None,
            "layers": [upload(client, "s.png", encoded(Image.new("RGBA", (16, 16), "white")))],
        }

        def pixels(tab: str = "generate", **values: Any) -> bytes:
            asked = {"class_label": "hat", "seed": 5, "new_seed": False, "steps": 2, **values}
            state, data = ask(client, tab, **asked)
            assert state == "complete", data
            return Image.open(io.BytesIO(client.get(data[0][0]["image"]["url"]).content)).tobytes()

        jumps = {"temperature": 0.3, "corrector": 2.0}
        expected = sample_images(
            pipe,
            [{"class_labels": 1}],
            5,
            num_inference_steps=2,
            guidance_scale=2.0,
            solver="halton",
            **jumps,
        )
        assert pixels(solver="halton", **jumps) == expected[0].tobytes()
        for tab, given in (
            ("generate", {}),
            ("inpaint", {"image": image, "strokes": strokes | {"composite": None}}),
            ("edit", {"image": image}),
        ):
            results = {
                pixels(tab, **given, **some) for some in ({}, {"temperature": 0.3}, {"corrector": 5.0})
            }
            assert len(results) == 3
        state, data = ask(client, class_label="hat", temperature=0)
        assert state == "error" and "temperature" in str(data)
