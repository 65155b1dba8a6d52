"""The procedural set: captions and specs are one to one, held-out ones never train, the checker is right."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from latentflow.data import read_image, to_tensor
from latentflow.data.sources import shapes as s
from latentflow.data.sources.shapes import AREA, COLOURS, SHAPES, find_objects
from latentflow.errors import UserError

SPECS = s.all_specs()
SINGLES = [spec for spec in SPECS if isinstance(spec, s.Single)]
PAIRS = [spec for spec in SPECS if isinstance(spec, s.Pair)]
SOME = SINGLES + PAIRS[::11]


def test_counts() -> None:
    assert len(SINGLES) == 6 * 4 * 2 * 5 and len(PAIRS) == 4 * 24 * 20
    assert len(s.held_out_captions()) == 280 and len(s.train_captions()) == 1880


def test_captions_round_trip() -> None:
    assert s.caption(s.Single("red", "circle", "small", "left")) == "a small red circle on the left"
    pair = s.Pair("red", "circle", "left of", "blue", "square")
    assert s.caption(pair) == "a red circle left of a blue square"
    assert s.caption(s.reverse(pair)) == "a blue square right of a red circle"
    assert [s.parse(s.caption(spec)) for spec in SPECS] == SPECS
    assert s.parse(" A Red circle  left of a blue square") == pair


@pytest.mark.parametrize(
    "text", ["", "a red circle", "a red circle left of a red square", "a pink dog at the top"]
)
def test_other_captions_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a caption of shapes"):
        s.parse(text)


# --- what is held out ---------------------------------------------------------------------------------


def test_held_out_captions_are_never_trained_on() -> None:
    source = s.train_source()
    held_out = set(s.held_out_captions())
    assert source.kind == "text" and not held_out & set(source.captions())
    assert set(source.captions()) == set(s.train_captions())
    told_otherwise = {
        s.caption(s.reverse(spec)) for spec in map(s.parse, held_out) if isinstance(spec, s.Pair)
    }
    assert told_otherwise <= held_out  # neither is the same image in other words


def test_any_two_attributes_still_occur_together_in_training() -> None:
    for specs in (SINGLES, PAIRS):
        rows = [dataclasses.astuple(spec) for spec in specs]
        trained_rows = [dataclasses.astuple(spec) for spec in specs if not s.is_held_out(spec)]
        for i, j in itertools.combinations(range(len(rows[0])), 2):
            every = {(row[i], row[j]) for row in rows}
            trained = {(row[i], row[j]) for row in trained_rows}
            assert trained == every


def test_held_out_attributes_are_balanced() -> None:
    held_out = [spec for spec in SPECS if s.is_held_out(spec)]
    for kind, names, counts in (
        (s.Single, COLOURS, (6, 7)),
        (s.Single, SHAPES, (10, 10)),
        (s.Pair, SHAPES, (60, 60)),
    ):
        attribute = "colour" if names is COLOURS else "shape"
        for name in names:
            number = sum(isinstance(spec, kind) and getattr(spec, attribute) == name for spec in held_out)
            assert counts[0] <= number <= counts[1], (kind, name, number)


def test_sources() -> None:
    by_class = s.train_source("class")
    assert by_class.kind == "class" and len(by_class.classes) == 24 and "red circle" in by_class.classes
    assert len(by_class) == 200 * s.RENDERS_PER_SINGLE and len(set(by_class.class_ids())) == 24
    everything = s.train_source()
    assert len(everything) == len(by_class) + 1680
    assert (
        len({e.name for e in everything.examples}) == len(set(everything.content_keys())) == len(everything)
    )


# --- drawing ------------------------------------------------------------------------------------------


def test_masks_are_exact() -> None:
    for shape in SHAPES:
        image, masks = s.render(s.Single("blue", shape, "large", "centre"), 256)
        assert masks.shape == (1, 256, 256) and masks.dtype == torch.bool
        wanted = AREA[shape] * s.SIZES["large"] ** 2 * 256**2
        assert abs(masks.sum() - wanted) < 0.01 * wanted
        inside = np.asarray(image)[masks[0].numpy()]
        assert (np.median(inside, axis=0) == COLOURS["blue"]).all()
        assert (np.asarray(image)[0] == 255).all()


def test_masks_follow_the_order_of_the_caption() -> None:
    _, masks = s.render(s.parse("a red circle below a blue square"), 32)
    rows = [mask.nonzero()[:, 0].float().mean() for mask in masks]
    assert rows[0] > 20 and rows[1] < 12


def test_a_seed_moves_objects_a_little_and_always_the_same_way() -> None:
    spec = s.parse("a large red square on the left")
    still, moved = s.render(spec, 64)[1], s.render(spec, 64, seed=3)[1]
    assert torch.equal(moved, s.render(spec, 64, seed=3)[1]) and not torch.equal(moved, still)
    shift = moved.nonzero().float().mean(0) - still.nonzero().float().mean(0)
    assert (shift.abs() <= 64 * s.JITTER + 0.5).all()


# --- the checker --------------------------------------------------------------------------------------


def shown(monkeypatch: pytest.MonkeyPatch, image: Image.Image, specs: list[s.Spec]) -> list[s.Spec]:
    """Those of ``specs`` that the image shows; its objects, which do not depend on them, are found once."""
    found = find_objects(image)
    with monkeypatch.context() as patch:
        patch.setattr(s, "find_objects", lambda _: found)
        return [spec for spec in specs if s.check(image, s.caption(spec))]


@pytest.mark.parametrize("resolution", [32, 64])
def test_clean_images_are_right(resolution: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [
        spec for spec in PAIRS if spec.relation in ("left of", "above")
    ]  # the others say the same from behind
    assert {*pairs, *map(s.reverse, pairs)} == set(PAIRS)
    some = pairs if resolution == 32 else pairs[::6]
    for seed, told in enumerate([*([spec] for spec in SINGLES), *([spec, s.reverse(spec)] for spec in some)]):
        assert shown(monkeypatch, s.render(told[0], resolution, seed)[0], told) == told


def test_training_images_are_right_after_reading() -> None:
    for example in s.train_source().examples[::97]:
        assert example.text is not None
        assert s.check(to_tensor(read_image(example, 32)), example.text)


def changes(spec: s.Spec) -> list[s.Spec]:
    """Every spec that differs in one attribute."""
    choices = {
        "colour": COLOURS, "other_colour": COLOURS, "shape": SHAPES, "other_shape": SHAPES,
        "size": s.SIZES, "position": s.POSITIONS, "relation": s.RELATIONS,
    }  # fmt: skip
    found = []
    for field in dataclasses.fields(spec):
        for value in choices[field.name]:
            other = dataclasses.replace(spec, **{field.name: value})
            if other != spec and not (isinstance(other, s.Pair) and other.colour == other.other_colour):
                found.append(other)
    return found


def test_any_change_of_one_attribute_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, spec in enumerate(SINGLES[::3] + PAIRS[::29]):
        assert shown(monkeypatch, s.render(spec, 32, seed)[0], changes(spec)) == []


def blur(image: Image.Image, pixels_of_32: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(pixels_of_32 * image.width / 32))


def grain(image: Image.Image, deviation: float) -> Image.Image:
    values = np.asarray(image) + np.random.default_rng(0).normal(0, deviation, (*image.size, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


DAMAGES: list[Callable[[Image.Image], Image.Image]] = [
    lambda image: blur(image, 0.9), lambda image: grain(image, 30), lambda image: jpeg(image, 90),
    lambda image: grain(blur(image, 0.6), 10),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_mild_damage_is_tolerated(damage: Callable[[Image.Image], Image.Image]) -> None:
    """Blur of 0.9 pixels of 32, noise of deviation 30 of 255, JPEG 90 at 32 pixels: at least 99.5 % right."""
    some = SOME[::2]
    right = [s.check(damage(s.render(spec, 32, seed)[0]), s.caption(spec)) for seed, spec in enumerate(some)]
    assert np.mean(right) >= 0.995


def test_half_formed_and_surplus_objects_are_wrong() -> None:
    text = "a large red square in the centre"
    image, masks = s.render(s.parse(text), 64)
    values, inside = np.asarray(image), masks[0].numpy()[..., None]
    rows, columns = np.indices((64, 64))[..., None]
    corner = (rows >= 2) & (rows < 10) & (columns >= 2) & (columns < 10)
    changed: list[tuple[np.ndarray, object, str | None]] = [  # where, to which levels, what is said
        (inside & False, 0, None),
        (inside & (rows > 32), COLOURS["blue"], "an object has more than one colour"),
        (rows < 32, 255, ""),
        (inside, values // 2 + 127, "an object has none of the colours"),
        (corner, COLOURS["green"], "2 objects instead of 1"),
        (~inside, 190, ""),
    ]
    for where, levels, why in changed:
        found = s.problem(Image.fromarray(np.where(where, levels, values).astype(np.uint8)), text)
        assert found == why if why != "" else found is not None
    assert s.problem(Image.new("RGB", (32, 32), "white"), text) == "there is no object"
    assert s.problem(Image.new("RGB", (32, 32), COLOURS["red"]), text) is not None
    assert not s.check(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1, text)
