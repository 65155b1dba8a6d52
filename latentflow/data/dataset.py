"""One image with its annotations (`Example`), and a set of them (`Source`)."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError, plural
from ..utils.names import composed
from ..utils.progress import progress_bar
from .cache.store import Array, ShardSet, open_cache
from .images import Profile, decode_image, decoding, key_and_profile, name_of, open_image, to_rgb
from .masks import alpha_mask, read_mask, without_alpha
from .sources.files import File, file_key

if TYPE_CHECKING:
    from ..config import Control, DataConfig
    from .labels import Labels

Kind = Literal["text", "class", "unconditional"]
Colours = Literal["srgb", "stored"]


def hash_text(text: str) -> str:
    """Return the hexadecimal hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


NO_CLASS = -1  # id of images without a class among others that have one


@dataclass(frozen=True)
class Example(ABC):
    """One image with its annotations.

    Attributes:
        name: unique in its source.
        text: the caption, the first of several; None where unknown.
        label: the class; None where unknown.
        mask: the file of the user's own mask, the image's own file where its alpha channel is the mask; or None.
        texts: further captions of the image, of which each use draws one.
        weight: factor on the image's loss.
        repeats: number of times that an epoch uses it.
        controls: kind and file of each of its control images.
    """

    name: str
    text: str | None = None
    label: str | None = None
    mask: File | None = field(default=None, kw_only=True)
    texts: tuple[str, ...] = field(default=(), kw_only=True)
    weight: float = field(default=1.0, kw_only=True)
    repeats: int = field(default=1, kw_only=True)
    controls: tuple[tuple[Control, File], ...] = field(default=(), kw_only=True)

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions, the first one first; empty where there is none."""
        return () if self.text is None else (self.text, *self.texts)

    @property
    def centering(self) -> tuple[float, float]:
        """Position of the part that is used of an image that is too long, in [0, 1] from left and from top."""
        return 0.5, 0.5

    @abstractmethod
    def open(self) -> Image.Image:
        """Return the image as it was made, in any mode and size (``read_image`` prepares it for a network)."""

    @abstractmethod
    def content_key(self) -> str:
        """Return the hexadecimal hash of what the image shows; another image of the same name has another one."""

    def profile(self) -> Profile | None:
        """Return the image's colour profile where it has another than sRGB."""
        return None

    def key_and_conversion(self) -> tuple[str, bool]:
        """Return ``content_key``, and whether its colours are converted: its pixels are then not those of its file."""
        return self.content_key(), False

    def pixel_key(self) -> str:
        """Return the hash of what its pixels are made of: ``content_key``, and the conversion of its colours."""
        key, is_converted = self.key_and_conversion()
        return hash_text(f"in sRGB {key}") if is_converted else key

    def open_mask(self) -> Image.Image | None:
        """Return the user's own mask, upright at its own size (mode "L", 255 = repaint); None where there is none.

        Raises:
            UserError: the file is not a mask or cannot be read.
        """
        return None if self.mask is None else read_mask(decode_image(self.mask))

    def mask_key(self) -> str:
        """Return the hexadecimal hash of the mask's file, "" where there is none."""
        return "" if self.mask is None else file_key(self.mask)

    def masked_key(self) -> str | None:
        """Return a key of the mask as it lies on the image, whose size decides that; None where there is no mask."""
        return None if self.mask is None else f"{self.content_key()} {self.mask_key()}"

    @property
    def control_kinds(self) -> tuple[Control, ...]:
        """The kinds of the control images that the image comes with."""
        return tuple(kind for kind, _ in self.controls)

    def open_control(self, kind: Control, size: tuple[int, int] | None = None) -> Image.Image | None:
        """Return the control image of a kind, upright in its own mode; None where there is none.

        Args:
            size: (width, height) that it will be brought to, for one that is drawn; of a file it is its own.

        Raises:
            UserError: the file cannot be read.
        """
        if kind not in self.control_kinds:
            return None
        image = decode_image(dict(self.controls)[kind])
        with decoding(name := name_of(image)):
            turned = ImageOps.exif_transpose(image)
        turned.filename, turned.format = name, image.format  # type: ignore[attr-defined]  # for later messages
        return turned

    def control_key(self, kind: Control) -> str:
        """Return the hexadecimal hash of the control image of a kind, which there is."""
        return file_key(dict(self.controls)[kind])

    def layout_key(self) -> str | None:
        """Return a key of the label map as it is cut with its image; None where there is none."""
        return (
            f"{self.content_key()} {self.control_key('labels')}" if "labels" in self.control_kinds else None
        )


@dataclass(frozen=True)
class FileExample(Example):
    """An image in a file, or in a member of an archive or a table; its key is the hash of the file's bytes.

    Where the alpha channel is the mask, ``open`` shows the colours beneath transparent parts. ``colours`` "stored"
    ignores the colour profile.
    """

    path: File = field(kw_only=True)
    colours: Colours = field(default="srgb", kw_only=True)

    def open(self) -> Image.Image:
        image = open_image(self.path)
        if self.colours == "stored":
            image.info.pop("icc_profile", None)
        return without_alpha(image) if self._alpha_is_mask else image

    def profile(self) -> Profile | None:
        return key_and_profile(self.path)[1]

    def open_mask(self) -> Image.Image | None:
        return alpha_mask(decode_image(self.path)) if self._alpha_is_mask else super().open_mask()

    def content_key(self) -> str:
        return self.key_and_conversion()[0]

    def key_and_conversion(self) -> tuple[str, bool]:
        key, profile = key_and_profile(self.path)
        if self._alpha_is_mask:  # with and without its alpha channel an image looks different
            key = hash_text(f"without alpha {key}")
        return key, self.colours == "srgb" and profile is not None and not profile.problem

    @property
    def _alpha_is_mask(self) -> bool:
        return self.mask == self.path


class StoredSizes(NamedTuple):
    """The sizes of N images that are stored.

    Attributes:
        sizes: the (height, width) in pixels that there are.
        bucket: (N,), each image's among ``sizes``.
        natural: (N, 2), heights and widths of the images as they were.
    """

    sizes: tuple[tuple[int, int], ...]
    bucket: Array
    natural: Array


@dataclass(frozen=True)
class Source:
    """A set of images and the annotations that a model of them is conditioned on.

    Attributes:
        name: as the user called it.
        examples: in a fixed order (by name).
        kind: "text" (every ``text`` is a string), "class" (every ``label`` is in ``classes``, or None: trained on
            without a condition) or "unconditional".
        classes: class names in order of their ids; empty unless ``kind`` is "class".
        notes: lines on what was inferred or left out, to be printed before training.
        root: the folder, None for a procedural set. Nothing is ever written below it.
        control: the kinds of the control images.
        labels: of label maps, in the order of their ids.
        balanced: training uses all classes equally often; see `with_balanced_classes`.
    """

    precomputed: ClassVar[bool] = False  # True: images were checked, and latents stored, when it was made

    name: str
    examples: tuple[Example, ...]
    kind: Kind
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    root: Path | None = None
    control: tuple[Control, ...] = ()
    labels: Labels = ()
    balanced: bool = False

    def __len__(self) -> int:
        return len(self.examples)

    def spread(self, count: int) -> list[int]:
        """Return up to ``count`` examples that show what there is, by index, ascending.

        There are equally many of each part (see `strata`) while it has any, evenly spaced in it; of more parts than
        ``count`` there is one of each of some, which are evenly spaced too.
        """
        strata = self.strata()
        names = sorted({*strata})
        chosen = (
            {names[number * len(names) // count] for number in range(count)}
            if len(names) > count
            else {*names}
        )
        sizes, seen = Counter(strata), Counter[str]()
        turns: list[tuple[float, int]] = []
        for index, name in enumerate(strata):
            if name in chosen:
                # Halving the gaps again and again spreads any first few of a part over all of it.
                bits = max(1, (sizes[name] - 1).bit_length())
                reversed_bits = f"{seen[name]:0{bits}b}"[::-1]
                turns.append((int(reversed_bits, 2) * sizes[name] / 2**bits, index))
                seen[name] += 1
        return sorted(index for _, index in sorted(turns)[:count])

    def captions(self) -> list[str]:
        """Return the first caption of every example ("" where there is none): previews and evaluation use it."""
        return [captions[0] for captions in self.all_captions()]

    def all_captions(self) -> list[tuple[str, ...]]:
        """Return all captions of every example, ("",) where there is none: each use in training draws one."""
        return [example.captions or ("",) for example in self.examples]

    def uses(self) -> list[int]:
        """Return the examples that one epoch uses, by index: each as often as its ``repeats`` say, those of a class
        that has fewer than another more often where classes are ``balanced``."""
        uses: list[int] = np.repeat(np.arange(len(self)), self.repeats()).tolist()
        return uses

    def repeats(self) -> Array:
        """Return how often an epoch uses each example, (N,)."""
        repeats = self.own_repeats()
        return _balanced(repeats, np.asarray(self.class_ids())) if self.balanced else repeats

    def with_balanced_classes(self) -> Source:
        """Return the same set with an epoch that uses each class as often as the most frequent one, and each image of a
        class as often as the others, to within one use. Those without a class are used as before.

        Raises:
            UserError: there are no classes, or one.
        """
        present = {*self.class_ids()} - {NO_CLASS} if self.kind == "class" else set()
        if len(present) < 2:
            found = plural(len(present), "class") if present else "no classes"
            raise UserError(f"--balance-classes: the images to train on have {found}", "Leave it out.")
        return dataclasses.replace(self, balanced=True)

    def own_repeats(self) -> Array:
        """Return the ``repeats`` of every example, (N,)."""
        return np.array([example.repeats for example in self.examples], dtype=np.int32)

    def weights(self) -> list[float]:
        """Return the factor on every example's loss."""
        return [example.weight for example in self.examples]

    @property
    def has_masks(self) -> bool:
        """True where any image comes with a mask."""
        return any(example.mask is not None for example in self.examples)

    def once(self) -> Source:
        """Return the same set without repeats, to measure on."""
        examples = self.examples
        if any(example.repeats != 1 for example in examples):
            examples = tuple(dataclasses.replace(example, repeats=1) for example in examples)
        return dataclasses.replace(self, examples=examples, balanced=False)

    def class_ids(self) -> list[int]:
        """Return the class id of every example, `NO_CLASS` of one that has none; only for ``kind`` "class"."""
        ids = {name: index for index, name in enumerate(self.classes)}
        ids = {composed(name): index for name, index in ids.items()} | ids
        labels = (example.label for example in self.examples)
        return [
            NO_CLASS if not label else ids[label if label in ids else composed(label)] for label in labels
        ]

    def content_keys(self) -> Iterable[str]:
        examples = progress_bar(self.examples, desc="reading files", delay=3, leave=False)
        return [example.content_key() for example in examples]

    def strata(self) -> Sequence[str]:
        """Return the part of the set that each example belongs to, for a split that takes its share of every part.

        That is its class. An unconditional set has none: there it is the first folder in the example's name.
        """
        if self.kind == "unconditional":
            return [top_folder(example.name) for example in self.examples]
        return [example.label or "" for example in self.examples]

    def pixel_keys(self) -> Iterable[str]:
        return [example.pixel_key() for example in self.examples]

    def masked_keys(self) -> Iterator[str | None]:
        return (example.masked_key() for example in self.examples)

    def layout_keys(self) -> Iterator[str | None]:
        return (example.layout_key() for example in self.examples)

    def fingerprint(self) -> str:
        """Return a hash of all images and annotations, whatever their names and order: it tells changed data."""
        rows = sorted(_describe(example) for example in self.examples)
        return hash_text("\n".join([self.kind, *self.classes, *rows]))

    def order(self) -> str:
        """Return a hash of the same in this order, whatever the names: it tells which image has which index."""
        return hash_text("\n".join(hash_text(_describe(example)) for example in self.examples))

    def subset(self, indices: list[int]) -> Source:
        """Return the examples at ``indices``, with the same classes."""
        return dataclasses.replace(self, examples=tuple(self.examples[i] for i in indices))

    # ---- overridden by data that were precomputed ----

    @property
    def autoencoder(self) -> str | None:
        """The folder of the autoencoder that encoded them."""
        return None

    def shards(self, kind: str, settings: dict[str, object]) -> ShardSet:
        """Return the set of shards that holds what is made of the images: ``kind`` is latents, pixels or masks.

        Raises:
            UserError: precomputed data hold nothing of the kind, or made with other settings; the cache would lie
                inside the data.
        """
        return open_cache(kind, settings, self.root)

    def stored_sizes(self) -> StoredSizes | None:
        """Return how the images were cut; None where that is still to be decided."""
        return None

    def groups(self) -> Array | None:
        """Return the number of each image's group of near duplicates, (N,); None where it is not known."""
        return None

    def damage(self) -> list[str]:
        """Read all that is stored, and return what is missing or not what was written, a line each."""
        return []

    def adopt(self, data: DataConfig) -> DataConfig:
        """Return the settings with those that were decided when the data were precomputed: resolution and background.

        Raises:
            UserError: other ones were asked for, or mirror images, which are not there.
        """
        return data

    def refuse_decided(self, flag: str) -> None:
        """Raise UserError where ``flag`` was decided when the data were precomputed."""

    def noted(self, *notes: str) -> Source:
        """Return the same set with more notes."""
        return dataclasses.replace(self, notes=(*self.notes, *notes))


def _balanced(repeats: Array, classes: Array) -> Array:
    """Return the repeats (N,) with those of each class raised to the sum of the largest."""
    raised, numbers = repeats.copy(), np.unique(classes[classes != NO_CLASS])
    sums = [int(repeats[classes == number].sum()) for number in numbers]
    for number, own in zip(numbers, sums, strict=True):
        rows = np.flatnonzero(classes == number)
        ends = np.cumsum(repeats[rows], dtype=np.int64) * max(sums) // own
        raised[rows] = np.diff(ends, prepend=0)
    return raised


def caption_of_class(name: str) -> str:
    """Return the name of a class as a caption, with spaces for underscores."""
    return " ".join(name.replace("_", " ").split())


def top_folder(name: str) -> str:
    """Return the first folder in an example's name, equal for all Unicode spellings of it; "" where it is in none."""
    return composed(name.rpartition("/")[0].split("/")[0])


def _describe(example: Example) -> str:
    """Return all of an example but its name. Hashes in users' checkpoints are of these words."""
    key, is_converted = example.key_and_conversion()
    parts = [key, example.text, example.label]
    if mask := example.mask_key():
        parts.append(mask)
    kinds = example.control_kinds
    parts += [f"control {example.control_key(kind)}" + f" of {kind}" * (len(kinds) > 1) for kind in kinds]
    if is_converted:
        parts.append("in sRGB")
    parts += [f"or {text}" for text in example.texts]
    if example.weight != 1:
        parts.append(f"weight {example.weight}")
    if example.repeats != 1:
        parts.append(f"repeats {example.repeats}")
    return "\0".join(map(str, parts))


def with_tag_orders(source: Source, orders: int, keep: int) -> Source:
    """Return the source with captions in up to ``orders`` orders of their comma-separated tags.

    The first ``keep`` tags stay in place. The caption as it is written comes first; each use of the image
    draws one, as of several captions. The orders depend on the caption only.

    Raises:
        UserError: a number is out of range; the source has no captions, or none with tags to shuffle.
    """
    if orders < 0 or keep < 0 or orders == 1:
        raise UserError(
            f"--shuffle-tags {orders} --keep-tags {keep}",
            "Give the number of orders of each caption, at least 2, and that of the tags that stay first, at least 0.",
        )
    if orders == 0:
        if keep:
            raise UserError(f"--keep-tags {keep} without --shuffle-tags", "Add --shuffle-tags 8.")
        return source
    source.refuse_decided(f"--shuffle-tags {orders}")
    if source.kind != "text":
        raise UserError(f"--shuffle-tags {orders}: {source.name} has no captions", "Leave it out.")
    examples, changed = [], 0
    for example in source.examples:
        first, *more = (text for caption in example.captions for text in _orders(caption, orders, keep))
        changed += len(more) > len(example.texts)
        examples.append(dataclasses.replace(example, text=first, texts=tuple(more)))
    if not changed:
        raise UserError(
            f"--shuffle-tags {orders}: no caption of {source.name} has tags to shuffle",
            "Tags are separated by commas: `cat, sitting, outdoors`. Or leave it out.",
        )
    kept = f", the first {keep} in place" if keep else ""
    note = f"tags of {changed} images in up to {orders} orders of each caption{kept}"
    return dataclasses.replace(source, examples=tuple(examples)).noted(note)


def _orders(caption: str, orders: int, keep: int) -> list[str]:
    """Return the caption and other orders of its tags; fewer than ``orders`` where there are not as many."""
    tags = [tag for part in caption.split(",") if (tag := part.strip())]
    rest, texts = tags[keep:], [caption]
    generator = random.Random(caption)  # the same in every process, which a hash of the text is not
    for _ in range(orders - 1):
        generator.shuffle(rest)
        text = ", ".join([*tags[:keep], *rest])
        if text != ", ".join(tags) and text not in texts:
            texts.append(text)
    return texts


def read_image(example: Example, resolution: int | tuple[int, int], background: str = "white") -> Image.Image:
    """Return the example as an RGB image of ``resolution`` (a side, or (height, width)).

    EXIF rotation is applied, colours are converted to sRGB by the profile, transparency is composited on
    ``background``, any mode is converted; then the largest part of the right shape, at the example's ``centering``, is
    resized, antialiased.

    Raises:
        UserError: ``background`` is not a colour; the image cannot be decoded.
    """
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    with example.open() as image:
        rgb = to_rgb(image, background)
    return ImageOps.fit(rgb, (width, height), method=Image.Resampling.LANCZOS, centering=example.centering)


def read_own_mask(example: Example, resolution: int | tuple[int, int]) -> Image.Image | None:
    """Return the example's own mask, registered with ``read_image``: mode "L", 0 or 255. None where it has none.

    A mask of another size than its image is brought to that first; every resize takes the nearest pixel.

    Raises:
        UserError: the mask's file is not a mask or cannot be read.
    """
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    mask = example.open_mask()
    if mask is None:
        return None
    with example.open() as image, decoding(name_of(image)):
        size = ImageOps.exif_transpose(image).size
    nearest = Image.Resampling.NEAREST
    whole = mask.resize(size, nearest)
    fitted = ImageOps.fit(whole, (width, height), method=nearest, centering=example.centering)
    return fitted.point(lambda level: 255 * (level >= 128))
