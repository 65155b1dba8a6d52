"""Several sets as one, several captions of one image, tags in other orders, factors on losses."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from latentflow.data import Source, find_source, split
from latentflow.data.dataset import with_tag_orders
from latentflow.errors import UserError

from .images import folder_of, jsonl, png, save_all, written


def captioned(root: Path, count: int, seed: int = 0, **more: Any) -> Path:
    rows = [
        {"file_name": f"{number}.png", "text": f"{root.name} {number}", **more} for number in range(count)
    ]
    images = {f"{number}.png": png(seed + number) for number in range(count)}
    return folder_of(root, images | {"metadata.jsonl": jsonl(*rows)})


def mix(tmp_path: Path, *sources: dict[str, Any]) -> str:
    return str(written(tmp_path / "mix.yaml", yaml.safe_dump({"sources": list(sources)})))


# --- mixing -------------------------------------------------------------------------------------------


def test_repeats_and_weights_of_a_mix(tmp_path: Path) -> None:
    captioned(tmp_path / "cats", 2, weight=0.5)
    captioned(tmp_path / "more/dogs", 3, seed=10)
    data = mix(
        tmp_path,
        {"data": "cats", "repeats": 4, "weight": 3},
        {"data": str(tmp_path / "more/dogs"), "weight": 3},
    )
    source = find_source(data)
    assert [example.repeats for example in source.examples] == [1, 1, 1, 4, 4]  # absolute paths come first
    assert source.weights() == [3, 3, 3, 1.5, 1.5]  # weights multiply
    assert source.uses() == [0, 1, 2, *[3] * 4, *[4] * 4] and source.once().uses() == [0, 1, 2, 3, 4]
    assert {example.name for example in source.examples} >= {"cats/0.png"}
    assert any("cats: 2 images, each used 4 times an epoch" in note for note in source.notes)
    training, held_out = split(source, 2)
    assert len(training) + len(held_out) == 5  # repeats never part an image
    plain = find_source(mix(tmp_path, {"data": "cats"}, {"data": "more/dogs"}))
    assert source.fingerprint() != plain.fingerprint()


def test_regularisation_is_balanced_with_what_is_learnt(tmp_path: Path) -> None:
    captioned(tmp_path / "mine", 2)
    captioned(tmp_path / "prior", 3, seed=5)
    entries = [{"data": "mine", "repeats": 6}, {"data": "prior", "regularisation": True, "weight": 0.3}]
    source = find_source(mix(tmp_path, *entries))
    uses = source.uses()
    assert [sum(source.examples[i].name.startswith(part) for i in uses) for part in ("mine", "prior")] == [
        12,
        12,
    ]
    assert source.weights() == [1, 1, 0.3, 0.3, 0.3]
    own = find_source(mix(tmp_path, entries[0], {**entries[1], "repeats": 1}))
    assert len(own.uses()) == 15


def test_balanced_classes_are_used_equally_often(tmp_path: Path) -> None:
    names = [*(f"hat/{number}.png" for number in range(5)), "bag/0.png", "bag/1.png", "shoe/0.png"]
    save_all(tmp_path, [*names, "0.png", "1.png"])
    plain = find_source(str(tmp_path), condition="class", missing_caption="empty")
    source = plain.with_balanced_classes()
    counts, used = Counter(source.uses()), defaultdict(list)
    for index, example in enumerate(source.examples):
        used[example.label].append(counts[index])
    assert used == {"bag": [2, 3], "hat": [1] * 5, "shoe": [5], None: [1, 1]}
    assert source.once().uses() == plain.uses() == [*range(10)]

    def part(*labels: str | None) -> Source:
        return source.subset([row for row, example in enumerate(source.examples) if example.label in labels])

    assert len(part("bag", "shoe", None).uses()) == 2 + 2 + 2
    for labels, said in (((None,), "no classes"), ((None, "bag"), "1 class")):
        with pytest.raises(UserError, match=f"--balance-classes: .* have {said}"):
            part(*labels).with_balanced_classes()


def test_classes_of_a_mix_are_one_list(tmp_path: Path) -> None:
    save_all(tmp_path, ["one/hat/1.png", "one/shoe/2.png", "two/bag/3.png", "two/hat/4.png"])
    source = find_source(mix(tmp_path, {"data": "one"}, {"data": "two"}))
    assert source.classes == ("bag", "hat", "shoe") and source.class_ids() == [1, 2, 0, 1]


def test_an_image_in_two_sets_under_one_name(tmp_path: Path) -> None:
    captioned(tmp_path / "all/cats", 1)
    (tmp_path / "all/cats/metadata.jsonl").unlink()
    data = mix(tmp_path, {"data": "all"}, {"data": "all/cats"})
    with pytest.raises(UserError, match=r"two images are named all/cats/0.png"):
        find_source(data, condition="none")


def test_the_cache_may_lie_in_no_set_of_a_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioned(tmp_path / "cats", 1)
    captioned(tmp_path / "dogs", 1, seed=1)
    monkeypatch.setenv("LATENTFLOW_CACHE", str(tmp_path / "dogs/cache"))
    with pytest.raises(UserError, match=r"lies inside the data .*dogs"):
        find_source(mix(tmp_path, {"data": "cats"}, {"data": "dogs"}))


# --- captions -----------------------------------------------------------------------------------------


def several(tmp_path: Path, *texts: object) -> Source:
    rows = [{"file_name": f"{number}.png", "text": text} for number, text in enumerate(texts)]
    images = dict.fromkeys(f"{number}.png" for number in range(len(texts)))
    return find_source(str(folder_of(tmp_path, images | {"metadata.jsonl": jsonl(*rows)})))


def test_several_captions_in_metadata(tmp_path: Path) -> None:
    source = several(tmp_path, ["a hat", " ", "a red hat"], "a shoe")
    assert source.captions() == ["a hat", "a shoe"]
    assert source.all_captions() == [("a hat", "a red hat"), ("a shoe",)]
    assert any("1 image with several captions" in note for note in source.notes)
    assert find_source(str(tmp_path), condition="none").all_captions() == [("",), ("",)]


def test_several_captions_in_numbered_columns(tmp_path: Path) -> None:
    save_all(tmp_path, ["1.png", "2.png"])
    (tmp_path / "metadata.csv").write_text("file_name,text_10,text_2,text_1\n1.png,d,b,a\n2.png,,c,\n")
    assert find_source(str(tmp_path)).all_captions() == [("a", "b", "d"), ("c",)]


def test_a_sidecar_must_be_one_of_the_captions(tmp_path: Path) -> None:
    (tmp_path / "0.txt").write_text("a red  hat\n")
    assert several(tmp_path, ["a hat", "a red hat"]).all_captions() == [("a hat", "a red hat")]
    with pytest.raises(UserError, match="differ on 1 image:"):
        several(tmp_path, ["a hat", "a blue hat"])


def test_more_captions_are_other_data(tmp_path: Path) -> None:
    captions = ("a hat", ["a hat", "b"], ["a hat", "c"])
    assert len({several(tmp_path, texts).fingerprint() for texts in captions}) == 3


# --- tags ---------------------------------------------------------------------------------------------


def test_tags_in_other_orders(tmp_path: Path) -> None:
    source = several(tmp_path, "cat, black,sitting , outdoors", "one")
    found = find_source(str(tmp_path), shuffle_tags=6, keep_tags=1)
    first, second = found.all_captions()
    assert first[0] == "cat, black,sitting , outdoors" and found.captions() == source.captions()
    assert second == ("one",)
    orders = [tuple(tag.strip() for tag in text.split(",")) for text in first]
    assert len(set(orders)) == len(orders) and 2 < len(orders) <= 6
    assert all(order[0] == "cat" and sorted(order) == sorted(orders[0]) for order in orders)
    assert with_tag_orders(source, 6, 1).examples == found.examples  # depends on the caption only
    assert {text.split(",")[0] for text in with_tag_orders(source, 12, 0).all_captions()[0]} > {"cat"}
    assert any("tags of 1 images in up to 6 orders" in note for note in found.notes)


@pytest.mark.parametrize(
    ("orders", "keep", "message"),
    [
        (1, 0, "at least 2"),
        (-1, 0, "at least 2"),
        (4, -1, "at least 0"),
        (0, 1, "Add --shuffle-tags"),
        (4, 3, "no caption of"),
    ],
)
def test_tags_that_cannot_be_shuffled(tmp_path: Path, orders: int, keep: int, message: str) -> None:
    source = several(tmp_path, "a, b, c")
    with pytest.raises(UserError, match=message):
        with_tag_orders(source, orders, keep)
