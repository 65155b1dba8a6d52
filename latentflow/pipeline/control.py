"""Control images of a call: in any form that callers bring them, as a flow model takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..data.labels import NO_LABEL, read_label_ids
from ..errors import UserError, lookup
from ..families.model import FlowModel, Rows, Size
from .images import Images, read_images, sized_list

#: kind -> images (P, 3, H, W) in [0, 1] of kind "image", label maps (P, H, W) int64 of kind "labels"
Controls: TypeAlias = Mapping[str, Tensor]


def read_control(model: FlowModel, given: Images, size: Size) -> Controls:
    """Return the control images of a call by their kinds, at the size (height, width) of the images that are drawn.

    Args:
        given: images as `read_images` takes them, or label maps as `read_label_maps` does; of a checkpoint that takes
            both, or to name the kind, a dictionary of these by "image" and "labels", or a list of such, one for each.

    Raises:
        UserError: the checkpoint takes none, or not of this kind; they are no images or label maps, or differ in
            number.
    """
    model.check_image_input(given, fills=model.image_input == "mask", refers=True)
    kinds, given = model.control_kinds, by_kind(given)
    if not isinstance(given, Mapping):
        if len(kinds) > 1:
            raise UserError(
                f"control_image does not say of which kind it is, and this checkpoint takes {' and '.join(kinds)}",
                f"Name it: control_image={{'{kinds[0]}': ...}}.",
            )
        given = {kinds[0]: given}
    found = {}
    for kind, value in given.items():
        lookup(dict.fromkeys(kinds), kind, "kind of control image")
        if kind == "labels":
            found[kind] = read_label_maps(value, model.control_labels, size)
        else:
            found[kind] = read_images(value, *size, name="control_image")
    if not found:
        raise UserError("control_image is an empty dictionary", "Leave it out.")
    counts = {len(value) for value in found.values()}
    if len(counts - {1}) > 1:
        raise UserError("control images of each kind differ in number", "Pass as many of each, or one.")
    most = max(counts)
    return {kind: value.expand(most, *value.shape[1:]) for kind, value in found.items()}


def by_kind(given: Images) -> Images:
    """Return a list of dictionaries of control images as one dictionary of lists, and others as they are.

    Raises:
        UserError: the dictionaries do not name the same kinds.
    """
    if not isinstance(given, list) or not given or not all(isinstance(each, Mapping) for each in given):
        return given
    if any(each.keys() != given[0].keys() for each in given):
        raise UserError("control images of each kind differ in number", "Pass as many of each, or one.")
    return {kind: [each[kind] for each in given] for kind in given[0]}


def check_number(given: int, images: int) -> None:
    """Refuse another number of control images than one for all images, or one for each.

    Raises:
        UserError: says both numbers.
    """
    if given not in (1, images):
        raise UserError(f"{given} control images for {images} images", "Pass one for all, or one for each.")


def read_label_maps(maps: Images, labels: tuple[tuple[str, str], ...], size: Size) -> Tensor:
    """Return label maps as (N, H, W) int64, -1 = no label; resized to ``size`` by the nearest pixel.

    Args:
        maps: PIL images (palettes, ids, or the labels' colours; 255 = no label), or arrays or tensors ((B,) H, W) of
            whole numbers, -1 or 255 = no label; one, or a list.
        labels: that the checkpoint knows.

    Raises:
        UserError: no label maps; labels beyond those that are known.
    """
    rows = []
    for value in sized_list(maps, "control_image"):
        if isinstance(value, Image.Image):
            ids = torch.from_numpy(read_label_ids(value, labels).astype(np.int64))[None]
        else:
            ids = torch.as_tensor(value)
            if ids.ndim not in (2, 3) or ids.is_floating_point() or ids.is_complex() or not ids.numel():
                raise UserError(
                    f"control_image has shape {tuple(ids.shape)} and type {ids.dtype}",
                    "Label maps are PIL images, or whole numbers of shape ((B,) H, W).",
                )
            ids = ids.long().cpu().reshape(-1, *ids.shape[-2:])
        ids = torch.where(ids == NO_LABEL, -1, ids)
        rows.append(F.interpolate(ids[:, None].double(), size, mode="nearest-exact")[:, 0].long())
    layouts = torch.cat(rows)
    if not -1 <= int(layouts.min()) <= int(layouts.max()) < len(labels):
        raise UserError(
            f"control_image has labels from {int(layouts.min())} to {int(layouts.max())}",
            f"This checkpoint knows {len(labels)}, 0 to {len(labels) - 1}; 255 is a pixel without a label.",
        )
    return layouts


def add_control(rows: Rows, controls: Controls, scale: float | Mapping[str, float]) -> Rows:
    """Return the rows of control images that lead what is drawn, at a scale of all or of each kind: see
    `ControlledModel`.

    Raises:
        UserError: there is a scale of a kind of which there is no control image.
    """
    if isinstance(scale, Mapping):
        for kind in scale:
            lookup(controls, kind, "control_scale: kind of control image")
        of_each = [scale.get(kind, 1.0) for kind in controls]
        scale = of_each[0] if len({*of_each}) == 1 else dict(zip(controls, of_each, strict=True))
    model: Any = rows.model
    for kind, values in controls.items():
        moved = values.to(model.device)
        rows = (
            model.with_layout(rows, moved)
            if kind == "labels"
            else model.with_control(rows, 2.0 * moved - 1.0)
        )
    controlled: Rows = model.with_control_scale(rows, scale)
    return controlled
