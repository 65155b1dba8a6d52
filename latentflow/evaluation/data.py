"""The images that a checkpoint was trained on, those that it was not, and how they condition it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..config import ControlConfig, DataConfig, LoopConfig, control_kinds
from ..data import (
    LazyTable,
    Source,
    cached_pixels,
    caption_of_class,
    find_source,
    pixels_to_images,
    readable,
    split,
)
from ..data.sources.kinds import is_latent_folder
from ..errors import UserError, few
from ..families import FlowModel
from ..utils.files import read_yaml
from ..utils.flags import flag_of

#: Argument of the pipeline's call that takes the captions or class names; "nothing": the checkpoint takes neither.
ConditionKind = Literal["prompt", "class_labels", "nothing"]

#: Settings of a data set that a run reads it with.
DATA_SETTINGS = (
    "condition", "missing_caption", "masks", "columns", "colours", "control", "control_folder"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images with a caption or class name each.

    Attributes:
        images: (N, 3, H, W) in [-1, 1].
        captions: N; "" for an image that has neither caption nor class.
    """

    images: Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def rows(self, indices: list[int]) -> ImageSet:
        """Return the images of these indices."""
        return ImageSet(images=self.images[indices], captions=[self.captions[index] for index in indices])


def run_settings(checkpoint: str, data: str) -> dict[str, Any]:
    """Read how the run that ``checkpoint`` lies in read its data; settings that it does not name are the defaults.

    Raises:
        UserError: the run's config.yaml cannot be read, or a setting in it has the wrong type.
    """
    folder = Path(checkpoint)
    if not (folder / "config.yaml").is_file():  # the pipeline of a run, not the run
        folder = folder.parent
    file = folder / "config.yaml"
    fix = "Mend it, or move it away and give --validation and the like as the run had them."
    read = read_yaml(file, fix) if file.is_file() else {}
    run = read if isinstance(read, dict) else {}
    settings = {
        name: run.get(name, getattr(DataConfig, name, getattr(ControlConfig, name, {})))
        for name in ("validation", "background", *DATA_SETTINGS)
    }
    settings["stratify"] = run.get("stratify", not run)  # runs of before did not
    if run and "colours" not in run and not is_latent_folder(data):
        settings["colours"] = "stored"  # runs of before did not convert colour profiles
    settings["validation_seed"] = run.get("seed", LoopConfig.seed)
    types: dict[str, tuple[type, ...]] = {
        "validation": (int, float),
        "validation_seed": (int,),
        "columns": (dict,),
        "stratify": (bool,),
        "control": (str, list, tuple),
        "control_folder": (str, type(None)),
    }
    for name, value in settings.items():
        if not isinstance(value, types.get(name, (str,))):
            raise UserError(
                f"{file}: {'seed' if name == 'validation_seed' else name} is {value!r}",
                f"Mend it, or give {flag_of(name)}.",
            )
    return settings


def open_source(data: str, settings: Mapping[str, Any]) -> Source:
    """Open a data set as the run did, without the images that cannot be read."""
    wanted = {name: settings[name] for name in DATA_SETTINGS}
    if not control_kinds(settings["control"]) or not Path(data).expanduser().is_dir():
        wanted["control_folder"] = None
    return readable(find_source(data, **wanted))


def open_other(data: str, settings: Mapping[str, Any]) -> Source:
    """Open images of another kind, whose conditions are not asked for.

    Control images beside them are no images of the set, and are looked for in files alone.
    """
    has_files = Path(data).expanduser().is_dir() or data.lower().endswith(".zip")
    control = settings["control"] if has_files else ()
    return open_source(data, {**settings, "condition": "none", "control": control, "control_folder": None})


def condition_kind(model: FlowModel, source: Source) -> ConditionKind:
    """Return how the checkpoint is conditioned on what the data show.

    Raises:
        UserError: the data have classes that the checkpoint does not know by name, or captions or nothing where it
            takes classes.
    """
    if source.kind == "class" and model.takes_classes:
        present = {example.label or "" for example in source.examples}
        model.encode_class([name for name in source.classes if name in present])  # refuses unknown ones
        return "class_labels"
    if model.takes_text:
        return "prompt"
    if model.takes_classes:
        described = "captions" if source.kind == "text" else "no classes"
        raise UserError(
            f"the checkpoint takes classes ({few(model.classes)}), and {source.name} has {described}",
            "Give the images that it was trained on, or say where its classes are: --condition class.",
        )
    return "nothing"


def load_image_sets(
    model: FlowModel, source: Source, test: Source | None, settings: Mapping[str, Any]
) -> tuple[ImageSet, dict[str, ImageSet]]:
    """Load the training images, and those that were not trained on ("held_out", "test"), at the checkpoint's size.

    Args:
        test: a data set that was not trained on.
        settings: of `run_settings`; the share of ``source`` that is held out, its seed, and the background are used.

    Raises:
        UserError: nothing is held out and there is no ``test``; ``test`` conditions otherwise than ``source``; or all
            training images are equal.
    """
    validation, background = settings["validation"], settings["background"]
    seed, stratify = settings["validation_seed"], settings["stratify"]
    kept, held_out = split(source, validation, seed, stratify=stratify)
    if not held_out and test is None:
        raise UserError(
            f"--validation {validation} holds out no image",
            "Some figures need images that were not trained on: raise it, or give --test FOLDER.",
        )
    if test is not None and condition_kind(model, test) != condition_kind(model, source):
        raise UserError(
            f"{source.name} is a data set of kind '{source.kind}', and --test {test.name} one of kind '{test.kind}'",
            "Give a --test whose images have captions or classes as those of DATA have.",
        )
    train = load_images(model, labelled(source.subset(kept)), background)
    if len(train.images.flatten(1).unique(dim=0)) < 2:
        raise UserError(
            f"{source.name} holds {len(kept)} training images, all of them equal",
            "Nothing can be compared with one image: give at least two different ones beside what is held out.",
        )
    parts = {"held_out": source.subset(held_out)} if held_out else {}
    if test is not None:
        parts["test"] = test
    return train, {name: load_images(model, labelled(part), background) for name, part in parts.items()}


def labelled(source: Source) -> Source:
    """Return the images that have a class, where others of the data have none; else all."""
    if source.kind != "class":
        return source
    return source.subset([row for row, example in enumerate(source.examples) if example.label])


def held_out(source: Source, settings: Mapping[str, Any]) -> Source:
    """Return the part of a data set that the run held out; ``settings`` as in `load_image_sets`."""
    share, seed, stratify = (settings[name] for name in ("validation", "validation_seed", "stratify"))
    return labelled(source.subset(split(source, share, seed, stratify=stratify)[1]))


def load_images(model: FlowModel, source: Source, background: str) -> ImageSet:
    """Load images at the checkpoint's size, each with its caption or class, "" where it has none; for a checkpoint of
    captions classes are captions.

    Raises:
        UserError: the checkpoint does not say its size.
    """
    if source.kind == "text":
        captions = list(source.captions())
    elif source.kind == "class":
        captions = [example.label or "" for example in source.examples]
        if model.takes_text and not model.takes_classes:
            captions = [*map(caption_of_class, captions)]
    else:  # an example may have a label all the same
        captions = [""] * len(source)
    return ImageSet(images=pixels_to_images(load_pixels(model, source, background)[:]), captions=captions)


def load_pixels(model: FlowModel, source: Source, background: str) -> LazyTable:
    """Return the images at the checkpoint's size, uint8 (N, 3, H, W), read as they are indexed.

    Raises:
        UserError: the checkpoint does not say its size.
    """
    if model.native_size is None:
        raise UserError("this checkpoint does not say its size", "Evaluate one that latentflow has trained.")
    return cached_pixels(source, model.native_size, background)
