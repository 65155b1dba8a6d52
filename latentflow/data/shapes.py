"""A procedural captioned data set: coloured shapes on white, and an exact checker of generated pictures.

One object, "a small red circle on the left" (6 colours x 4 shapes x 2 sizes x 5 positions = 240 captions), or
two of different colours and middle size, "a red circle left of a blue square" (4 relations, 1,920 captions,
of which two describe each picture: "left of" and "right of"). Lengths are shares of the side: any resolution
works.

Held out from training are 40 single captions and 240 pair captions (``is_held_out``), chosen so that any two
attributes still occur together in training: a model that gets them right has learnt to combine.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentflow.errors import UserError

from .examples import Example, Source
from .read import to_pil
from .shape_drawing import COLOURS, SHAPES, Placed, draw
from .shape_finding import Found, find_objects

SIZES = {"small": 0.15, "large": 0.23}  # half the width of the shape, as a share of the picture's side
PAIR_SIZE = 0.16
POSITIONS = {  # centre (x, y) as shares of the side, y downwards; and the words for it
    "centre": (0.5, 0.5, "in the centre"),
    "left": (0.27, 0.5, "on the left"),
    "right": (0.73, 0.5, "on the right"),
    "top": (0.5, 0.27, "at the top"),
    "bottom": (0.5, 0.73, "at the bottom"),
}
RELATIONS = {  # where the first and the second object are
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
JITTER = 1 / 32
RENDERS_PER_SINGLE = 12
_VERSION = 1  # raise it when the same spec and seed look different

MOVED = 0.1  # where one object may be, from its nominal place
SCALED = 0.2  # how far half its width may be off, as a share of it
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
    """A picture of the set, drawn when opened."""

    spec: Spec = field(kw_only=True)
    seed: int = field(kw_only=True)

    def open(self) -> Image.Image:
        return render(self.spec, 64, self.seed)[0]

    def content_key(self) -> str:
        return hashlib.sha256(f"shapes {_VERSION} {self.spec} {self.seed}".encode()).hexdigest()


def all_specs() -> list[Spec]:
    """Every spec, the 240 single ones first."""
    singles = [Single(c, s, z, p) for c in COLOURS for s in SHAPES for z in SIZES for p in POSITIONS]
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    pairs = [Pair(*a, relation, *b) for relation in RELATIONS for a in kinds for b in kinds if a[0] != b[0]]
    return [*singles, *pairs]


def is_held_out(spec: Spec) -> bool:
    """True for the specs that are never trained on: 1 in 6 single ones, 1 in 8 pairs.

    A sum of attribute numbers decides, so that the held-out specs are spread evenly over all attributes. A
    pair and the same pair told the other way round (a left of b, b right of a) fall on the same side.
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
    """The same picture told from the second object."""
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    return Pair(spec.other_colour, spec.other_shape, opposite[spec.relation], spec.colour, spec.shape)


def caption(spec: Spec) -> str:
    """The caption of a spec; ``parse`` undoes it."""
    if isinstance(spec, Single):
        return f"a {spec.size} {spec.colour} {spec.shape} {POSITIONS[spec.position][2]}"
    return f"a {spec.colour} {spec.shape} {spec.relation} a {spec.other_colour} {spec.other_shape}"


def parse(text: str) -> Spec:
    """The spec that a caption describes.

    Raises:
        UserError: it is no caption of this set.
    """
    words = " ".join(text.lower().split())
    colour, shape = "|".join(COLOURS), "|".join(SHAPES)
    where = {phrase: name for name, (_, _, phrase) in POSITIONS.items()}
    one = re.fullmatch(rf"a ({'|'.join(SIZES)}) ({colour}) ({shape}) ({'|'.join(where)})", words)
    if one:
        return Single(one[2], one[3], one[1], where[one[4]])
    two = re.fullmatch(rf"a ({colour}) ({shape}) ({'|'.join(RELATIONS)}) a ({colour}) ({shape})", words)
    if two and two[1] != two[4]:
        return Pair(two[1], two[2], two[3], two[4], two[5])
    raise UserError(
        f"'{text}' is no caption of shapes",
        "Write 'a small red circle on the left' or 'a red circle left of a blue square' (two colours).",
    )


def layout(spec: Spec) -> list[Placed]:
    """The objects of a spec in the order of the caption, without jitter."""
    if isinstance(spec, Single):
        x, y, _ = POSITIONS[spec.position]
        return [Placed(spec.colour, spec.shape, SIZES[spec.size], x, y)]
    (x, y, _), (other_x, other_y, _) = (POSITIONS[name] for name in RELATIONS[spec.relation])
    return [
        Placed(spec.colour, spec.shape, PAIR_SIZE, x, y),
        Placed(spec.other_colour, spec.other_shape, PAIR_SIZE, other_x, other_y),
    ]


def render(spec: Spec, resolution: int, seed: int | None = None) -> tuple[Image.Image, Tensor]:
    """The picture of a spec (square, RGB, antialiased) and the mask of each object, (objects, H, W) bool.

    Each object is moved by up to 1/32 of the side in both directions, drawn from ``seed``; not without one.
    """
    generator = None if seed is None else np.random.default_rng(seed)
    items = layout(spec)
    if generator is not None:
        moves = generator.uniform(-JITTER, JITTER, (len(items), 2))
        items = [replace(o, x=o.x + dx, y=o.y + dy) for o, (dx, dy) in zip(items, moves, strict=True)]
    image, masks = draw(items, resolution)
    return image, torch.from_numpy(np.stack(masks))


def check(image: Image.Image | Tensor, text: str) -> bool:
    """Whether a picture (or a tensor (3, H, W) in [-1, 1]) shows what the caption says; see ``problem``."""
    return problem(image, text) is None


def problem(image: Image.Image | Tensor, text: str) -> str | None:
    """What is wrong with a square picture for this caption; None when it is right.

    All that the caption says is checked: number of objects, colours, shapes, and for one object its size
    (half width within 20 %) and position (within 0.1 of the side), for two the relation (at least 0.2 of the
    side apart that way, and less than half of it across). For pictures of 32 px and more.

    Measured on every spec: no clean picture is refused, nor one blurred by a Gaussian of 0.9 pixels of 32 or
    with noise of standard deviation 30 of 255. Half-formed, two-coloured and additional objects are refused.
    """
    spec = parse(text)
    found = find_objects(to_pil(image) if isinstance(image, Tensor) else image)
    if isinstance(found, str):
        return found
    wanted = layout(spec)
    if len(found) != len(wanted):
        return f"{len(found)} objects instead of {len(wanted)}"
    by_colour = {item.colour: item for item in found}
    for item in wanted:
        seen = by_colour.get(item.colour)
        if seen is None:
            return f"nothing is {item.colour}"
        if seen.shape != item.shape or seen.overlap < OVERLAP:
            return f"the {item.colour} object is no clear {item.shape}"
    if isinstance(spec, Single):
        return _misplaced(found[0], wanted[0])
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


def train_source(condition: Literal["auto", "none", "class", "text"] = "auto") -> Source:
    """The training set: every spec that is not held out, single ones with 12 jitters each, pairs with one.

    With ``condition`` "class" only single objects, and "red circle" and the like as classes.
    """
    examples = []
    for spec in all_specs():
        if is_held_out(spec) or (condition == "class" and isinstance(spec, Pair)):
            continue
        text = caption(spec)
        label = f"{spec.colour} {spec.shape}" if isinstance(spec, Single) else None
        for seed in range(RENDERS_PER_SINGLE if isinstance(spec, Single) else 1):
            examples.append(ShapeExample(f"{text} {seed}", text, label, spec=spec, seed=seed))
    notes = (
        f"the procedural set of shapes: {len(examples)} pictures; "
        f"{len(held_out_captions())} captions are held out, combinations that training never shows",
    )
    if condition == "class":
        classes = tuple(sorted({example.label for example in examples if example.label}))
        return Source("shapes", tuple(examples), "class", classes, notes)
    return Source("shapes", tuple(examples), "unconditional" if condition == "none" else "text", (), notes)


def train_captions() -> list[str]:
    """Every caption of the training set, once."""
    return [caption(spec) for spec in all_specs() if not is_held_out(spec)]


def held_out_captions() -> list[str]:
    """Every caption that is never trained on; neither is any other caption of the same picture."""
    return [caption(spec) for spec in all_specs() if is_held_out(spec)]
