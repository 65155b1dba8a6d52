"""`latentflow precompute`, and training from what it leaves, without the images."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pytest
import torch
from PIL import Image

from latentflow.autoencoder import build_autoencoder, load_autoencoder
from latentflow.cli import run
from latentflow.config import AutoencoderConfig
from latentflow.data import LatentFolder, Source, cached_latents, check_source, find_source, readable, split
from latentflow.data.cache import tensors as cache
from latentflow.data.sources.latent_files import INDEX
from latentflow.errors import UserError, one_line

from ..data.images import load_program, noise
from ..data.profiles import rgb_profile
from ..data.test_near import save_copies
from .command import ROOT, TINY, call

AUTOENCODER = AutoencoderConfig(
    autoencoder_widths=(8, 16), encoder_layers=(0, 1), decoder_layers=(0, 1), latent_channels=4
)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    made = build_autoencoder(AUTOENCODER, 16)
    made.register_to_config(latents_mean=[0.1] * 4, latents_std=[2.0] * 4, scaling_factor=1.0)
    folder = tmp_path_factory.mktemp("vae")
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def data(images: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(images, tmp_path / "data"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """How many images were encoded at once, each time."""
    monkeypatch.setenv("LATENTFLOW_CACHE", str(tmp_path / "cache"))
    counts: list[int] = []
    posteriors = cache._posteriors

    def counting(vae: object, pixels: torch.Tensor, *rest: object) -> object:
        counts.append(len(pixels))
        return posteriors(vae, pixels, *rest)

    monkeypatch.setattr(cache, "_posteriors", counting)
    return counts


def precompute(capsys: pytest.CaptureFixture[str], *arguments: object, expect: int = 0) -> str:
    program = load_program(ROOT / "train" / "precompute.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["latentflow precompute", *map(str, arguments)])
        try:
            run(program.main)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    said = capsys.readouterr()
    assert code == expect, said.out + said.err
    return said.out + said.err


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("loss", "val_loss") if name in row]


def test_training_without_the_images_is_training_with_them(
    data: Path, vae: Path, encoded: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents, stored = tmp_path / "latents", tmp_path / "cache"
    line = [data, "--vae", vae, "-o", latents, "--resolution", 16, "--random-flip"]
    said = precompute(capsys, *line, "--dry-run")
    assert "on disk" in said and "time:" in said and not latents.exists()
    encoded.clear()
    assert "latentflow train" in precompute(capsys, *line)
    assert sum(encoded) == 12
    precompute(capsys, *line)
    assert sum(encoded) == 12  # all was there
    Image.new("RGB", (16, 16), "pink").save(data / "03.png")
    precompute(capsys, *line)
    assert encoded[-1] == 1 and sum(encoded) == 13

    quick = [*TINY, "--max-train-steps", 2, "--preview-steps", 0, "--random-flip"]
    call(stored, data, "-o", tmp_path / "with", *quick, "--vae", vae)
    data.rename(tmp_path / "away")
    call(stored, latents, "-o", tmp_path / "without", *quick)
    assert len(losses(tmp_path / "with")) >= 3
    assert losses(tmp_path / "without") == pytest.approx(losses(tmp_path / "with"), rel=1e-3)
    assert (tmp_path / "without" / "pipeline" / "vae").is_dir()

    said = call(stored, latents, "-o", tmp_path / "holes", *quick, "--inpainting", expect=2)
    assert "holds no pixels" in said and "--pixels" in said
    for flags, told in [
        (["--condition", "class"], "--condition class"),
        (["--resolution", "32"], "latents of 16 pixels, not of 32"),
        (["--vae", str(other_autoencoder(tmp_path))], "autoencoder"),
    ]:
        assert told in call(stored, latents, "-o", tmp_path / "bad", *quick, *flags, expect=2)


def other_autoencoder(tmp_path: Path) -> Path:
    build_autoencoder(AUTOENCODER, 16).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_pixels_and_masks_are_stored_on_request(
    data: Path, vae: Path, encoded: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents, stored = tmp_path / "latents", tmp_path / "cache"
    Image.new("L", (16, 16), 255).save(data / "04-mask.png")
    line = [data, "--vae", vae, "-o", latents, "--resolution", 16]
    assert "needs pixels" in precompute(capsys, *line, expect=2)
    precompute(capsys, *line, "--pixels")
    shutil.rmtree(data)
    call(stored, latents, "-o", tmp_path / "run", *TINY, "--max-train-steps", 1, "--preview-steps", 1)
    source = find_source(str(latents))
    assert source.has_masks and [e.name for e in source.examples if e.mask is not None] == ["04.png"]
    assert source.examples[4].open().size == (16, 16)
    assert not find_source(str(latents), masks="none").has_masks
    assert not check_source(str(latents)).problems
    for kind in ("latents", "pixels", "masks"):
        (shard,) = (latents / kind).glob("*.safetensors")
        content = bytearray(shard.read_bytes())
        content[8 + int.from_bytes(content[:8], "little") + 200] ^= 1
        shard.rename(shard.with_suffix(".away"))
        shard.write_bytes(content)
        (problem,) = check_source(str(latents)).problems
        assert f" {kind} are missing or damaged" in problem and "precompute" in problem
        shard.with_suffix(".away").replace(shard)
    assert not cache.cached_masks(source.subset([0, 1]), 16).has_mask.any()


def test_what_was_begun_is_finished_and_nothing_else_is_touched(
    data: Path, vae: Path, encoded: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    latents = tmp_path / "latents"
    monkeypatch.setattr("latentflow.data.cache.store._ROWS", 4)
    line = [data, "--vae", vae, "-o", latents, "--resolution", 16]
    precompute(capsys, *line)
    (latents / INDEX).unlink()
    description = json.loads((latents / "latents.json").read_text())
    (latents / "latents.json").write_text(json.dumps(description | {"complete": False}))
    sorted((latents / "latents").glob("*.safetensors"))[1].unlink()
    assert "not complete" in call(tmp_path / "cache", latents, "-o", tmp_path / "run", *TINY, expect=2)
    encoded.clear()
    precompute(capsys, *line)
    assert sum(encoded) == 4

    source = readable(find_source(str(latents)))
    images = find_source(str(data))
    assert isinstance(source, LatentFolder) and source.all_captions() == images.all_captions()
    assert list(source.content_keys()) == images.content_keys()
    assert [example.name for example in source.subset([3, 1]).examples] == ["03.png", "01.png"]
    assert source.subset([3, 1]).subset([1]).captions() == images.captions()[1:2]
    assert source.subset([3, 1]).fingerprint() != source.subset([1, 3]).fingerprint() != source.fingerprint()
    network = load_autoencoder(vae)
    direct = cached_latents(images, network, 16, flips=False, progress=False)
    folder = cached_latents(source, network, 16, flips=False, progress=False)
    torch.testing.assert_close(folder.mean[:], direct.mean[:])

    assert "were made with size" in precompute(capsys, *line[:-1], 32, expect=2)
    assert "not empty" in precompute(capsys, data, "--vae", vae, "-o", vae, "--resolution", 16, expect=2)
    assert "inside the data" in precompute(capsys, data, "--vae", vae, "-o", data / "x", expect=2)


def test_near_duplicates_are_kept_together_without_the_images(
    vae: Path, encoded: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, latents = tmp_path / "twins", tmp_path / "latents"
    data.mkdir()
    for seed in range(12):
        save_copies(data, seed, f"{seed:02}")
    precompute(capsys, data, "--vae", vae, "-o", latents, "--resolution", 16)
    images, stored = find_source(str(data)), find_source(str(latents))
    for seed in range(3):
        assert split(stored, 6, seed) == split(images, 6, seed)
        assert {name[:2] for name in names(stored, 0, seed)}.isdisjoint(
            name[:2] for name in names(stored, 1, seed)
        )


def names(source: Source, side: int, seed: int) -> list[str]:
    return [source.examples[row].name for row in split(source, 6, seed)[side]]


def test_an_index_that_is_not_what_was_written_is_refused(
    data: Path, vae: Path, encoded: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents = tmp_path / "latents"
    line = [data, "--vae", vae, "-o", latents, "--resolution", 16]
    precompute(capsys, *line)
    index = latents / INDEX
    whole = index.read_bytes()
    (latents / "latents.json.17.tmp").touch()  # of a process that was killed
    for broken in (whole.replace(b"03.png", b"04.png", 1), whole[:-9], None):
        index.unlink()
        if broken is not None:
            index.write_bytes(broken)
        with pytest.raises(UserError, match=r"index.arrow cannot be read: .*\n.*precompute"):
            find_source(str(latents))
        precompute(capsys, *line)
        assert index.read_bytes() == whole and sum(encoded) == 12


def test_latents_of_several_aspect_ratios_train_as_their_images_do(
    vae: Path, encoded: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, latents, stored = tmp_path / "data", tmp_path / "latents", tmp_path / "cache"
    data.mkdir()
    for row, size in enumerate([(16, 16), (16, 16), (24, 10), (10, 24), (10, 24), (40, 10)] * 2):
        Image.effect_mandelbrot(size, (-2, -1.5 + row / 9, 1, 1.5), 20).convert("RGB").save(
            data / f"{row}.png"
        )
    Image.new("L", (24, 10), 255).save(data / "2-mask.png")
    line = [data, "--vae", vae, "-o", latents, "--resolution", 16, "--buckets", "--patch-size", 1, "--pixels"]
    said = precompute(capsys, *line)
    assert "none left out" in said and sum(encoded) == 12
    precompute(capsys, *line)
    assert sum(encoded) == 12
    source = find_source(str(latents))
    assert isinstance(source, LatentFolder) and not source.damage() and len(source.sizes) == 4
    images = find_source(str(data))
    for example, whole in zip(source.examples, images.examples, strict=True):
        assert example.name == whole.name and example.open().size in {(w, h) for h, w in source.sizes}

    quick = [*TINY, "--max-train-steps", 3, "--preview-steps", 0, "--size-conditioning", "--inpainting"]
    call(stored, data, "-o", tmp_path / "with", *quick, "--vae", vae, "--buckets")
    data.rename(tmp_path / "away")
    call(stored, latents, "-o", tmp_path / "without", *quick)
    assert losses(tmp_path / "without") == pytest.approx(losses(tmp_path / "with"), rel=1e-3)

    for flags, told in (["--crops", 2], "--crops"), (["--patch-size", 4], "needs multiples of 8"):
        assert told in call(stored, latents, "-o", tmp_path / "bad", *quick, *flags, expect=2)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are text there")
def test_what_check_calls_ready_trains_whatever_its_names(
    vae: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, encoded: list[int]
) -> None:
    """Names that are no text in any encoding, or would steer a terminal: written as escapes wherever they are."""
    data = tmp_path / os.fsdecode(b"da\xe9ta")
    for number in range(12):
        folder = data / os.fsdecode(b"cl\xe9\n\x1b[31m%d" % (number % 2))
        folder.mkdir(parents=True, exist_ok=True)
        noise(number, 24, 20).save(folder / os.fsdecode(b"\xe9\n\x1b[31m%d.png" % number))
    classes = [f"cl\\udce9\n\x1b[31m{number}" for number in range(2)]
    stored, latents, quick = tmp_path / "cache", tmp_path / "latents", [*TINY, "--preview-steps", 0]
    said = call(stored, data, "--report", tmp_path / "report.html", file="check")
    assert "ready to train" in said and one_line(classes[0]) in said
    said += call(stored, data, "-o", tmp_path / "run", *quick, "--vae", vae, "--max-train-steps", 1)
    said += precompute(capsys, data, "--vae", vae, "-o", latents, "--resolution", 16)
    said += call(stored, latents, "-o", tmp_path / "run-2", *quick, "--max-train-steps", 1)
    for run_folder in (tmp_path / "run", tmp_path / "run-2"):
        index = json.loads((run_folder / "pipeline" / "model_index.json").read_text("utf-8"))
        assert list(index["id2label"].values()) == classes
        said += (run_folder / "train.log").read_text("utf-8") + (
            run_folder / "pipeline" / "README.md"
        ).read_text("utf-8")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "run-2"), rel=1e-3)
    names = [example.name for example in find_source(str(latents)).examples]
    assert names[0] == f"{classes[0]}/\\udce9\n\x1b[31m0.png"
    assert "\x1b" not in said and one_line(classes[0]) in said and said.encode()


def test_classes_of_a_checkpoint_may_come_before_those_of_the_folder(
    vae: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, encoded: list[int]
) -> None:
    for number, label in enumerate(["ant", "cow", "cow"]):
        (tmp_path / "data" / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (80 * number, 0, 0)).save(tmp_path / "data" / label / f"{number}.png")
    precompute(capsys, tmp_path / "data", "-o", tmp_path / "latents", "--vae", vae, "--resolution", 16)
    source = find_source(str(tmp_path / "latents"))
    assert list(source.class_ids()) == [0, 1, 1]
    joined = dataclasses.replace(source, classes=("cow", "dog", "ant"))
    assert list(joined.class_ids()) == [2, 0, 0] and list(joined.subset([1]).class_ids()) == [0]


def test_latents_of_converted_images_have_keys_of_their_own(
    data: Path, vae: Path, encoded: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("02.png", "05.png"):
        Image.open(data / name).save(data / name, icc_profile=rgb_profile("ProPhoto RGB"))
    line = [data, "--vae", vae, "-o", tmp_path / "latents", "--resolution", 16, "--pixels"]
    precompute(capsys, *line, "--colours", "stored")
    before = [example.open().tobytes() for example in find_source(str(tmp_path / "latents")).examples]
    encoded.clear()
    said = precompute(capsys, *line)  # only what is read otherwise is made again
    assert sum(encoded) == 2 and "2 images have another colour profile than sRGB and are converted" in said

    source, images = find_source(str(tmp_path / "latents")), find_source(str(data))
    assert list(source.content_keys()) == images.content_keys()  # split as its images are
    assert list(source.pixel_keys()) == images.pixel_keys() != images.content_keys()
    after = [example.open().tobytes() for example in source.examples]
    assert [row for row in range(12) if before[row] != after[row]] == [2, 5]
    assert not check_source(str(tmp_path / "latents")).problems
    network = load_autoencoder(vae)
    direct = cached_latents(images, network, 16, flips=False, progress=False)
    torch.testing.assert_close(
        cached_latents(source, network, 16, flips=False, progress=False).mean[:], direct.mean[:]
    )
    with pytest.raises(UserError, match="--colours stored was decided when it was made"):
        find_source(str(tmp_path / "latents"), colours="stored")


def test_a_folder_of_latents_from_before_profiles_were_converted(
    data: Path, vae: Path, encoded: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents = tmp_path / "latents"
    line = [data, "--vae", vae, "-o", latents, "--resolution", 16, "--pixels"]
    precompute(capsys, *line)
    assert not any("before colour profiles" in note for note in find_source(str(latents)).notes)
    description = json.loads((latents / "latents.json").read_text())
    assert description.pop("colours") == "srgb"
    (latents / "latents.json").write_text(json.dumps(description))
    before = find_source(str(latents))
    assert any("before colour profiles were converted" in note for note in before.notes)
    assert list(before.pixel_keys()) == list(before.content_keys())
    assert before.examples[0].open().size == (16, 16) and not check_source(str(latents)).problems

    encoded.clear()
    precompute(capsys, *line)  # no image has a profile: for a run that learns from it, nothing changes
    after = find_source(str(latents))
    assert not encoded and "pixel_key" not in pyarrow.ipc.open_file(latents / INDEX).read_all().column_names
    assert after.fingerprint() == before.fingerprint()
    assert not any("before colour profiles" in note for note in after.notes)
