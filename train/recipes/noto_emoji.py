"""Rebuild the emoji folder that `emoji-64.yaml` trains on, from public artwork and Unicode's list of names.

    git clone --depth 1 https://github.com/googlefonts/noto-emoji
    curl -O https://www.unicode.org/Public/emoji/latest/emoji-test.txt
    python train/recipes/noto_emoji.py noto-emoji emoji-test.txt -o data/emoji

Writes `train/` and `test/`, each with 64-pixel RGBA images and a `metadata.jsonl` (file_name, text, group,
subgroup, skin_tone). `text` is Unicode's name; a code point that the list lacks (digits, letters) has its own
name in lower case and the group "Other". Bare skin tones and hair styles (group "Component") are left out.
`skin_tone` is the one tone of an image, null where there is none or several.

`test/` holds combinations of an image and a skin tone that `train/` never shows, while it shows the same
image in the four other tones. Images that exist in all five are ranked by the SHA-256 of the name without
its tone; the first 80 give one tone each, the five tones in turn. The same input gives the same folder.

What is known about equality: the folder behind the shipped checkpoint has this layout, these names and texts,
3,273 + 80 images and 16 test images of each tone. But its test combinations were drawn by another rule,
and 80 more combinations (16 of each tone) are in neither part. By default this program makes a split of
the same kind, not the same split, and its artwork and names are those of the versions that you fetched.
`--held-out FILE` (a metadata.jsonl, or one file name a line) puts exactly the named images into `test/`.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from latentflow.cli import parse, run
from latentflow.data.images import decode_image
from latentflow.errors import UserError

TONES = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}


@dataclass(frozen=True, kw_only=True)
class NotoConfig:
    """Rebuild the emoji folder from a checkout of Noto Emoji and Unicode's emoji-test.txt."""

    noto: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="NOTO")]
    """A checkout of googlefonts/noto-emoji (images in png/512)."""
    names: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="EMOJI_TEST")]
    """Unicode's emoji-test.txt."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to make; it must not exist yet."""
    resolution: int = 64
    """Side of the images in pixels."""
    test_images: int = 80
    """Number of combinations of an image and a skin tone that are held out."""
    held_out: Path | None = None
    """A list of the images to hold out instead: a metadata.jsonl or one file name a line."""


@dataclass(frozen=True)
class Row:
    """One line of metadata.jsonl."""

    file_name: str
    text: str
    group: str
    subgroup: str
    skin_tone: str | None


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(NotoConfig, argv, prog="noto_emoji.py")

    # What there is
    images = find_images(config.noto)
    names = read_names(config.names)
    rows = [row for key in sorted(images) if (row := describe(key, names)) is not None]
    print(f"{len(images)} images, {len(rows)} of them named; the others are components or private symbols")

    # What is held out
    if config.held_out is None:
        test = choose_test(rows, config.test_images)
    else:
        test = read_held_out(config.held_out, {row.file_name for row in rows})

    # Write
    if config.output.exists():
        raise UserError(f"{config.output} exists already", "Give a new folder; nothing is overwritten.")
    for part, chosen in (("train", False), ("test", True)):
        members = [row for row in rows if (row.file_name in test) == chosen]
        write(config.output / part, members, images, config.resolution)
        print(f"{config.output / part}: {len(members)} images")


def find_images(noto: Path) -> dict[str, Path]:
    """Code points joined by '_' (``1f600``, ``0023_20e3``) -> file."""
    folder = noto / "png" / "512"
    found = {path.stem.removeprefix("emoji_u"): path for path in folder.glob("emoji_u*.png")}
    if not found:
        raise UserError(
            f"there are no emoji_u*.png in {folder}", "Give a checkout of googlefonts/noto-emoji."
        )
    return found


def read_names(path: Path) -> dict[str, tuple[str, str, str]]:
    """Code points (without the variation selector fe0f, which file names lack) -> name, group, subgroup."""
    names: dict[str, tuple[str, str, str]] = {}
    group = subgroup = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.split(":", 1)[1].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.split(":", 1)[1].strip()
        elif entry := re.match(r"([0-9A-F ]+?)\s*;[^#]*#\s*\S+\s+E\d+\.\d+\s+(.+)", line):
            key = "_".join(code.lower() for code in entry[1].split() if code != "FE0F")
            names.setdefault(key, (entry[2].strip(), group, subgroup))
    if not names:
        raise UserError(f"{path} lists no emoji", "Give Unicode's emoji-test.txt.")
    return names


def describe(key: str, names: Mapping[str, tuple[str, str, str]]) -> Row | None:
    """The metadata of an image; None for components and for what has no name."""
    text, group, subgroup = names.get(key, ("", "Other", "other"))
    if not text and "_" not in key:
        text = unicodedata.name(chr(int(key, 16)), "").lower()
    if not text or group == "Component":
        return None
    tones = {TONES[code] for code in key.split("_") if code in TONES}
    return Row(f"{key}.png", text, group, subgroup, tones.pop() if len(tones) == 1 else None)


def choose_test(rows: Iterable[Row], count: int) -> set[str]:
    """File names of ``count`` combinations of an image and a tone, of different images, tones in turn."""
    by_image: dict[str, dict[str, str]] = {}
    for row in rows:
        if row.skin_tone is not None:
            codes = row.file_name.removesuffix(".png").split("_")
            image = "_".join(code for code in codes if code not in TONES)
            by_image.setdefault(image, {})[row.skin_tone] = row.file_name
    complete = [image for image, files in by_image.items() if len(files) == len(TONES)]
    if count > len(complete):
        raise UserError(
            f"cannot hold out {count} images: {len(complete)} exist in all skin tones",
            "Lower --test-images.",
        )
    ranked = sorted(complete, key=lambda image: hashlib.sha256(image.encode()).hexdigest())
    tones = list(TONES.values())
    return {by_image[image][tones[i % len(tones)]] for i, image in enumerate(ranked[:count])}


def read_held_out(path: Path, known: set[str]) -> set[str]:
    """The file names in a metadata.jsonl or a plain list."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    listed = {json.loads(line)["file_name"] if line.startswith("{") else line for line in lines}
    strange = sorted(listed - known)
    if strange:
        raise UserError(
            f"{path} names {len(strange)} images that are not there: {', '.join(strange[:5])}",
            "They must be called as in metadata.jsonl, e.g. 1f44b_1f3fc.png.",
        )
    return listed


def write(folder: Path, rows: Sequence[Row], images: Mapping[str, Path], resolution: int) -> None:
    """The images, square and resized (colours weighted by opacity), and their metadata."""
    folder.mkdir(parents=True)
    for row in rows:
        image = decode_image(images[row.file_name.removesuffix(".png")]).convert("RGBA")
        side = max(image.size)
        canvas = Image.new("RGBA", (side, side))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        canvas.resize((resolution, resolution), Image.Resampling.LANCZOS).save(folder / row.file_name)
    lines = [json.dumps(asdict(row), ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
