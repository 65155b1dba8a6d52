"""What requests of the web page do, without a browser and without Gradio."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentflow.errors import UserError
from latentflow.inference.checkpoint import Takes, taken_by
from latentflow.web.studio import MOST_IMAGES, Order, Studio, painted

Checkpoint = Callable[..., Path]


def silent(done: int, total: int, what: str) -> None:
    pass


@pytest.fixture(scope="module")
def studio(caption_checkpoint: Path) -> Studio:
    return Studio(str(caption_checkpoint), "cpu")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)).save(path)
    return path


ORDER = Order(prompt="red apple", steps=2)


def test_two_at_once_get_what_each_would_get_alone(studio: Studio) -> None:
    orders = {
        f"tab{i}": replace(ORDER, prompt=("red apple", "blue hat")[i % 2], seed=i, steps=3, images=1 + i % 2)
        for i in range(4)
    }
    alone = {who: studio.generate(order, silent) for who, order in orders.items()}
    together: dict[str, list[Image.Image]] = {}
    start = threading.Barrier(len(orders))

    def ask(who: str) -> None:
        start.wait()
        together[who] = studio.generate(orders[who], silent)

    threads = [threading.Thread(target=ask, args=(who,)) for who in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for who, images in alone.items():
        assert [p.tobytes() for p in together[who]] == [p.tobytes() for p in images]
    assert len({images[0].tobytes() for images in alone.values()}) == len(orders)


def test_progress_counts_the_steps(studio: Studio) -> None:
    seen: list[tuple[int, int]] = []
    studio.generate(replace(ORDER, steps=4), lambda done, total, what: seen.append((done, total)))
    assert seen == [(0, 1), *((i, 4) for i in (1, 2, 3, 4))]


def test_what_progress_raises_ends_a_request_at_its_step(studio: Studio) -> None:
    class Left(Exception):  # noqa: N818
        pass

    steps = []

    def leave(done: int, total: int, what: str) -> None:
        steps.append(done)
        if done == 2:
            raise Left

    with pytest.raises(Left):
        studio.generate(replace(ORDER, steps=50), leave)
    assert steps == [0, 1, 2]
    assert len(studio.generate(ORDER, silent)) == 1  # the next one is drawn


def test_only_what_was_painted_over_changes(studio: Studio, image: Path) -> None:
    stroke = Image.new("RGBA", (48, 32))  # the canvas is four times as large
    stroke.paste((255, 0, 255, 255), (16, 8, 32, 24))
    [result] = studio.inpaint(ORDER, silent, str(image), [stroke])
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
def test_editing(studio: Studio, image: Path, method: str) -> None:
    def edited(strength: float, images: int = 1) -> list[Image.Image]:
        order = replace(ORDER, images=images)
        return studio.edit(order, silent, str(image), "blue hat", method, strength)

    assert edited(1.0)[0].size == (12, 8)
    assert edited(1.0)[0].tobytes() != edited(0.0)[0].tobytes()
    assert len(edited(1.0, images=2)) == (1 if method == "inversion" else 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": MOST_IMAGES + 1}, "images is 17"),
        ({"images": 0}, "images is 0"),
        ({"steps": 10_000}, "steps is 10000"),
        ({"seed": -1}, "seed is -1"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"prompt": "a" * 1001}, "1001 characters"),
        ({"solver": "huen"}, "did you mean 'heun'"),
    ],
)
def test_bounds(studio: Studio, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        studio.generate(replace(ORDER, **changes), silent)


def test_a_bad_upload_is_named_without_the_server_s_folders(studio: Studio, tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("not an image")
    with pytest.raises(UserError, match=r"notes\.png is not an image") as error:
        studio.edit(ORDER, silent, str(path), "", "flowedit", 0.5)
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(UserError, match="there is no image"):
        studio.edit(ORDER, silent, None, "", "flowedit", 0.5)
    with pytest.raises(UserError, match="nothing is painted over"):
        Image.new("RGB", (8, 8)).save(path)
        studio.inpaint(ORDER, silent, str(path), [])


def test_an_upload_of_another_format_is_refused(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "drawing.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    )
    with pytest.raises(UserError, match=r"drawing\.png is not an image"):
        studio.opened(str(tmp_path / "drawing.png"))


def test_large_uploads_are_shrunk_and_that_is_said(studio: Studio, image: Path, tmp_path: Path) -> None:
    Image.new("RGB", (400, 200)).save(tmp_path / "large.png")
    shrunk, note = studio.opened(str(tmp_path / "large.png"))
    assert shrunk.size == (32, 16)  # four times the 8 pixels of the training
    assert note == "Shrunk from 400 x 200 to 32 x 16 pixels."
    assert studio.opened(str(image))[1] == ""


def test_what_a_checkpoint_takes_is_known_before_it_is_loaded(caption_checkpoint: Path) -> None:
    studio = Studio(str(caption_checkpoint), "cpu")
    assert studio._pipe is None
    assert studio.takes == Takes(text=True, labels=(), masks=False)
    assert taken_by(studio.pipe.config, studio.pipe.transformer.config) == studio.takes
    told: list[str] = []
    Studio(str(caption_checkpoint), "cpu").generate(ORDER, lambda *step: told.append(step[2]))
    assert told == ["Loading the models", "Drawing", "Drawing", "Drawing"]


@pytest.mark.parametrize(
    ("pipe", "network", "expected"),
    [
        ({"id2label": {"0": "hat", "1": "tree"}}, {"num_classes": 2}, Takes(False, ("hat", "tree"), False)),
        ({"id2label": None}, {"num_classes": 3}, Takes(False, ("0", "1", "2"), False)),
        ({}, {"num_classes": None, "text_dim": None, "condition_channels": 80}, Takes(False, (), True)),
    ],
)
def test_what_configs_say_of_classes_and_masks(
    pipe: dict[str, Any], network: dict[str, Any], expected: Takes
) -> None:
    assert taken_by(pipe, network) == expected
    assert expected.condition == bool(expected.labels)


def test_a_checkpoint_that_is_none_is_refused_before_a_page_is_shown(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        Studio(str(tmp_path / "nowhere"), "cpu")


def test_the_page_is_built_without_torch(caption_checkpoint: Path) -> None:
    """Which takes longer to import than everything that the page needs."""
    pytest.importorskip("gradio", reason='needs Gradio: pip install -e ".[app]"')
    script = (
        "import sys; from latentflow.web.page import build; from latentflow.web.studio import Studio;"
        f"build(Studio({str(caption_checkpoint)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_every_request_loads_the_models_before_it_imports_anything(caption_checkpoint: Path) -> None:
    """The page is there while the main thread loads them: whoever imports beside it sees half a library."""
    script = f"""
import sys
from latentflow.errors import UserError
from latentflow.web import studio
def half_loaded(*arguments):
    assert not {{"torch", "diffusers", "transformers"}} & set(sys.modules)
    raise UserError("in time")
studio.open_pipeline = half_loaded
one, order = studio.Studio({str(caption_checkpoint)!r}), studio.Order(prompt="red")
quiet, upload = lambda *_: None, {str(caption_checkpoint / "nothing.png")!r}
for request in (
    lambda: one.solvers,
    lambda: one.inpainting_methods,
    lambda: one.editing_methods,
    lambda: one.opened(upload),
    lambda: one.stroke(upload),
    lambda: one.unknown_words("red"),
    lambda: one.generate(order, quiet),
    lambda: one.inpaint(order, quiet, upload, []),
    lambda: one.edit(order, quiet, upload, "", None, 1),
):
    try:
        request()
    except UserError as error:
        assert error.what == "in time", error
    else:
        raise AssertionError("not asked for")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
