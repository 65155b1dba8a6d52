"""Build `pictograms`, some 14,000 captioned images in five styles, from packages of public registries.

    npm install --prefix packages @iconify-json/noto@1.2.9 @lobehub/fluent-emoji-3d@1.1.0 \\
        @iconify-json/fluent-emoji-flat@1.2.6 @twemoji/svg@15.0.0 emojibase-data@17.0.0
    cd packages && apt-get download openclipart-svg && dpkg-deb -x openclipart-svg_*.deb openclipart && cd ..
    pip install resvg-py
    python train/recipes/pictograms.py packages -o data/pictograms

| style | source | licence |
|---|---|---|
| `noto` | Noto Emoji (Google) | Apache-2.0 |
| `3d` | Fluent Emoji 3D (Microsoft), 256 px | MIT |
| `flat` | Fluent Emoji Flat (Microsoft) | MIT |
| `twemoji` | Twemoji (Twitter and others) | CC-BY-4.0: name them where you show images |
| `clip art` | Open Clip Art Library, as Debian ships it | public domain |

Writes `train/` and `test/`, each with square RGBA images and a `metadata.jsonl` (file_name, text, style, name,
group, subgroup, skin_tone, license, source), `left_out.jsonl` (what is not there, and why) and `LICENSES.md`.
`text` is a list: "<style> style: <name>" three times, and the bare name, so that a model learns prompts without
a style from a quarter of what it sees. Names of emoji are Unicode's (emojibase-data); combinations of two skin
tones are left out. The name of a clip art is its title or, where more than three drawings share the title, what
its file is called.

Left out as well: clip art that is not marked as public domain, contains text or pixels, or is a playing card, a
star polygon, a pattern, a button or an icon of a desktop theme; images that are almost empty; near duplicates
(a root mean square difference below `--near` between 32 x 32 pixels on grey), of which the first stays.

`test/` holds pairs of a style and a name that `train/` never shows, while it shows the name in the other styles:
names that exist in three styles of emoji or more are ranked by the SHA-256 of the name, and the first
`--test-names` lose one style each, the styles in turn, with all the skin tones of that name. The same packages give
the same folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal
from xml.etree import ElementTree

import numpy as np
import tyro
from PIL import Image

from latentflow.cli import parse, run
from latentflow.data.images import decode_image, loaded, open_image
from latentflow.errors import UserError
from latentflow.utils.libraries import missing
from latentflow.utils.progress import progress_bar

Style = Literal["noto", "3d", "flat", "twemoji", "clip art"]
PACKAGES: dict[Style, str] = {
    "noto": "@iconify-json/noto",
    "3d": "@lobehub/fluent-emoji-3d",
    "flat": "@iconify-json/fluent-emoji-flat",
    "twemoji": "@twemoji/svg",
    "clip art": "openclipart",
}
LICENSES: dict[Style, str] = {
    "noto": "Apache-2.0",
    "3d": "MIT",
    "flat": "MIT",
    "twemoji": "CC-BY-4.0",
    "clip art": "public domain",
}
EMOJI = [style for style in PACKAGES if style != "clip art"]
TONES = {1: "light", 2: "medium-light", 3: "medium", 4: "medium-dark", 5: "dark"}
DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
PUBLIC_DOMAIN = ("publicdomain", "public-domain", "/zero/")
NOT_CLIP_ART = (
    "shapes/stars",
    "special",
    "computer/buttons",
    "computer/icons",
    "recreation/games/cards",
    "signs_and_symbols/led",
)
SHARED_TITLE = 3  # more drawings than this with one title: it names a collection
MARGIN = 0.05  # of clip art, of a side
EMPTY = 0.02  # mean opacity below which an image is almost empty
THUMBNAIL = 32


@dataclass(frozen=True, kw_only=True)
class PictogramsConfig:
    """Build the captioned data set `pictograms` from packages of public registries."""

    packages: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PACKAGES")]
    """Folder with node_modules/ and openclipart/ (the lines to make it: at the top of this file)."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to make; it must not exist yet."""
    resolution: int = 128
    """Side of the images in pixels."""
    styles: tuple[Style, ...] = tuple(PACKAGES)
    """Styles to include."""
    mix: tuple[Style, ...] = ()
    """Also write mix.yaml, training data of these styles alone: the training images without a skin tone, each six times
    an epoch, and those with one, once."""
    test_names: int = 240
    """Number of pairs of a style and a name that are held out."""
    near: float = 0.012
    """Largest difference of near duplicates: root mean square of pixels in [0, 1]."""


@dataclass(frozen=True)
class Drawing:
    """An image that a package holds, not yet rendered."""

    style: Style
    file_name: str
    name: str
    base: str
    group: str
    subgroup: str
    skin_tone: str | None
    source: str
    svg: str = field(default="", repr=False)
    file: Path | None = None  # of pixels
    crop: bool = False


@dataclass(frozen=True)
class Row:
    """One line of metadata.jsonl."""

    file_name: str
    text: list[str]
    style: str
    name: str
    group: str
    subgroup: str
    skin_tone: str | None
    license: str
    source: str


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(PictogramsConfig, argv, prog="pictograms.py")
    if importlib.util.find_spec("resvg_py") is None:
        raise missing("rendering SVG files needs", "resvg-py")
    if config.output.exists():
        raise UserError(f"{config.output} exists already", "Give a new folder; nothing is overwritten.")

    # What there is
    drawings: list[Drawing] = []
    left_out: list[dict[str, str]] = []
    names = read_names(config.packages)
    for style in config.styles:
        drawings += (
            read_clip_art(config.packages, left_out)
            if style == "clip art"
            else read_emoji(style, config, names)
        )

    # Pixels, and what they show
    images = render_all(drawings, config.resolution)
    kept = without_empty(drawings, images, left_out)
    kept = without_near_duplicates(kept, images, config.near, left_out)

    # What is held out
    test = choose_test(kept, config.test_names)

    # Write
    for part in ("train", "test"):
        members = [drawing for drawing in kept if (drawing.file_name in test) == (part == "test")]
        write(config.output / part, members, images)
        counts = Counter(drawing.style for drawing in members)
        print(
            f"{config.output / part}: {len(members)} images ({', '.join(f'{n} {s}' for s, n in counts.items())})"
        )
    if config.mix:
        trained = [
            drawing for drawing in kept if drawing.style in config.mix and drawing.file_name not in test
        ]
        write_mix(config.output, trained, images)
    write_lines(config.output / "left_out.jsonl", left_out)
    write_licenses(config.output / "LICENSES.md", kept)
    reasons = Counter(line["why"].split(":")[0] for line in left_out)
    print(f"left out: {', '.join(f'{n} {why}' for why, n in reasons.most_common())} (left_out.jsonl)")


# ---- emoji ----


@dataclass(frozen=True)
class Name:
    """The name of an emoji: `base` is without the skin tone."""

    name: str
    base: str
    group: str
    subgroup: str
    skin_tone: str | None


def read_names(packages: Path) -> dict[str, Name]:
    """Code points (as in :func:`key_of`) -> name; without components and combinations of two skin tones."""
    folder = package(packages, "emojibase-data")
    words = json.loads((folder / "meta" / "groups.json").read_text(encoding="utf-8"))
    names: dict[str, Name] = {}
    for entry in json.loads((folder / "en" / "data.json").read_text(encoding="utf-8")):
        if "group" not in entry:  # single regional letters
            continue
        group = words["groups"][str(entry["group"])]
        if group == "component":
            continue
        subgroup = words["subgroups"][str(entry["subgroup"])]
        base = entry["label"]
        names[key_of(entry["hexcode"])] = Name(base, base, group, subgroup, None)
        for skin in entry.get("skins", []):
            if isinstance(skin["tone"], int):
                tone = TONES[skin["tone"]]
                names[key_of(skin["hexcode"])] = Name(skin["label"], base, group, subgroup, tone)
    return names


def key_of(code_points: str) -> str:
    """Code points in lower case, joined by '-', without variation selectors, which packages treat each its way."""
    return "-".join(code for code in code_points.lower().split("-") if code != "fe0f")


def read_emoji(style: Style, config: PictogramsConfig, names: Mapping[str, Name]) -> Iterator[Drawing]:
    """The named drawings of an emoji package, in the order of their code points."""
    folder = package(config.packages, PACKAGES[style])
    source = (
        f"{PACKAGES[style]} {json.loads((folder / 'package.json').read_text(encoding='utf-8'))['version']}"
    )
    files: dict[str, Path] = {}
    bodies: dict[str, str] = {}
    if (folder / "icons.json").is_file():
        bodies = iconify_bodies(folder)
    else:
        files = {
            key_of(path.stem): path
            for path in sorted(folder.rglob("*.*"))
            if path.suffix in {".svg", ".webp", ".png"}
        }
    for key in sorted(names.keys() & (bodies.keys() | files.keys())):
        path = files.get(key)
        yield Drawing(
            style=style,
            file_name=f"{style}_{key}.png",
            source=source,
            svg=bodies.get(key, "")
            if path is None or path.suffix != ".svg"
            else path.read_text(encoding="utf-8"),
            file=path if path is not None and path.suffix != ".svg" else None,
            **asdict(names[key]),
        )


def iconify_bodies(folder: Path) -> dict[str, str]:
    """Code points -> SVG, of a package in Iconify's JSON format."""
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    characters = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
    bodies = {}
    for code_points, name in characters.items():
        alias = icons.get("aliases", {}).get(name, {})
        icon = icons["icons"].get(alias.get("parent", name))
        if icon is None or set(alias) - {"parent", "hFlip"}:
            continue
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        body = icon["body"]
        if alias.get("hFlip", False):
            body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
        bodies[key_of(code_points)] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{body}</svg>'
        )
    return bodies


def package(packages: Path, name: str) -> Path:
    """The folder of a package.

    Raises:
        UserError: it is not there.
    """
    folder = packages / name if name == "openclipart" else packages / "node_modules" / name
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist",
            "The lines at the top of this file fetch the packages; --styles leaves styles out.",
        )
    return folder


# ---- clip art ----


def read_clip_art(packages: Path, left_out: list[dict[str, str]]) -> list[Drawing]:
    """The drawings of the Open Clip Art Library that are in the public domain and have a name."""
    folder = package(packages, "openclipart")
    roots = sorted(folder.rglob("openclipart/svg"))
    if not roots:
        raise UserError(
            f"there is no openclipart/svg in {folder}", "Unpack openclipart-svg_*.deb there: dpkg-deb -x."
        )
    found: list[tuple[str, str, str, Path]] = []  # place, title, artist, file

    for path in sorted(roots[0].rglob("*.svg")):
        place = path.relative_to(roots[0]).as_posix()
        title, artist, license = describe(path)
        reason = None
        if place.startswith(NOT_CLIP_ART):
            reason = "kind"
        elif not any(word in license for word in PUBLIC_DOMAIN):
            reason = f"license: {license or 'none stated'}"
        elif re.search(r"<(text|image|flowRoot)\b", path.read_text(encoding="utf-8", errors="replace")):
            reason = "text or pixels"
        if reason is None:
            found.append((place, title, artist, path))
        else:
            left_out.append({"file_name": place, "why": reason})

    titles = Counter(title for _, title, _, _ in found)
    drawings = []
    for place, title, artist, path in found:
        name = (
            title
            if title and titles[title] <= SHARED_TITLE
            else without_artist(readable_name(path.stem), artist)
        )
        if len(re.sub(r"[^a-z]", "", name)) < 3:
            left_out.append({"file_name": place, "why": "no name"})
            continue
        drawings.append(
            Drawing(
                style="clip art",
                file_name=f"clip-art_{place.removesuffix('.svg').replace('/', '_')}.png",
                name=name,
                base=name,
                group=place.split("/")[0],
                subgroup="/".join(place.split("/")[1:-1]),
                skin_tone=None,
                source="Open Clip Art Library 0.18",
                svg=path.read_text(encoding="utf-8", errors="replace"),
                crop=True,
            )
        )
    return drawings


def describe(path: Path) -> tuple[str, str, str]:
    """Title and artist (in lower case, may be empty) and address of the license in the metadata of an SVG file."""
    for work in ElementTree.parse(path).iter():
        if work.tag.endswith("}Work"):
            title = readable_name(work.findtext(f"{DUBLIN_CORE}title") or "")
            creator = work.find(f"{DUBLIN_CORE}creator")
            artist = "" if creator is None else readable_name(" ".join(creator.itertext()))
            licenses = [node for node in work.iter() if node.tag.endswith("}license")]
            license = next(iter(licenses[0].attrib.values()), "") if licenses else ""
            return re.sub(r"^clipart by .* - ", "", title), artist, license.lower()
    return "", "", ""


def readable_name(written: str) -> str:
    """Words in lower case: without underscores, and without the number at the end."""
    words = re.sub(r"[_\s]+", " ", written).strip().lower()
    return re.sub(r"[\s-]*\d+[a-z]?$", "", words).strip(" -")


def without_artist(name: str, artist: str) -> str:
    """The name of a file without the beginning of the artist's name at its end ("lion jean vic")."""
    words = name.split()
    for count in range(1, len(words)):
        end = " ".join(words[count:])
        if len(end) >= 3 and artist.startswith(end):
            return " ".join(words[:count])
    return name


# ---- pixels ----


def render_all(drawings: Sequence[Drawing], resolution: int) -> dict[str, Image.Image]:
    """File name -> square RGBA image, of those that can be rendered."""
    with ThreadPoolExecutor() as pool:
        work = pool.map(render, drawings, [resolution] * len(drawings), chunksize=16)
        results = progress_bar(work, total=len(drawings), desc="rendering", unit="image")
        return {d.file_name: image for d, image in zip(drawings, results, strict=True) if image is not None}


def render(drawing: Drawing, resolution: int) -> Image.Image | None:
    """A square RGBA image, its colours weighted by opacity where it is resized; None if it cannot be rendered."""
    if drawing.file is not None:
        image = decode_image(drawing.file).convert("RGBA")
    else:
        import resvg_py

        size = 4 * resolution if drawing.crop else resolution
        try:
            png = resvg_py.svg_to_bytes(
                svg_string=drawing.svg, width=size, height=size, dpi=96, skip_system_fonts=True
            )
        except ValueError:
            return None
        image = loaded(open_image(io.BytesIO(bytes(png)))).convert("RGBA")
    if drawing.crop:
        image = image.crop(image.getchannel("A").point(lambda opacity: 255 * (opacity > 8)).getbbox())
    inner = round(resolution * (1 - 2 * MARGIN)) if drawing.crop else resolution
    scale = inner / max(image.size)
    if scale != 1:
        width, height = (max(1, round(scale * side)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (resolution, resolution))
    canvas.paste(image, ((resolution - image.width) // 2, (resolution - image.height) // 2))
    return canvas


def without_empty(
    drawings: Sequence[Drawing], images: Mapping[str, Image.Image], left_out: list[dict[str, str]]
) -> list[Drawing]:
    """The drawings whose image shows something."""
    kept = []
    for drawing in drawings:
        image = images.get(drawing.file_name)
        opacity = 0.0 if image is None else float(np.asarray(image.getchannel("A")).mean()) / 255
        if image is not None and opacity >= EMPTY and np.ptp(np.asarray(on_grey(image))) > 0:
            kept.append(drawing)
        else:
            why = "not rendered" if image is None else "almost empty"
            left_out.append({"file_name": drawing.file_name, "why": why})
    return kept


def on_grey(image: Image.Image) -> Image.Image:
    """RGB on mid grey, where black drawings and white ones show."""
    ground = Image.new("RGBA", image.size, (128, 128, 128, 255))
    return Image.alpha_composite(ground, image).convert("RGB")


def without_near_duplicates(
    drawings: Sequence[Drawing],
    images: Mapping[str, Image.Image],
    near: float,
    left_out: list[dict[str, str]],
) -> list[Drawing]:
    """The drawings without those that look like an earlier one which stays."""
    thumbnails = np.stack(
        [
            np.asarray(
                on_grey(images[d.file_name]).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), np.float32
            )
            for d in drawings
        ]
    ).reshape(len(drawings), -1)
    thumbnails /= 255 * np.sqrt(thumbnails.shape[1])
    squares = (thumbnails**2).sum(axis=1)
    earlier: dict[int, list[int]] = defaultdict(list)
    for start in range(0, len(drawings), 1024):
        rows = slice(start, start + 1024)
        distances = squares[rows, None] + squares - 2 * thumbnails[rows] @ thumbnails.T
        for row, column in zip(*np.nonzero(distances < near**2), strict=True):
            if column < row + start:
                earlier[int(row) + start].append(int(column))
    stays = [True] * len(drawings)
    for later in sorted(earlier):
        first = next((index for index in earlier[later] if stays[index]), None)
        if first is not None:
            stays[later] = False
            why = f"near duplicate: {drawings[first].file_name}"
            left_out.append({"file_name": drawings[later].file_name, "why": why})
    return [drawing for drawing, stay in zip(drawings, stays, strict=True) if stay]


# ---- parts ----


def choose_test(drawings: Sequence[Drawing], count: int) -> set[str]:
    """File names of ``count`` pairs of a style and a name, each with all its skin tones."""
    by_name: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for drawing in drawings:
        if drawing.style in EMOJI:
            by_name[drawing.base][drawing.style].append(drawing.file_name)
    complete = [name for name, styles in by_name.items() if len(styles) >= 3]
    if count > len(complete):
        raise UserError(
            f"cannot hold out {count} pairs: {len(complete)} names exist in three styles or more",
            "Lower --test-names.",
        )
    ranked = sorted(complete, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    chosen: set[str] = set()
    for index, name in enumerate(islice(ranked, count)):
        styles = sorted(by_name[name], key=EMOJI.index)
        chosen.update(by_name[name][styles[index % len(styles)]])
    return chosen


def write(folder: Path, drawings: Sequence[Drawing], images: Mapping[str, Image.Image]) -> None:
    """The images and their metadata."""
    folder.mkdir(parents=True)
    rows = []
    for drawing in drawings:
        images[drawing.file_name].save(folder / drawing.file_name)
        styled = f"{drawing.style} style: {drawing.name}"
        row = Row(
            file_name=drawing.file_name,
            text=[styled, styled, styled, drawing.name],
            style=drawing.style,
            name=drawing.name,
            group=drawing.group,
            subgroup=drawing.subgroup,
            skin_tone=drawing.skin_tone,
            license=LICENSES[drawing.style],
            source=drawing.source,
        )
        rows.append(asdict(row))
    write_lines(folder / "metadata.jsonl", rows)


def write_mix(folder: Path, drawings: Sequence[Drawing], images: Mapping[str, Image.Image]) -> None:
    """The images once more, those with a skin tone apart, and the file that mixes them."""
    sources = []
    for part, repeats in (("base", 6), ("toned", 1)):
        members = [drawing for drawing in drawings if (drawing.skin_tone is not None) == (part == "toned")]
        write(folder / "mix" / part, members, images)
        sources.append(f"  - {{data: mix/{part}, repeats: {repeats}}}\n")
    (folder / "mix.yaml").write_text("sources:\n" + "".join(sources), encoding="utf-8")
    print(f"{folder / 'mix.yaml'}: {len(drawings)} images")


def write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_licenses(file: Path, drawings: Sequence[Drawing]) -> None:
    """Write the sources, their licenses, and whom to name."""
    counts = Counter((drawing.style, drawing.source) for drawing in drawings)
    lines = ["# Licenses", "", "| style | images | source | license |", "|---|---|---|---|"]
    lines += [f"| {style} | {n} | {source} | {LICENSES[style]} |" for (style, source), n in counts.items()]
    lines += [
        "",
        "Twemoji: graphics by Twitter, Inc. and other contributors, CC-BY 4.0, https://creativecommons.org/licenses/by/4.0/.",
        "Changes: rendered at another size, some left out.",
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
