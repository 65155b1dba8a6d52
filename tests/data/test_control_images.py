"""`latentflow control`: edges, depth and label maps of a folder of images, as training reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from latentflow.data import find_source
from latentflow.data.control import with_control_checked
from latentflow.data.labels import NO_LABEL, palette_of, read_label_file, read_label_ids
from latentflow.errors import UserError
from latentflow.inference.control_images import EDGES, edge_map, edge_thresholds, voc_colours

LABELS = {0: "sky", 1: "old  road", 2: "tree"}


@pytest.fixture
def program(load_program: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LATENTFLOW_CACHE", str(tmp_path / "cache"))
    return load_program("control").main


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("a.jpg", "b.png", "more/c.png")):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "a.txt").write_text("a caption")
    return folder


@pytest.fixture
def depth_model(tmp_path: Path) -> str:
    torch.manual_seed(0)
    config = transformers.GLPNConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8
    )
    transformers.GLPNForDepthEstimation(config).save_pretrained(tmp_path / "depth")
    transformers.GLPNImageProcessor().save_pretrained(tmp_path / "depth")
    return str(tmp_path / "depth")


def segmentation_model(folder: Path, names: dict[int, str]) -> str:
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8
    )
    config.id2label, config.label2id = names, {name: number for number, name in names.items()}
    model = transformers.SegformerForSemanticSegmentation(config)
    torch.nn.init.normal_(model.decode_head.classifier.weight)  # else nearly every pixel has one label
    model.save_pretrained(folder)
    transformers.SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def test_edges_of_a_square_are_its_outline_a_pixel_wide() -> None:
    image = Image.new("RGB", (32, 24), "black")
    image.paste("white", (8, 6, 20, 18))
    edges = np.asarray(edge_map(image))
    assert {*np.unique(edges).tolist()} == {0, 255}
    inside = np.zeros(edges.shape, bool)
    inside[5:19, 7:21] = True
    inside[8:16, 10:18] = False  # the outline, a pixel to each side
    assert not (edges > 0)[~inside].any()
    assert all((edges[row] > 0).sum() == 2 for row in range(9, 15))  # one on the left, one on the right
    assert not np.asarray(edge_map(image, 2000, 4000)).any()


def test_edges_are_written_beside_the_images_as_training_reads_them(
    program: Any, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program([str(photos), "-o", str(photos)])
    assert "Wrote 3 control images" in capsys.readouterr().out
    source = with_control_checked(find_source(str(photos), missing_caption="empty", control="image"))
    assert [example.name for example in source.examples] == ["a.jpg", "b.png", "more/c.png"]
    for example in source.examples:
        control = example.open_control("image")
        assert control is not None and edge_thresholds(control) == EDGES
        assert np.array_equal(control, edge_map(example.open().convert("RGB")))
    (photos / "a-control.png").write_bytes(b"mine")
    (photos / "b-control.png").unlink()
    program([str(photos), "--thresholds", "10", "20.5", "-o", str(photos)])
    assert "Wrote 1 control image to" in (out := capsys.readouterr().out) and "2 exist and were kept" in out
    assert (photos / "a-control.png").read_bytes() == b"mine"
    with Image.open(photos / "b-control.png") as mended:
        assert edge_thresholds(mended) == (10.0, 20.5)
    assert edge_thresholds(Image.new("L", (4, 4))) is None


def test_a_folder_of_their_own_within_that_of_the_images(
    program: Any, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # the second time they are no images of the set
        program([str(photos), "-o", str(photos / "edges")])
    out = capsys.readouterr().out
    assert "Wrote 0 control images" in out and "3 exist" in out
    assert sorted(file.name for file in (photos / "edges").rglob("*.png")) == [
        f"{name}-control.png" for name in "abc"
    ]
    words = out.splitlines()[-1].partition("latentflow train ")[2].split()
    assert words == [str(photos), "--control", "image", "--control-folder", str(photos / "edges")]
    source = find_source(str(photos), condition="none", control="image", control_folder=words[-1])
    assert len(with_control_checked(source)) == 3


def test_depth_is_what_the_model_says(program: Any, photos: Path, depth_model: str, tmp_path: Path) -> None:
    program(
        [
            str(photos),
            "--kind",
            "depth",
            "--model",
            depth_model,
            "--device",
            "cpu",
            "-o",
            str(tmp_path / "out"),
        ]
    )
    model = transformers.GLPNForDepthEstimation.from_pretrained(depth_model)
    with Image.open(photos / "b.png") as image, torch.no_grad():
        pixels = transformers.GLPNImageProcessor()(image, return_tensors="pt")["pixel_values"]
        said = model(pixels).predicted_depth[0]
    said = torch.nn.functional.interpolate(said[None, None], (40, 48), mode="bicubic", align_corners=False)[
        0, 0
    ]
    expected = 255 * (said - said.min()) / (said.max() - said.min())
    with Image.open(tmp_path / "out" / "b-control.png") as control:
        assert control.size == (48, 40)
        assert np.abs(np.asarray(control).astype(float) - expected.numpy()).max() <= 1.0
        assert edge_thresholds(control) is None


def test_label_maps_are_what_the_model_says_with_its_names(
    program: Any, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = segmentation_model(tmp_path / "model", LABELS)
    out = tmp_path / "out"
    program([str(photos), "--kind", "segmentation", "--model", model, "--device", "cpu", "-o", str(out)])
    labels = read_label_file(out / "control-labels.txt")
    assert labels == (("sky", "#000000"), ("old road", "#800000"), ("tree", "#008000"))
    words = capsys.readouterr().out.splitlines()[-1].split()
    assert words[-6:-2] == ["--control", "labels", "--control-folder", str(out)]
    source = with_control_checked(
        find_source(str(photos), condition="none", control="labels", control_folder=str(out)),
        read_label_file(words[-1]),
    )
    network = transformers.SegformerForSemanticSegmentation.from_pretrained(model)
    processor = transformers.SegformerImageProcessor.from_pretrained(model)
    seen = set()
    for example in source.examples:
        control = example.open_control("labels")
        assert control is not None and palette_of(control)[:3] == tuple(colour for _, colour in labels)
        ids = read_label_ids(control, labels)
        with torch.no_grad():
            said = network(**processor(example.open().convert("RGB"), return_tensors="pt"))
        (expected,) = processor.post_process_semantic_segmentation(said, [(40, 48)])
        assert np.array_equal(ids, expected.numpy())
        seen |= {*np.unique(ids).tolist()}
    assert len(seen) > 1 and NO_LABEL not in seen


def test_the_colours_of_labels_differ() -> None:
    colours = voc_colours(256)
    assert len({*colours}) == 256
    assert colours[:4] == ["#000000", "#800000", "#008000", "#808000"]  # as Pascal VOC has them
    assert colours[255] == "#e0e0c0"


def test_bad_input_is_refused_before_anything_is_written(
    program: Any, photos: Path, depth_model: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def refused(*words: str, data: Path = photos) -> str:
        with pytest.raises(UserError) as error:
            program([str(data), *words, "--device", "cpu", "-o", str(out)])
        assert not out.exists()
        return f"{error.value.what} {error.value.fix}"

    assert "no folder" in refused(data=photos / "b.png")
    assert "needs a model" in refused("--kind", "depth")
    assert "edges need none" in refused("--model", depth_model)
    assert "--thresholds 200 100" in refused("--thresholds", "200", "100")
    assert "nan" in refused("--thresholds", "nan", "100")
    assert "no such folder" in refused("--kind", "depth", "--model", str(tmp_path / "none"))
    assert "cannot be read" in refused("--kind", "segmentation", "--model", depth_model)
    twice = segmentation_model(tmp_path / "twice", {0: "sky", 1: "tree", 2: "tree"})
    assert "3 labels (2 names)" in refused("--kind", "segmentation", "--model", twice)
    Image.new("RGB", (8, 8)).save(photos / "b.webp")
    assert "but for the ending" in refused()
