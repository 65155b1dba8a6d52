"""`latentflow precompute`, and training from what it leaves, without the images."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pytest
import torch
from PIL import Image

from latentflow.autoencoder import build_autoencoder, load_autoencoder
from latentflow.config import AutoencoderConfig
from latentflow.data import LatentFolder, Source, cached_latents, check_source, find_source, readable, split
from latentflow.data.cache import tensors as cache
from latentflow.data.sources.latent_folder import INDEX
from latentflow.errors import UserError, one_line

from ..data.images import noise
from ..data.profiles import rgb_profile
from ..data.test_splits import save_copies
from .command import TINY, call

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


@dataclass
class Workplace:
    """A folder of images, the folder of latents that is made of it, and the number of images of each encoding."""

    root: Path
    vae: Path
    encoded: list[int]

    def __post_init__(self) -> None:
        self.data, self.latents = self.root / "data", self.root / "latents"

    def precompute(self, *flags: object, expect: int = 0) -> str:
        line = [self.data, "--vae", self.vae, "-o", self.latents, "--resolution", 16, *flags]
        return call(self.root / "cache", *line, file="precompute", expect=expect)

    def train(self, data: Path, output: str, *flags: object, expect: int = 0) -> str:
        line = [data, "-o", self.root / output, *TINY, "--preview-steps", 0, *flags]
        return call(self.root / "cache", *line, expect=expect)


@pytest.fixture
def place(vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """No images yet."""
    monkeypatch.setenv("LATENTFLOW_CACHE", str(tmp_path / "cache"))
    counts: list[int] = []
    posteriors = cache._posteriors

    def counting(vae: object, pixels: torch.Tensor, *rest: object) -> object:
        counts.append(len(pixels))
        return posteriors(vae, pixels, *rest)

    monkeypatch.setattr(cache, "_posteriors", counting)
    return Workplace(tmp_path, vae, counts)


@pytest.fixture
def filled(place: Workplace, images: Path) -> Workplace:
    """A dozen captioned images."""
    shutil.copytree(images, place.data)
    return place


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("loss", "val_loss") if name in row]


def test_training_without_the_images_is_training_with_them(filled: Workplace) -> None:
    place, flips = filled, "--random-flip"
    output = place.precompute(flips, "--dry-run")
    assert "on disk" in output and "time:" in output and not place.latents.exists()
    place.encoded.clear()
    assert "latentflow train" in place.precompute(flips)
    assert sum(place.encoded) == 12
    place.precompute(flips)
    assert sum(place.encoded) == 12  # all was there
    Image.new("RGB", (16, 16), "pink").save(place.data / "03.png")
    place.precompute(flips)
    assert place.encoded[-1] == 1 and sum(place.encoded) == 13

    quick = ["--max-train-steps", 2, flips]
    place.train(place.data, "with", *quick, "--vae", place.vae)
    place.data.rename(place.root / "away")
    place.train(place.latents, "without", *quick)
    assert len(losses(place.root / "with")) >= 3
    assert losses(place.root / "without") == pytest.approx(losses(place.root / "with"), rel=1e-3)
    assert (place.root / "without" / "pipeline" / "vae").is_dir()
    table = cached_latents(
        find_source(str(place.latents)), load_autoencoder(place.vae), 16, flips=False, progress=False
    )
    assert table.mean.shape[1] == 2  # mirror images are not needed, but there

    build_autoencoder(AUTOENCODER, 16).save_pretrained(place.root / "other")
    place.root.joinpath("away").rename(place.data)
    assert "made by another autoencoder" in place.precompute("--vae", place.root / "other", expect=2)
    for flags, words in [
        (["--inpainting"], ["holds no pixels", "--pixels"]),
        (["--condition", "class"], ["--condition class"]),
        (["--resolution", "32"], ["latents of 16 pixels, not of 32"]),
        (["--vae", place.root / "other"], ["autoencoder"]),
        (["--shuffle-tags", "4"], ["--shuffle-tags 4 was decided"]),
    ]:
        output = place.train(place.latents, "refused", *quick, *flags, expect=2)
        assert all(word in output for word in words)


def test_pixels_and_masks_are_stored_on_request(filled: Workplace) -> None:
    place, latents = filled, str(filled.latents)
    Image.new("L", (16, 16), 255).save(place.data / "04-mask.png")
    assert "needs pixels" in place.precompute(expect=2)
    place.precompute("--pixels")
    shutil.rmtree(place.data)
    place.train(place.latents, "run", "--max-train-steps", 1, "--preview-steps", 1)
    source = find_source(latents)
    assert source.has_masks and [e.name for e in source.examples if e.mask is not None] == ["04.png"]
    assert source.examples[4].open().size == (16, 16)
    assert not find_source(latents, masks="none").has_masks
    assert not check_source(latents).problems
    for kind in ("latents", "pixels", "masks"):
        (shard,) = (place.latents / kind).glob("*.safetensors")
        content = bytearray(shard.read_bytes())
        content[8 + int.from_bytes(content[:8], "little") + 200] ^= 1
        shard.rename(shard.with_suffix(".away"))
        shard.write_bytes(content)
        (problem,) = check_source(latents).problems
        assert f" {kind} are missing or damaged" in problem and "precompute" in problem
        shard.with_suffix(".away").replace(shard)
    assert not cache.cached_masks(source.subset([0, 1]), 16).has_mask.any()


def test_what_was_begun_is_finished_and_nothing_else_is_touched(
    filled: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = filled
    monkeypatch.setattr("latentflow.data.cache.store._ROWS", 4)
    place.precompute()
    (place.latents / INDEX).unlink()
    description = json.loads((place.latents / "latents.json").read_text())
    (place.latents / "latents.json").write_text(json.dumps(description | {"complete": False}))
    sorted((place.latents / "latents").glob("*.safetensors"))[1].unlink()
    assert "not complete" in place.train(place.latents, "run", expect=2)
    place.encoded.clear()
    place.precompute()
    assert sum(place.encoded) == 4

    source, images = readable(find_source(str(place.latents))), find_source(str(place.data))
    assert source.precomputed and source.all_captions() == images.all_captions()
    assert list(source.content_keys()) == images.content_keys()
    assert [example.name for example in source.subset([3, 1]).examples] == ["03.png", "01.png"]
    assert source.subset([3, 1]).subset([1]).captions() == images.captions()[1:2]
    assert source.subset([3, 1]).fingerprint() != source.subset([1, 3]).fingerprint() != source.fingerprint()
    assert_same_latents(source, images, place.vae)

    assert "were made with size" in place.precompute("--resolution", 32, expect=2)
    assert "not empty" in place.precompute("-o", place.vae, expect=2)
    assert "inside the data" in place.precompute("-o", place.data / "x", expect=2)


def assert_same_latents(source: Source, images: Source, vae: Path) -> None:
    network = load_autoencoder(vae)
    stored, direct = (
        cached_latents(data, network, 16, flips=False, progress=False) for data in (source, images)
    )
    torch.testing.assert_close(stored.mean[:], direct.mean[:])


def test_near_duplicates_are_kept_together_without_the_images(place: Workplace) -> None:
    place.data.mkdir()
    for seed in range(12):
        save_copies(place.data, seed, f"{seed:02}")
    place.precompute()
    images, stored = find_source(str(place.data)), find_source(str(place.latents))
    for seed in range(3):
        sides = split(stored, 6, seed)
        assert sides == split(images, 6, seed)
        first, second = ({stored.examples[row].name[:2] for row in rows} for rows in sides)
        assert first.isdisjoint(second)


def test_an_index_that_is_not_what_was_written_is_refused(filled: Workplace) -> None:
    filled.precompute()
    index = filled.latents / INDEX
    whole = index.read_bytes()
    (filled.latents / "latents.json.17.tmp").touch()  # of a process that was killed
    for broken in (whole.replace(b"03.png", b"04.png", 1), whole[:-9], None):
        index.unlink()
        if broken is not None:
            index.write_bytes(broken)
        with pytest.raises(UserError, match=r"index.arrow cannot be read: .*\n.*precompute"):
            find_source(str(filled.latents))
        filled.precompute()
        assert index.read_bytes() == whole and sum(filled.encoded) == 12


def test_latents_of_several_aspect_ratios_train_as_their_images_do(place: Workplace) -> None:
    place.data.mkdir()
    for row, size in enumerate([(16, 16), (16, 16), (24, 10), (10, 24), (10, 24), (40, 10)] * 2):
        fractal = Image.effect_mandelbrot(size, (-2, -1.5 + row / 9, 1, 1.5), 20)
        fractal.convert("RGB").save(place.data / f"{row}.png")
    Image.new("L", (24, 10), 255).save(place.data / "2-mask.png")
    for _ in range(2):
        assert "none left out" in place.precompute("--buckets", "--patch-size", 1, "--pixels")
        assert sum(place.encoded) == 12
    source, images = find_source(str(place.latents)), find_source(str(place.data))
    assert isinstance(source, LatentFolder) and not source.damage() and len(source.sizes) == 4
    for example, whole in zip(source.examples, images.examples, strict=True):
        assert example.name == whole.name and example.open().size in {(w, h) for h, w in source.sizes}

    quick = ["--max-train-steps", 3, "--size-conditioning", "--inpainting"]
    place.train(place.data, "with", *quick, "--vae", place.vae, "--buckets")
    place.data.rename(place.root / "away")
    place.train(place.latents, "without", *quick)
    assert losses(place.root / "without") == pytest.approx(losses(place.root / "with"), rel=1e-3)
    for flags, words in (["--crops", 2], "--crops"), (["--patch-size", 4], "needs multiples of 8"):
        assert words in place.train(place.latents, "refused", *quick, *flags, expect=2)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are text there")
def test_what_check_calls_ready_trains_whatever_its_names(place: Workplace) -> None:
    """Names that are no text in any encoding, or would steer a terminal: written as escapes wherever they are."""
    place.data = place.root / os.fsdecode(b"da\xe9ta")
    for number in range(12):
        folder = place.data / os.fsdecode(b"cl\xe9\n\x1b[31m%d" % (number % 2))
        folder.mkdir(parents=True, exist_ok=True)
        noise(number, 24, 20).save(folder / os.fsdecode(b"\xe9\n\x1b[31m%d.png" % number))
    classes = [f"cl\\udce9\n\x1b[31m{number}" for number in range(2)]
    output = call(place.root / "cache", place.data, "--report", place.root / "report.html", file="check")
    assert "ready to train" in output and one_line(classes[0]) in output
    output += place.train(place.data, "run", "--vae", place.vae, "--max-train-steps", 1)
    output += place.precompute()
    output += place.train(place.latents, "run-2", "--max-train-steps", 1)
    for run in (place.root / "run", place.root / "run-2"):
        index = json.loads((run / "pipeline" / "model_index.json").read_text("utf-8"))
        assert list(index["id2label"].values()) == classes
        output += "".join((run / file).read_text("utf-8") for file in ("train.log", "pipeline/README.md"))
    assert losses(place.root / "run") == pytest.approx(losses(place.root / "run-2"), rel=1e-3)
    names = [example.name for example in find_source(str(place.latents)).examples]
    assert names[0] == f"{classes[0]}/\\udce9\n\x1b[31m0.png"
    assert "\x1b" not in output and one_line(classes[0]) in output and output.encode()


def test_classes_of_a_checkpoint_may_come_before_those_of_the_folder(place: Workplace) -> None:
    for number, label in enumerate(["ant", "cow", "cow"]):
        (place.data / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (80 * number, 0, 0)).save(place.data / label / f"{number}.png")
    place.precompute()
    source = find_source(str(place.latents))
    assert list(source.class_ids()) == [0, 1, 1]
    joined = dataclasses.replace(source, classes=("cow", "dog", "ant"))
    assert list(joined.class_ids()) == [2, 0, 0] and list(joined.subset([1]).class_ids()) == [0]


def test_latents_of_converted_images_have_keys_of_their_own(filled: Workplace) -> None:
    place, latents = filled, str(filled.latents)
    for name in ("02.png", "05.png"):
        Image.open(place.data / name).save(place.data / name, icc_profile=rgb_profile("ProPhoto RGB"))
    place.precompute("--pixels", "--colours", "stored")
    before = [example.open().tobytes() for example in find_source(latents).examples]
    place.encoded.clear()
    output = place.precompute("--pixels")  # only what is read otherwise is made again
    assert sum(place.encoded) == 2
    assert "2 images with another colour profile than sRGB, converted" in output

    source, images = find_source(latents), find_source(str(place.data))
    assert list(source.content_keys()) == images.content_keys()  # split as its images are
    assert list(source.pixel_keys()) == images.pixel_keys() != images.content_keys()
    after = [example.open().tobytes() for example in source.examples]
    assert [row for row in range(12) if before[row] != after[row]] == [2, 5]
    assert not check_source(latents).problems
    assert_same_latents(source, images, place.vae)
    with pytest.raises(UserError, match="--colours stored was decided when it was made"):
        find_source(latents, colours="stored")


def test_a_folder_of_latents_from_before_profiles_were_converted(filled: Workplace) -> None:
    place, latents = filled, str(filled.latents)
    place.precompute("--pixels")
    assert not any("before colour profiles" in note for note in find_source(latents).notes)
    description = json.loads((place.latents / "latents.json").read_text())
    assert description.pop("colours") == "srgb"
    (place.latents / "latents.json").write_text(json.dumps(description))
    before = find_source(latents)
    assert any("before colour profiles were converted" in note for note in before.notes)
    assert list(before.pixel_keys()) == list(before.content_keys())
    assert before.examples[0].open().size == (16, 16) and not check_source(latents).problems

    place.encoded.clear()
    place.precompute("--pixels")  # no image has a profile: for a run that learns from it, nothing changes
    after, columns = find_source(latents), pyarrow.ipc.open_file(place.latents / INDEX).schema.names
    assert not place.encoded and "pixel_key" not in columns
    assert after.fingerprint() == before.fingerprint()
    assert not any("before colour profiles" in note for note in after.notes)
