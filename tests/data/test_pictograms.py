"""The recipe that builds the data set `pictograms`, on tiny made-up packages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentflow.data import find_source
from latentflow.errors import UserError

from .images import load_program

pytest.importorskip("resvg_py")

NAMES = ["red apple", "pear", "tomato", "melon", "plum", "fig"]
COLOURS = ["#f00", "#0f0", "#00f", "#ff0", "#0ff", "#f0f"]
TONES = ["1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"]
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{}</svg>'


@pytest.fixture
def main(repository: Path) -> Any:
    return load_program(repository / "train" / "recipes" / "pictograms.py").main


def save(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def emojibase() -> Iterator[dict[str, Any]]:
    """Six fruits, a hand in five tones, two people of two tones, a bare tone, a letter without a group."""
    for index, name in enumerate(NAMES):
        yield {"label": name, "hexcode": f"1F34{index}", "group": 4, "subgroup": 42}
    skins = [
        {"label": f"hand: {tone}", "hexcode": f"1F44B-{tone}", "tone": i + 1} for i, tone in enumerate(TONES)
    ]
    skins.append({"label": "hand: two", "hexcode": "1F44B-1F3FB-1F3FC", "tone": [1, 2]})
    yield {"label": "hand", "hexcode": "1F44B-FE0F", "group": 1, "subgroup": 16, "skins": skins}
    yield {"label": "light skin tone", "hexcode": "1F3FB", "group": 2, "subgroup": 32}
    yield {"label": "A", "hexcode": "1F1E6"}


def body(style: int, index: int) -> str:
    """A rectangle whose place is the style and whose colour is the name's."""
    colour = COLOURS[index] if index < len(COLOURS) else f"#{index:x}{index:x}6"
    return f'<rect x="{style}" y="2" width="9" height="{8 + style}" fill="{colour}"/>'


def clip_art(title: str, license: str, width: str, drawing: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20mm" viewBox="0 0 40 20"><metadata>'
        '<r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:c="http://web.resource.org/cc/" '
        f'xmlns:d="http://purl.org/dc/elements/1.1/"><c:Work><d:title>{title}</d:title><d:creator><c:Agent><d:title>'
        f'Ann Other</d:title></c:Agent></d:creator><c:license r:resource="{license}"/></c:Work></r:RDF></metadata>'
        f"{drawing}</svg>"
    )


@pytest.fixture
def packages(tmp_path: Path) -> str:
    modules = tmp_path / "packages" / "node_modules"
    save(modules / "emojibase-data/en/data.json", list(emojibase()))
    words = {"groups": {"1": "people-body", "2": "component", "4": "food-drink"}}
    save(
        modules / "emojibase-data/meta/groups.json",
        words | {"subgroups": {"16": "hand", "32": "tone", "42": "fruit"}},
    )
    keys = [f"1f34{index}" for index in range(6)]
    hands = ["1f44b", *(f"1f44b-{tone.lower()}" for tone in TONES), "1f44b-1f3fb-1f3fc", "1f3fb", "1f1e6"]
    for style, name in enumerate(["@iconify-json/noto", "@iconify-json/fluent-emoji-flat"]):
        icons = {key: {"body": body(style, index)} for index, key in enumerate(keys + hands)}
        aliases = {}
        if style == 0:  # the fig is the plum mirrored
            del icons[keys[5]]
            aliases = {keys[5]: {"parent": keys[4], "hFlip": True}}
        save(modules / name / "icons.json", {"icons": icons, "aliases": aliases, "width": 16, "height": 16})
        save(modules / name / "chars.json", {key: key for key in keys + hands})
        save(modules / name / "package.json", {"version": f"1.2.{style}"})
    save(modules / "@twemoji/svg/package.json", {"version": "15.0.0"})
    for index, key in enumerate(keys):
        save(modules / f"@twemoji/svg/{key}-fe0f.svg", SVG.format(body(2, index)))
    save(modules / "@lobehub/fluent-emoji-3d/package.json", {"version": "1.1.0"})
    (modules / "@lobehub/fluent-emoji-3d/assets").mkdir()
    for index, key in enumerate(keys):
        image = Image.new("RGBA", (64, 64))
        image.paste((40 * index, 90, 200 - 30 * index, 255), (8, 0, 60, 50))
        image.save(modules / f"@lobehub/fluent-emoji-3d/assets/{key}.webp", lossless=True)
    art = tmp_path / "packages/openclipart/usr/share/openclipart/svg"
    public = "http://web.resource.org/cc/PublicDomain"
    wide = '<rect x="4" y="8" width="20" height="4" fill="#a40"/>'
    save(art / "food/cake_01.svg", clip_art("Chocolate Cake", public, "40mm", wide))
    for index, name in enumerate(["lion", "bear", "wolf", "fox"]):  # four share a title: it is a collection's
        drawing = f'<circle cx="20" cy="10" r="{3 + index}" fill="#{index}84"/><path d="M1 {index}h9v2h-9z"/>'
        save(art / f"animals/{name}_ann_oth_0{index}.svg", clip_art("Beasts", public, "40", drawing))
    save(art / "food/pie.svg", clip_art("Pie", "http://creativecommons.org/licenses/GPL/2.0/", "40", wide))
    save(art / "food/words.svg", clip_art("Words", public, "40", wide + "<text>A</text>"))
    save(art / "shapes/stars/star.svg", clip_art("Star", public, "40", wide))
    save(art / "food/nothing.svg", clip_art("Nothing", public, "40", ""))
    save(art / "food/copy_of_cake.svg", clip_art("A Copy", public, "40mm", wide))
    return str(tmp_path / "packages")


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["file_name"]: row for row in map(json.loads, lines)}


def test_names_captions_and_what_is_left_out(main: Any, packages: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main([packages, "-o", str(out), "--resolution", "32", "--test-names", "0"])
    train = rows(out / "train")
    assert rows(out / "test") == {}
    assert {path.name for path in (out / "train").glob("*.png")} == set(train)
    apple = train["noto_1f340.png"]
    assert apple["text"] == ["noto style: red apple"] * 3 + ["red apple"]
    assert (apple["style"], apple["license"], apple["source"]) == (
        "noto",
        "Apache-2.0",
        "@iconify-json/noto 1.2.0",
    )
    assert (apple["group"], apple["subgroup"], apple["skin_tone"]) == ("food-drink", "fruit", None)
    assert train["flat_1f44b-1f3fd.png"]["skin_tone"] == "medium"
    assert not [
        name for name in train if name.endswith(("1f44b-1f3fb-1f3fc.png", "_1f3fb.png", "_1f1e6.png"))
    ]
    art = {row["name"] for row in train.values() if row["style"] == "clip art"}
    assert art == {"chocolate cake", "lion", "bear", "wolf", "fox"} or art == {
        "a copy",
        "lion",
        "bear",
        "wolf",
        "fox",
    }
    reasons = {line["file_name"]: line["why"] for line in map(json.loads, (out / "left_out.jsonl").open())}
    assert reasons["food/pie.svg"].startswith("license") and reasons["food/words.svg"] == "text or pixels"
    assert (
        reasons["shapes/stars/star.svg"] == "kind" and reasons["clip-art_food_nothing.png"] == "almost empty"
    )
    assert sum(why.startswith("near duplicate: clip-art_food_c") for why in reasons.values()) == 1
    assert "Twitter, Inc." in (out / "LICENSES.md").read_text(encoding="utf-8")


def test_pixels(main: Any, packages: str, tmp_path: Path) -> None:
    main([packages, "-o", str(tmp_path / "out"), "--resolution", "32", "--test-names", "0"])

    def opaque(name: str) -> tuple[Any, Any]:
        with Image.open(tmp_path / "out/train" / name) as image:
            assert image.mode == "RGBA" and image.size == (32, 32)
            values = np.asarray(image)
        where = np.argwhere(values[..., 3] > 127)
        return values, [*where.min(0), *(where.max(0) + 1)]

    values, box = opaque("noto_1f340.png")  # 9 x 8 at (0, 2) of 16, doubled
    assert box == [4, 0, 20, 18] and (values[5, 3] == [255, 0, 0, 255]).all()
    assert opaque("noto_1f345.png")[1] == [4, 14, 20, 32]  # mirrored
    assert opaque("3d_1f341.png")[1] == [0, 4, 25, 30]  # halved
    cake = next(
        name
        for name in ("clip-art_food_cake_01.png", "clip-art_food_copy_of_cake.png")
        if (tmp_path / "out/train" / name).exists()
    )
    values, box = opaque(cake)  # 20 x 4, cropped, with a margin of 5 %
    assert box[1] in (1, 2) and box[3] in (30, 31) and box[2] - box[0] in (5, 6, 7)
    assert abs((box[0] + box[2]) / 2 - 16) <= 1


def test_held_out_pairs(main: Any, packages: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        main([packages, "-o", str(tmp_path / name), "--resolution", "16", "--test-names", "6"])
    train, test = rows(tmp_path / "one/train"), rows(tmp_path / "one/test")
    assert [row["name"] for row in test.values() if row["subgroup"] == "fruit"] and len(test) == 6
    assert len({row["name"] for row in test.values()}) == 6
    counts = [
        sum(row["style"] == style for row in test.values()) for style in ("noto", "3d", "flat", "twemoji")
    ]
    assert max(counts) - min(counts) <= 1
    seen = {(row["style"], row["name"]) for row in train.values()}
    for row in test.values():
        assert (row["style"], row["name"]) not in seen
        assert sum(name == row["name"] for _, name in seen) >= 2  # in other styles
        assert sum(style == row["style"] for style, _ in seen) >= 4
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_a_held_out_pair_takes_its_skin_tones_along(main: Any, packages: str, tmp_path: Path) -> None:
    modules = Path(packages) / "node_modules"
    for tone in ["", *(f"-{tone.lower()}" for tone in TONES)]:
        save(
            modules / f"@twemoji/svg/1f44b{tone}.svg",
            SVG.format(body(2, 6 + len(tone) + sum(map(ord, tone)) % 5)),
        )
    main([packages, "-o", str(tmp_path / "out"), "--resolution", "16", "--test-names", "7"])
    for row in rows(tmp_path / "out/test").values():
        if row["subgroup"] == "hand":
            trained = rows(tmp_path / "out/train").values()
            assert not [
                other for other in trained if other["style"] == row["style"] and other["subgroup"] == "hand"
            ]
            break
    else:
        pytest.fail("no hand was held out")


def test_a_mix_of_some_styles(main: Any, packages: str, tmp_path: Path) -> None:
    """Images with a skin tone once an epoch, the others six times, none of other styles and none that is held out."""
    line = [packages, "-o", str(tmp_path / "out"), "--resolution", "16", "--test-names", "2"]
    main([*line, "--mix", "noto", "flat"])
    trained = rows(tmp_path / "out/train")
    wanted = {
        name: 1 if row["skin_tone"] else 6
        for name, row in trained.items()
        if row["style"] in ("noto", "flat")
    }
    assert {*wanted.values()} == {1, 6}
    source = find_source(str(tmp_path / "out" / "mix.yaml"))
    assert source.kind == "text"
    assert {Path(example.name).name: example.repeats for example in source.examples} == wanted


def test_what_cannot_work(main: Any, packages: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="6 names exist in three styles or more"):
        main([packages, "-o", str(tmp_path / "x"), "--resolution", "8", "--test-names", "7"])
    with pytest.raises(UserError, match="emojibase-data does not exist"):
        main([str(tmp_path), "-o", str(tmp_path / "x")])
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match="exists already"):
        main([packages, "-o", str(tmp_path / "x")])
