"""Colour profiles: what is read is sRGB, by the formulas; what is cached, counted and reported of them."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from latentflow.data import (
    FileExample,
    Source,
    cached_pixels,
    check_source,
    find_source,
    read_image,
    read_mask,
    readable,
)
from latentflow.data.checking.inspect_images import inspect_images
from latentflow.data.images import profile_of, to_rgb, upright
from latentflow.pipeline.images import read_images

from .images import load_program, noise
from .profiles import (
    SPACES,
    Curve,
    cmyk_profile,
    from_srgb,
    gamma,
    grey_profile,
    in_srgb,
    lab_in_srgb,
    rgb_profile,
    to_srgb,
)

WIDE = [space for space in SPACES if space != "sRGB"]
# Every fifteenth level of each channel
LEVELS = (
    np.stack(np.meshgrid(*[np.arange(0, 256, 15)] * 3, indexing="ij"), -1).reshape(72, 81, 3).astype(np.uint8)
)
P3 = rgb_profile("Display P3")


def with_profile(image: Image.Image, profile: object) -> Image.Image:
    image.info["icc_profile"] = profile
    return image


def saved(image: Image.Image, path: Path, profile: bytes, **options: object) -> Path:
    image.save(path, icc_profile=profile, **options)
    return path


def off(image: Image.Image, wanted: np.ndarray) -> float:
    return float(np.abs(np.asarray(image).astype(float) - wanted).max())


@pytest.mark.parametrize("space", WIDE)
@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "avif", "jpg"])
def test_colours_are_converted_by_the_formula(tmp_path: Path, space: str, suffix: str) -> None:
    """In every format that holds a profile; lossy ones are measured on what Pillow decodes."""
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    path = saved(Image.fromarray(LEVELS), tmp_path / f"a.{suffix}", rgb_profile(space), **options)
    with Image.open(path) as opened:
        stored = np.asarray(opened.convert("RGB"))
    seen = read_image(FileExample("a", path=path), LEVELS.shape[:2])
    wanted = in_srgb(stored, space)
    assert off(seen, wanted) <= 1 < 15 < np.abs(stored - wanted).max()
    assert "icc_profile" not in seen.info
    # What a caller hands in is the same.
    tensor = read_images(Image.open(path))[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(tensor - wanted).max() <= 1


@pytest.mark.parametrize("curve", [gamma(2.2), gamma(1.8), gamma(1.0)], ids=["2.2", "1.8", "linear"])
@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_is_converted_by_the_formula(curve: Curve, mode: str) -> None:
    levels = np.arange(256, dtype=np.uint8)[None]
    image = Image.fromarray(levels.astype(np.uint16) * 257 if mode == "I;16" else levels)
    if mode == "LA":
        image.putalpha(Image.fromarray(levels[:, ::-1].copy()))
    seen = upright(with_profile(image, grey_profile(curve)))
    wanted = 255 * to_srgb(curve(levels / 255))[..., None].repeat(3, 2)
    assert off(seen.convert("RGB"), wanted) <= 1 < np.abs(levels[..., None] - wanted).max()
    if mode == "LA":
        assert np.array_equal(np.asarray(seen)[..., 3], levels[:, ::-1])


def test_grey_under_a_profile_of_rgb_is_one_of_its_greys() -> None:
    levels = np.arange(256, dtype=np.uint8)[None]
    adobe = to_rgb(with_profile(Image.fromarray(levels), rgb_profile("Adobe RGB (1998)")))
    assert off(adobe, in_srgb(levels[..., None].repeat(3, 2), "Adobe RGB (1998)")) <= 1
    assert np.array_equal(np.asarray(to_rgb(with_profile(Image.fromarray(levels), P3)))[..., 0], levels)


def test_inks_are_converted_by_their_own_profile() -> None:
    def lab(inks: tuple[int, int, int, int]) -> tuple[float, float, float]:
        cyan, magenta, yellow, black = inks
        light = 100 - 20 * cyan - 20 * magenta - 10 * yellow
        return (0, 0, 0) if black else (light, 30 * (magenta - cyan), 40 * yellow - 30 * cyan)

    profile = cmyk_profile(lab)
    for inks in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (1, 1, 0, 0), (0, 0, 0, 1)]:
        image = Image.new("CMYK", (1, 1), tuple(255 * ink for ink in inks))
        plain = to_rgb(image).getpixel((0, 0))
        assert plain == tuple(0 if inks[3] else 255 * (1 - ink) for ink in inks[:3])  # Pillow's own
        seen = to_rgb(with_profile(image, profile)).getpixel((0, 0))
        assert np.abs(np.subtract(seen, lab_in_srgb(lab(inks)))).max() <= 1.5


@pytest.mark.parametrize("mode", ["RGBA", "P", "P with transparency", "RGB with a transparent colour"])
def test_alpha_stays_where_it_is(mode: str) -> None:
    alpha = np.arange(LEVELS[..., 0].size, dtype=np.uint32).reshape(LEVELS.shape[:2]) % 256
    image = Image.fromarray(LEVELS)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    elif mode.startswith("P"):
        image = image.quantize(64)
    else:
        image.info["transparency"] = (255, 0, 0)
    if mode == "P with transparency":
        image.info["transparency"] = bytes(range(0, 256, 4))
    before = np.asarray(image.convert("RGBA"))
    after = np.asarray(upright(with_profile(image, P3)).convert("RGBA"))
    assert np.array_equal(after[..., 3], before[..., 3])
    assert np.abs(after[..., :3] - in_srgb(before[..., :3], "Display P3")).max() <= 1


def srgb_profiles() -> dict[str, bytes]:
    built = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return {"written here": rgb_profile("sRGB"), "of LittleCMS": built, "grey": grey_profile(from_srgb)}


@pytest.mark.parametrize("name", srgb_profiles())
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_a_profile_of_srgb_changes_no_pixel(name: str, mode: str) -> None:
    image = noise(1, 32, 32).convert(mode)
    before = to_rgb(image).tobytes()
    after = to_rgb(with_profile(image.copy(), srgb_profiles()[name]))
    assert after.tobytes() == before and "icc_profile" not in after.info


def test_profiles_of_srgb_are_rounded_by_everybody_in_another_way() -> None:
    image, near, far = Image.fromarray(LEVELS), rgb_profile("sRGB", 1.008), rgb_profile("sRGB", 1.03)
    profile = ImageCms.ImageCmsProfile(io.BytesIO(near))
    moved = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert moved is not None and off(moved, LEVELS) == 1  # what a conversion would do
    assert np.array_equal(to_rgb(with_profile(image.copy(), near)), LEVELS)
    assert 1 < off(to_rgb(with_profile(image.copy(), far)), LEVELS) < 4


@pytest.mark.parametrize(
    ("profile", "why"),
    [
        (b"junk", "cannot open profile"),
        (P3[:300], "cannot build transform"),
        (P3[:128] + b"\xff" * (len(P3) - 128), ""),
        (grey_profile(gamma(2.2)), "cannot build transform"),  # not of this mode
        (P3 + bytes(2**22), "bytes"),
        (None, "damaged"),  # of what could not be put together, and of a TIFF whose tag has another type
        ((12, 7), "damaged"),
    ],
    ids=["junk", "cut off", "tags destroyed", "of another mode", "huge", "none", "numbers"],
)
def test_a_profile_that_cannot_be_used_is_told_and_changes_nothing(
    profile: object, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    image = with_profile(noise(1, 16, 16), profile)
    found = profile_of(image)
    assert found is not None and found.problem and why in found.problem
    assert to_rgb(image).tobytes() == noise(1, 16, 16).tobytes()
    read_images(image)
    assert "colour profile cannot be used" in caplog.text


def test_masks_are_never_converted(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = saved(Image.fromarray(levels), tmp_path / "m.png", grey_profile(gamma(1.0)))
    assert np.array_equal(np.asarray(read_mask(Image.open(path))), levels)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Images without a profile, with one of sRGB, with others, and with broken ones."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    noise(0, 32, 32).save(folder / "none.png")
    saved(noise(1, 32, 32), folder / "srgb.png", rgb_profile("sRGB"))
    saved(noise(2, 32, 32), folder / "p3.png", P3)
    saved(noise(3, 32, 32), folder / "p3.jpg", P3, quality=100)
    saved(noise(4, 32, 32), folder / "adobe.tif", rgb_profile("Adobe RGB (1998)"))
    saved(noise(5, 32, 32), folder / "junk.png", b"junk")
    saved(noise(6, 32, 32), folder / "inflated.png", P3)
    data = (folder / "inflated.png").read_bytes()
    at = data.index(b"iCCP")
    size = int.from_bytes(data[at - 4 : at], "big")
    bad = data[at : at + 24] + b"\xff" * (size - 20)
    (folder / "inflated.png").write_bytes(
        data[:at] + bad + zlib.crc32(bad).to_bytes(4, "big") + data[at + 8 + size :]
    )
    return folder


def test_check_counts_profiles_in_its_lines_json_and_page(
    mixed: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = load_program(repository / "train" / "check.py")
    page = mixed.parent / "page.html"
    program.main([str(mixed), "--json", "--report", str(page)])
    for _ in range(2):  # decoded, and remembered
        report = check_source(str(mixed))
        assert report.profiles == {"Display P3": 2, "Adobe RGB (1998)": 1}
        assert set(report.unusable_profiles) == {"junk.png", "inflated.png"}
    reported = json.loads(capsys.readouterr().out)
    assert (
        reported["profiles"] == report.profiles and reported["unusable_profiles"] == report.unusable_profiles
    )
    lines = "\n".join(report.lines())
    assert "3 images with another colour profile than sRGB, converted: Display P3 (2), Adobe" in lines
    assert "warning: 2 images with a colour profile that cannot be used" in lines and "junk.png (" in lines
    shown = page.read_text(encoding="utf-8")
    assert "Display P3 (2)" in shown and "Colour profiles that cannot be used: 2" in shown


def test_a_training_is_told_of_profiles(mixed: Path) -> None:
    notes = "\n".join(readable(find_source(str(mixed))).notes)
    assert "3 images with another colour profile than sRGB, converted" in notes and "junk.png" in notes
    notes = "\n".join(readable(find_source(str(mixed), colours="stored")).notes)
    assert "3 images with another colour profile than sRGB, not used (--colours stored)" in notes


def test_only_what_is_converted_has_new_keys_in_the_caches(mixed: Path) -> None:
    """What was cached unconverted is not served for converted images, and still served for all others."""
    stored, source = find_source(str(mixed), colours="stored"), find_source(str(mixed))
    changed = {
        example.name
        for example, old in zip(source.examples, stored.examples, strict=True)
        if example.pixel_key() != old.pixel_key()
    }
    assert changed == {"p3.png", "p3.jpg", "adobe.tif"}
    assert stored.pixel_keys() == stored.content_keys() == source.content_keys()  # the split is the same
    assert stored.fingerprint() != source.fingerprint()
    before, after = (cached_pixels(one, 32) for one in (stored, source))
    for row, (example, old) in enumerate(zip(source.examples, stored.examples, strict=True)):
        levels, numbers = (table[row].permute(1, 2, 0).numpy() for table in (after, before))
        assert np.array_equal(levels, read_image(example, 32)) and np.array_equal(
            numbers, read_image(old, 32)
        )
        assert np.array_equal(levels, numbers) == (example.name not in changed)
        looks = [
            next(inspect_images(Source("one", (one,), "unconditional"), progress=False))
            for one in (old, example)
        ]
        assert (looks[0].thumbnail == looks[1].thumbnail) == (example.name not in changed)
        if example.name == "p3.png":
            assert np.abs(levels - in_srgb(numbers, "Display P3")).max() <= 1
