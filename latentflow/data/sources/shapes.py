"""A procedural captioned data set: coloured shapes on white, and an exact checker of generated images.

One object, "a small red circle on the left" (6 colours x 4 shapes x 2 sizes x 5 positions = 240 captions), or
two of different colours and middle size, "a red circle left of a blue square" (4 relations, 1,920 captions,
of which two describe each image: "left of" and "right of"). Lengths are shares of the side: any resolution
works.

Held out from training are 40 single captions and 240 pair captions (``is_held_out``), chosen so that any two
attributes still occur together in training: a model that gets them right has learnt to combine.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ...config import Control
from ...errors import UserError
from ..dataset import Example, Kind, Source
from ..images import to_pil
from ..labels import to_label_image

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (245, 205, 30),
    "purple": (170, 50, 180),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
CLASSES = {f"{colour} {shape}": (colour, shape) for colour in COLOURS for shape in SHAPES}
_ARM = 0.36  # half the width of the arms of a cross

# Area of each shape in units of half^2; how far its centre of mass lies below its centre in units of half.
AREA = {"circle": np.pi, "square": 4.0, "triangle": 2.0, "cross": 4 * (2 * _ARM - _ARM**2)}
SINK = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3, "cross": 0.0}


@dataclass(frozen=True)
class Placed:
    """An object in an image: half its width and its centre, as shares of the side."""

    colour: str
    shape: str
    half: float
    x: float
    y: float


def draw(items: list[Placed], resolution: int) -> tuple[Image.Image, list[Mask]]:
    """Draw objects on white (RGB, antialiased), the later ones on top; return the mask (H, W) of each as well."""
    canvas = np.full((resolution, resolution, 3), 255.0)
    masks = []
    for item in items:
        cover = coverage(item.shape, item.half, item.x, item.y, resolution)
        canvas += cover[:, :, None] * (np.array(COLOURS[item.colour]) - canvas)
        masks.append(cover >= 0.5)
    return Image.fromarray(np.rint(canvas).astype(np.uint8)), masks


def coverage(shape: str, half: float, x: float, y: float, resolution: int, samples: int = 4) -> Array:
    """Return the share of every pixel that the shape covers, (H, W), from ``samples``^2 points in each."""
    cover = np.zeros((resolution, resolution))
    left, top = (max(0, int(np.floor((c - half) * resolution))) for c in (x, y))
    right, bottom = (min(resolution, int(np.ceil((c + half) * resolution))) for c in (x, y))
    if left >= right or top >= bottom:
        return cover
    columns = (left + (np.arange((right - left) * samples) + 0.5) / samples) / resolution
    rows = (top + (np.arange((bottom - top) * samples) + 0.5) / samples) / resolution
    inside = _inside(shape, (columns[None, :] - x) / half, (rows[:, None] - y) / half)
    blocks = inside.reshape(bottom - top, samples, right - left, samples)
    cover[top:bottom, left:right] = blocks.mean(axis=(1, 3))
    return cover


def _inside(shape: str, u: Array, v: Array) -> Mask:
    """Return which points are in the shape that fills the square [-1, 1]^2, v downwards."""
    if shape == "circle":
        return u**2 + v**2 <= 1
    box = np.maximum(abs(u), abs(v)) <= 1
    if shape == "square":
        return box
    if shape == "triangle":  # the tip is on top
        return box & (2 * abs(u) <= v + 1)
    return box & (np.minimum(abs(u), abs(v)) <= _ARM)


SIZES = {"small": 0.15, "large": 0.23}  # half the width of the shape, as a share of the image's side
PAIR_SIZE = 0.16
POSITIONS = {  # centre (x, y) as shares of the side, y downwards; and its words in a caption
    "centre": (0.5, 0.5, "in the centre"),
    "left": (0.27, 0.5, "on the left"),
    "right": (0.73, 0.5, "on the right"),
    "top": (0.5, 0.27, "at the top"),
    "bottom": (0.5, 0.73, "at the bottom"),
}
RELATIONS = {  # positions of the first and the second object
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
JITTER = 1 / 32
RENDERS_PER_SINGLE = 12
_VERSION = 1  # raise it when the same spec and seed look different

MOVED = 0.1  # distance of one object from its nominal place, at most
SCALED = 0.2  # relative error of its size, at most
APART = 0.2  # least distance of the two objects of a pair along their relation
OVERLAP = 0.75  # least intersection over union of an object with the ideal shape of its area


@dataclass(frozen=True)
class Single:
    """One object."""

    colour: str
    shape: str
    size: str
    position: str


@dataclass(frozen=True)
class Pair:
    """Two objects of different colours; the relation holds from the first to the second."""

    colour: str
    shape: str
    relation: str
    other_colour: str
    other_shape: str


Spec = Single | Pair


@dataclass(frozen=True)
class ShapeExample(Example):
    """An image of the set, drawn when opened."""

    spec: Spec = field(kw_only=True)
    seed: int = field(kw_only=True)
    has_layout: bool = field(default=False, kw_only=True)

    def open(self) -> Image.Image:
        return render(self.spec, 64, self.seed)[0]

    def content_key(self) -> str:
        return hashlib.sha256(f"shapes {_VERSION} {self.spec} {self.seed}".encode()).hexdigest()

    @property
    def control_kinds(self) -> tuple[Control, ...]:
        return ("labels",) if self.has_layout else ()

    def open_control(self, kind: Control, size: tuple[int, int] | None = None) -> Image.Image | None:
        from .shape_layouts import LABELS, label_map  # which reads images by this module

        if kind not in self.control_kinds:
            return None
        return to_label_image(label_map(self.spec, size[0] if size else 64, self.seed), LABELS)

    def control_key(self, kind: Control) -> str:
        return self.content_key()


def all_specs() -> list[Spec]:
    """Return every spec, the 240 single ones first."""
    singles = [Single(c, s, z, p) for c in COLOURS for s in SHAPES for z in SIZES for p in POSITIONS]
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    pairs = [Pair(*a, relation, *b) for relation in RELATIONS for a in kinds for b in kinds if a[0] != b[0]]
    return [*singles, *pairs]


def is_held_out(spec: Spec) -> bool:
    """Return True for the specs that are never trained on: 1 in 6 single ones, 1 in 8 pairs.

    A sum of attribute numbers decides, so that the held-out specs are spread evenly over all attributes. A
    pair and the same pair described the other way round (a left of b, b right of a) fall on the same side.
    """
    colours, sizes = list(COLOURS), list(SIZES)
    positions, relations = list(POSITIONS), list(RELATIONS)
    if isinstance(spec, Single):
        size, position = sizes.index(spec.size), positions.index(spec.position)
        return (colours.index(spec.colour) + SHAPES.index(spec.shape) + 3 * size + position) % 6 == 0
    if spec.relation in ("right of", "below"):
        spec = reverse(spec)
    first = colours.index(spec.colour) + 3 * SHAPES.index(spec.shape)
    second = 2 * colours.index(spec.other_colour) + SHAPES.index(spec.other_shape)
    return (first + second + 2 * relations.index(spec.relation)) % 8 == 0


def reverse(spec: Pair) -> Pair:
    """Return the same image described from the second object."""
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    return Pair(spec.other_colour, spec.other_shape, opposite[spec.relation], spec.colour, spec.shape)


def caption(spec: Spec) -> str:
    """Return the caption of a spec; ``parse`` undoes it."""
    if isinstance(spec, Single):
        return f"a {spec.size} {spec.colour} {spec.shape} {POSITIONS[spec.position][2]}"
    return f"a {spec.colour} {spec.shape} {spec.relation} a {spec.other_colour} {spec.other_shape}"


def parse(text: str) -> Spec:
    """Return the spec that a caption describes.

    Raises:
        UserError: it is not a caption of this set.
    """
    words = " ".join(text.lower().split())
    colour, shape = "|".join(COLOURS), "|".join(SHAPES)
    where = {phrase: name for name, (_, _, phrase) in POSITIONS.items()}
    single = re.fullmatch(rf"a ({'|'.join(SIZES)}) ({colour}) ({shape}) ({'|'.join(where)})", words)
    if single:
        return Single(single[2], single[3], single[1], where[single[4]])
    pair = re.fullmatch(rf"a ({colour}) ({shape}) ({'|'.join(RELATIONS)}) a ({colour}) ({shape})", words)
    if pair and pair[1] != pair[4]:
        return Pair(*pair.groups())
    raise UserError(
        f"'{text}' is not a caption of shapes",
        "Write 'a small red circle on the left' or 'a red circle left of a blue square' (two colours).",
    )


def layout(spec: Spec) -> list[Placed]:
    """Return the objects of a spec in the order of the caption, without jitter."""
    if isinstance(spec, Single):
        x, y, _ = POSITIONS[spec.position]
        return [Placed(spec.colour, spec.shape, SIZES[spec.size], x, y)]
    (x, y, _), (other_x, other_y, _) = (POSITIONS[name] for name in RELATIONS[spec.relation])
    return [
        Placed(spec.colour, spec.shape, PAIR_SIZE, x, y),
        Placed(spec.other_colour, spec.other_shape, PAIR_SIZE, other_x, other_y),
    ]


def render(spec: Spec, resolution: int, seed: int | None = None) -> tuple[Image.Image, Tensor]:
    """Draw the image of a spec (square, RGB, antialiased); return the objects' masks (objects, H, W), bool, as well.

    Each object is moved by up to 1/32 of the side in both directions, drawn from ``seed``; without one, not at all.
    """
    generator = None if seed is None else np.random.default_rng(seed)
    items = layout(spec)
    if generator is not None:
        moves = generator.uniform(-JITTER, JITTER, (len(items), 2))
        items = [replace(o, x=o.x + dx, y=o.y + dy) for o, (dx, dy) in zip(items, moves, strict=True)]
    image, masks = draw(items, resolution)
    return image, torch.from_numpy(np.stack(masks))


def check(image: Image.Image | Tensor, text: str) -> bool:
    """Return whether an image (or a tensor (3, H, W) in [-1, 1]) shows its caption or class; see ``problem``."""
    return problem(image, text) is None


def problem(image: Image.Image | Tensor, text: str) -> str | None:
    """Return the reason why a square image does not show this caption or class; None when it does.

    All that the text says is checked: number of objects, colours, shapes, and for one object its size
    (half width within 20 %) and position (within 0.1 of the side), for two the relation (at least 0.2 of the
    side apart that way, and less than half of it across). For images of 32 px and more.

    Measured on every spec: clean images pass, and so do images blurred by a Gaussian of 0.9 pixels of 32 or with
    noise of standard deviation 30 of 255. Half-formed, two-coloured and additional objects are refused.
    """
    spec = None if text in CLASSES else parse(text)
    wanted = [CLASSES[text]] if spec is None else [(item.colour, item.shape) for item in layout(spec)]
    found = find_objects(to_pil(image) if isinstance(image, Tensor) else image)
    if isinstance(found, str):
        return found
    if len(found) != len(wanted):
        return f"{len(found)} objects instead of {len(wanted)}"
    by_colour = {item.colour: item for item in found}
    for colour, shape in wanted:
        seen = by_colour.get(colour)
        if seen is None:
            return f"nothing is {colour}"
        if seen.shape != shape or seen.overlap < OVERLAP:
            return f"the {colour} object is not a clear {shape}"
    if spec is None:
        return None
    if isinstance(spec, Single):
        return _misplaced(found[0], layout(spec)[0])
    first, second = by_colour[spec.colour], by_colour[spec.other_colour]
    return None if _related(first, second, spec.relation) else f"the first is not {spec.relation} the second"


def _misplaced(seen: Found, wanted: Placed) -> str | None:
    if abs(seen.half / wanted.half - 1) > SCALED:
        return f"the size is {seen.half / wanted.half:.0%} of what it should be"
    if np.hypot(seen.x - wanted.x, seen.y - wanted.y) > MOVED:
        return f"the object is at ({seen.x:.2f}, {seen.y:.2f}) instead of ({wanted.x}, {wanted.y})"
    return None


def _related(first: Found, second: Found, relation: str) -> bool:
    right, down = second.x - first.x, second.y - first.y
    along, across = (right, down) if relation in ("left of", "right of") else (down, right)
    if relation in ("right of", "below"):
        along = -along
    return along >= APART and abs(across) < along / 2


def train_source(
    condition: Literal["auto", "none", "class", "text"] = "auto", *, layouts: bool = False
) -> Source:
    """Return the training set: every spec that is not held out, single ones with 12 jitters each, pairs with one.

    With ``condition`` "class" only single objects, and "red circle" and the like as classes. With ``layouts`` every
    image has its exact label map as control image.
    """
    examples = []
    for spec in all_specs():
        if is_held_out(spec) or (condition == "class" and isinstance(spec, Pair)):
            continue
        text = caption(spec)
        label = f"{spec.colour} {spec.shape}" if isinstance(spec, Single) else None
        for seed in range(RENDERS_PER_SINGLE if isinstance(spec, Single) else 1):
            name = f"{text} {seed}"
            examples.append(ShapeExample(name, text, label, spec=spec, seed=seed, has_layout=layouts))
    notes = (
        f"the procedural set of shapes: {len(examples)} images; "
        f"{len(held_out_captions())} captions are held out, combinations that training never shows",
    )
    controls: dict[str, Any] = {}
    if layouts:
        from .shape_layouts import LABELS

        controls = {"control": ("labels",), "labels": LABELS}
    if condition == "class":
        classes = tuple(sorted({example.label for example in examples if example.label}))
        return Source("shapes", tuple(examples), "class", classes, notes, **controls)
    kind: Kind = "unconditional" if condition == "none" else "text"
    return Source("shapes", tuple(examples), kind, (), notes, **controls)


def train_captions() -> list[str]:
    """Return every caption of the training set, once."""
    return [caption(spec) for spec in all_specs() if not is_held_out(spec)]


def held_out_captions() -> list[str]:
    """Return every caption that is never trained on; neither is any other caption of the same image."""
    return [caption(spec) for spec in all_specs() if is_held_out(spec)]


_FOREGROUND = 115.0  # distance from white, in levels of 255: half of the palest colour's
_STRAY = 0.005  # specks of less than this share of the image are not objects
_GROUND = 60.0  # mean distance from white that the ground may have
_SAME_COLOUR = 68.0  # half the distance of the two closest colours
_UNIFORM = 0.8  # share of an object that must have its colour


@dataclass(frozen=True)
class Found(Placed):
    """An object as measured; ``overlap`` is its intersection over union with the ideal shape of its area, ``pixels``
    are those of the image (H, W) that it covers at least by half."""

    overlap: float
    pixels: Mask = field(repr=False, compare=False)


def find_objects(image: Image.Image) -> list[Found] | str:
    """Return the objects on the white ground of a square image, or the reason why it cannot be read.

    A colour is the median inside an object, half the width follows from the area under that colour's soft
    mask, and the shape is the one of the four that overlaps best when drawn with that area at its place.
    """
    read = read_objects(image)
    if isinstance(read, str):
        return read
    strange = next((item for item in read if isinstance(item, str)), None)
    return strange or [item for item in read if not isinstance(item, str)]


def read_objects(image: Image.Image) -> list[Found | str] | str:
    """Return each object on the white ground, or the reason why it cannot be read; or why none can.

    See `find_objects`.
    """
    from scipy import ndimage

    rgb = np.asarray(image.convert("RGB")).astype(np.float64)
    side = rgb.shape[0]
    from_white = np.linalg.norm(255 - rgb, axis=2)
    labels, count = ndimage.label(from_white > _FOREGROUND)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    kept = [label for label in range(1, count + 1) if sizes[label] >= _STRAY * side**2]
    if not kept:
        return "there is no object"
    # Distance of every pixel to the nearest object, and which that is.
    objects = np.where(np.isin(labels, kept), labels, 0)
    gap, (rows, columns) = ndimage.distance_transform_edt(objects == 0, return_indices=True)
    owner = objects[rows, columns]
    pixel = side / 32
    ground = from_white[gap > 2 * pixel]
    if ground.size == 0 or ground.mean() > _GROUND:
        return "the ground is not white"
    return [
        _identify(rgb, from_white, labels == label, (owner == label) & (gap <= 2 * pixel)) for label in kept
    ]


def _identify(rgb: Array, from_white: Array, mask: Mask, region: Mask) -> Found | str:
    """Return the object in ``mask``, whose soft edges lie in ``region``; or the reason why it is none."""
    side = rgb.shape[0]
    # The deepest two fifths are inside even where edges are soft and a cross is thin.
    core = rgb[mask & (from_white >= np.quantile(from_white[mask], 0.6))]
    colour = _colour(np.median(core, axis=0))
    if colour is None:
        return "an object has none of the colours"
    depth = 255 - np.array(COLOURS[colour], dtype=np.float64)
    soft = (255 - rgb) @ depth / (depth @ depth)
    # An edge is a blend of the colour and white; what is off that line is another colour.
    off = np.linalg.norm(255 - rgb - soft[:, :, None] * depth, axis=2)
    if (off[mask] < _SAME_COLOUR).mean() < _UNIFORM:
        return "an object has more than one colour"
    soft = np.clip(2 * (soft - 0.5) + 0.5, 0, 1) * region  # steeper edges undo some blur and noise
    area = soft.sum() / side**2
    grid = (np.arange(side) + 0.5) / side
    x, y = (soft.sum(axis=0) @ grid / soft.sum(), soft.sum(axis=1) @ grid / soft.sum())
    candidates = []
    for shape in SHAPES:
        half = float(np.sqrt(area / AREA[shape]))
        centre = y - SINK[shape] * half
        ideal_mask = coverage(shape, half, x, centre, side)
        overlap = np.minimum(soft, ideal_mask).sum() / np.maximum(soft, ideal_mask).sum()
        place = half, float(x), float(centre), float(overlap)
        candidates.append(Found(colour, shape, *place, pixels=soft >= 0.5))
    return max(candidates, key=lambda item: item.overlap)


def _colour(rgb: Array) -> str | None:
    distances = {name: float(np.linalg.norm(rgb - np.array(value))) for name, value in COLOURS.items()}
    name = min(distances, key=lambda colour: distances[colour])
    return name if distances[name] < _SAME_COLOUR else None
