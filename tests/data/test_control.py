"""Control images: found beside images, in columns and folders; checked; label maps in all their forms."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.data import Source, find_source
from latentflow.data.checking.report import check_data
from latentflow.data.control import cached_layouts, control_images, inspect_controls, with_control_checked
from latentflow.data.crops import one_size, with_crops
from latentflow.data.dataset import read_image
from latentflow.data.labels import palette_of, read_label_file, read_label_ids, to_label_image
from latentflow.data.sources import shape_layouts, shapes
from latentflow.errors import UserError

LABELS = (("ground", "#ffffff"), ("cat", "#ff0000"), ("dog", "#00ff00"))
SIZE = (12, 8)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTFLOW_CACHE", str(tmp_path / "cache"))


def ids(number: int) -> Any:
    return np.random.default_rng(number).integers(0, 3, SIZE[::-1], dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    for number in range(4):
        colours = np.random.default_rng(10 + number).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
        Image.fromarray(colours).save(root / f"{number}.png")
        (root / f"{number}.txt").write_text(f"image {number}")
        to_label_image(ids(number), LABELS).save(root / f"{number}-control.png")
    return root


def list_in_metadata(folder: Path, rows: list[dict[str, str]]) -> None:
    """Describe the four images by a metadata.csv in the place of their text files."""
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for number in range(4):
        (folder / f"{number}.txt").unlink()


def found(folder: Path, **request: Any) -> Source:
    return find_source(str(folder), **{"control": "labels", **request})


def test_files_beside_images_are_read_where_they_are_asked_for(folder: Path) -> None:
    source = with_control_checked(found(folder))
    assert [example.name for example in source.examples] == [f"{number}.png" for number in range(4)]
    assert [name for name, _ in source.labels] == ["0", "1", "2"]
    assert [colour for _, colour in source.labels] == [colour for _, colour in LABELS]
    layouts = cached_layouts(source, (8, 12))
    for number in range(4):
        assert np.array_equal(layouts[number][0], ids(number))
    plain = find_source(str(folder), missing_caption="empty")
    assert len(plain) == 8  # as before: they are images of the set
    assert any("named like control images" in note for note in plain.notes)
    assert source.fingerprint() != dataclass_without(source).fingerprint()


def dataclass_without(source: Source) -> Source:
    import dataclasses

    return dataclasses.replace(
        source, examples=tuple(dataclasses.replace(example, controls=()) for example in source.examples)
    )


def test_a_folder_and_a_column_of_their_own(folder: Path, tmp_path: Path) -> None:
    apart = tmp_path / "layouts"
    apart.mkdir()
    for number in range(4):
        (folder / f"{number}-control.png").rename(apart / f"{number}.png")
    expected = [ids(number) for number in range(4)]

    def read(source: Source) -> list[Any]:
        return [read_label_ids(example.open_control("labels")) for example in source.examples]  # type: ignore[arg-type]

    assert np.array_equal(read(found(folder, control_folder=str(apart))), expected)
    inside = folder / "maps"
    apart.rename(inside)
    within = found(folder, control_folder=str(inside))
    assert len(within) == 4
    assert np.array_equal(read(within), expected)
    rows = [{"file_name": f"{n}.png", "text": "one", "layout": f"maps/{n}.png"} for n in range(4)]
    list_in_metadata(folder, rows)
    by_column = found(folder, columns={"control": "layout"})
    assert len(by_column) == 4
    assert np.array_equal(read(by_column), expected)
    table = found(folder / "metadata.csv", columns={"control": "layout"})
    assert np.array_equal(read(table), expected)
    unread = find_source(str(folder / "metadata.csv"))  # a column of that name may mean anything
    assert all(not example.controls for example in unread.examples)
    with pytest.raises(UserError, match="no folder"):
        found(folder, control_folder=str(apart))
    with pytest.raises(UserError, match="no --control"):
        find_source(str(folder), control_folder=str(inside))


def test_missing_and_mis_sized_control_images_are_counted_and_named(folder: Path) -> None:
    for number in (1, 2):
        (folder / f"{number}-control.png").unlink()
    to_label_image(ids(3)[:4], LABELS).save(folder / "3-control.png")
    with pytest.raises(UserError) as refused:
        with_control_checked(found(folder))
    assert "2 images of 4 without a control image: 1.png, 2.png" in refused.value.what
    assert (
        "1 control image of another size than the image: 3.png (12x8, its control image 12x4)"
        in refused.value.what
    )
    report, _ = check_data(str(folder), control="labels")
    assert any("without a control image" in problem for problem in report.problems)


def test_labels_beyond_the_table_and_palettes_that_differ(folder: Path) -> None:
    report = inspect_controls(found(folder), LABELS[:2])
    assert len(report.problems) == 1
    assert "has the label 2, and there are 2 labels, 0 to 1" in report.problems[0]
    other = (LABELS[0], ("cat", "#0000ff"), LABELS[2])
    to_label_image(ids(2), other).save(folder / "2-control.png")
    assert inspect_controls(found(folder)).problems == ("1 label map with another palette than 0.png: 2.png",)
    assert "another palette than the labels: 2.png" in inspect_controls(found(folder), LABELS).problems[0]
    (folder / "1-control.png").write_bytes(b"no image")
    assert any("cannot be used" in line for line in inspect_controls(found(folder)).problems)


def test_label_maps_are_read_in_every_form(tmp_path: Path) -> None:
    expected = ids(0)
    expected[0, 0] = 255  # no label
    palette = to_label_image(expected, LABELS)
    assert palette_of(palette)[:3] == tuple(colour for _, colour in LABELS)
    table = np.array([[255, 255, 255], [255, 0, 0], [0, 255, 0]], dtype=np.uint8)
    rgba = np.concatenate([table[expected % 3], np.full((*expected.shape, 1), 255, np.uint8)], axis=2)
    rgba[0, 0, 3] = 0
    forms = [
        palette,
        Image.fromarray(expected),
        Image.fromarray(expected.astype(np.int32)),
        Image.fromarray(rgba),
    ]
    forms.append(Image.fromarray(expected.astype(np.uint16)))
    for form in forms:
        assert np.array_equal(read_label_ids(form, LABELS), expected), form.mode
    with pytest.raises(UserError, match="colours that are no label's: #7f0000"):
        read_label_ids(Image.new("RGB", (2, 2), "#7f0000"), LABELS)
    with pytest.raises(UserError, match="the labels have no colours"):
        read_label_ids(Image.new("RGB", (2, 2)))
    with pytest.raises(UserError, match="has the label 300"):
        read_label_ids(Image.fromarray(np.full((2, 2), 300, np.int32)))
    Image.fromarray(expected).save(tmp_path / "lossy.jpg")
    with pytest.raises(UserError, match="is a JPEG"):
        read_label_ids(Image.open(tmp_path / "lossy.jpg"))
    file = tmp_path / "labels.txt"
    file.write_text("ground #FFFFFF\nbig cat\ndog #00ff00\n")
    assert read_label_file(file) == (("ground", "#ffffff"), ("big cat", ""), ("dog", "#00ff00"))
    for text, why in (("", "0 labels"), ("cat\n\n", "no name"), ("cat\ncat", "twice")):
        file.write_text(text)
        with pytest.raises(UserError, match=why):
            read_label_file(file)


def test_two_kinds_have_names_of_their_own(folder: Path, tmp_path: Path, load_program: Any) -> None:
    """Beside the images, in folders of their own, and in columns of metadata and tables; each alone is read as well."""

    def read(source: Source) -> list[Any]:
        source = with_control_checked(source)
        assert source.control == ("image", "labels") and len(source) == 4
        layouts = cached_layouts(source, (8, 12))
        assert all(np.array_equal(layouts[number][0], ids(number)) for number in range(4))
        return [np.asarray(example.open()) for example in control_images(source).examples]

    both, sketches, maps = ("labels", "image"), tmp_path / "apart" / "image", tmp_path / "apart" / "labels"
    for root in (sketches, maps):
        root.mkdir(parents=True)
    for number in range(4):
        (folder / f"{number}-control.png").rename(folder / f"{number}-control-labels.png")
        Image.new("RGB", SIZE, (number, 0, 0)).save(folder / f"{number}-control-image.png")
    beside = found(folder, control=both)
    assert [image[0, 0, 0] for image in read(beside)] == [0, 1, 2, 3]
    assert "control images of 4 images (image) and 4 images (labels)" in beside.notes
    alone = found(folder, control="image")
    assert len(alone) == 4 and {example.control_kinds for example in alone.examples} == {("image",)}
    assert len({alone.fingerprint(), beside.fingerprint(), found(folder).fingerprint()}) == 3
    shown, sheet = check_data(str(folder), control=both), tmp_path / "sheet.png"
    load_program("check").main([str(folder), "--control", "image", "labels", "--sheet", str(sheet)])
    assert shown[0].controls == 4 and not shown[0].problems and shown[0].labels == ("0", "1", "2")
    colours = {colour for _, colour in Image.open(sheet).convert("RGB").getcolors(10**6)}  # type: ignore[union-attr]
    assert {(255, 0, 0), (0, 255, 0), (3, 0, 0)} <= colours  # of the label maps, and of a control image
    for number in range(4):
        for kind, root in zip(("image", "labels"), (sketches, maps), strict=True):
            (folder / f"{number}-control-{kind}.png").rename(root / f"{number}.png")
    in_folders = found(folder, control=both, control_folder=str(sketches.parent))
    assert [image[0, 0, 0] for image in read(in_folders)] == [0, 1, 2, 3]
    sketches.parent.rename(folder / "apart")
    rows = [
        {"file_name": f"{n}.png", "text": "one"}
        | {f"control_{kind}": f"apart/{kind}/{n}.png" for kind in ("image", "labels")}
        for n in range(4)
    ]
    list_in_metadata(folder, rows)
    for data in (folder, folder / "metadata.csv"):
        assert [image[0, 0, 0] for image in read(found(data, control=both))] == [0, 1, 2, 3]
        assert [kinds for kinds, _ in found(data, control="image").examples[1].controls] == ["image"]
    assert not find_source(str(folder / "metadata.csv")).examples[0].controls


def test_two_kinds_that_are_incomplete(folder: Path, tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", SIZE).save(folder / f"{number}-control-image.png")
    with pytest.raises(UserError) as refused:
        with_control_checked(found(folder, control=("image", "labels")))
    assert (
        "1 image of 4 without a control image of kind image (3-control-image.png, ...): 3.png"
        in refused.value.what
    )
    assert "4 images of 4 without a control image of kind labels (0-control-labels.png" in refused.value.what
    assert "check DATA --control image labels" in refused.value.fix
    with pytest.raises(UserError, match="two control images that differ"):  # which of the two is meant?
        found(folder, control="image")
    with pytest.raises(UserError, match=f"no folder {tmp_path / 'image'}"):
        found(folder, control=("image", "labels"), control_folder=str(tmp_path))
    with pytest.raises(UserError, match="--control none image"):
        found(folder, control=("none", "image"))
    with pytest.raises(UserError, match="control 'edges'"):
        found(folder, control=("edges", "image"))


def test_crops_cut_the_control_image_as_the_image(tmp_path: Path) -> None:
    """A control image that equals its image stays equal to it in every crop."""
    root = tmp_path / "data"
    root.mkdir()
    values = np.random.default_rng(0).integers(0, 256, (8, 24, 3), dtype=np.uint8)
    for name in ("0", "0-control"):
        Image.fromarray(values).save(root / f"{name}.png")
    source = with_crops(with_control_checked(found(root, control="image")), 4)
    controls = control_images(source)
    crops = [np.asarray(read_image(example, 8)) for example in source.examples]
    for crop, control in zip(crops, controls.examples, strict=True):
        assert np.array_equal(np.asarray(read_image(control, 8)), crop)
    assert not np.array_equal(crops[0], crops[1])
    assert len({example.content_key() for example in controls.examples}) == 4
    assert one_size(controls, (8, 8)).source is controls


def test_kinds_of_data_without_control_images_say_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shapes' has label maps"):
        find_source("shapes", control="image")
    with pytest.raises(UserError, match="not read from tar files"):
        find_source(str(tmp_path / "a.tar"), control="labels")


def test_label_maps_of_shapes_are_exact() -> None:
    """The checker reads from a clean image the map that it was drawn from, and nothing like it from another one."""
    source = find_source("shapes", control="labels")
    some = source.subset(list(range(0, len(source), 199)))
    checked = with_control_checked(some, shape_layouts.LABELS)
    assert checked.labels == shape_layouts.LABELS
    layouts = [row[0].numpy() for row in cached_layouts(checked, 64)]
    read = [shape_layouts.read_label_map(example.open()) for example in some.examples]
    for example, drawn in zip(some.examples, layouts, strict=True):
        assert isinstance(example, shapes.ShapeExample)
        assert np.array_equal(drawn, shape_layouts.label_map(example.spec, 64, example.seed))
    assert shape_layouts.mean_iou(layouts, layouts) == 1.0
    assert shape_layouts.mean_iou(layouts, read) > 0.95
    assert shape_layouts.mean_iou(layouts, [*read[1:], read[0]]) < 0.1
    assert not shape_layouts.read_label_map(torch.zeros(3, 32, 32)).any()  # grey: no object on white


def test_check_lists_them_and_shows_pairs(
    folder: Path, tmp_path: Path, load_program: Any, capsys: Any
) -> None:
    sheet, main = tmp_path / "sheet.png", load_program("check").main
    main([str(folder), "--control", "labels", "--sheet", str(sheet)])
    said = capsys.readouterr().out
    assert "images with a control image: 4 of 4" in said
    assert "3 labels of the control images: 0, 1, 2" in said
    assert "--control labels" in said  # the training that it suggests
    colours = {colour for _, colour in Image.open(sheet).convert("RGB").getcolors(10**6)}  # type: ignore[union-attr]
    assert {(255, 0, 0), (0, 255, 0)} <= colours  # of the label maps
    (folder / "2-control.png").unlink()
    with pytest.raises(SystemExit):
        main([str(folder), "--control", "labels"])
    assert "PROBLEM: 1 image of 4 without a control image: 2.png" in capsys.readouterr().out
    with pytest.raises(UserError, match="--control-labels without --control labels"):
        main([str(folder), "--control-labels", "labels.txt"])
