"""Settings of control images: second images that lead what is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import UserError, lookup

#: a kind of control images: "image" (edges, depth, sketches), or "labels" (label maps)
Control = Literal["image", "labels"]
#: all kinds, in the order in which a network takes them
CONTROLS: tuple[Control, ...] = get_args(Control)


def control_kinds(asked: str | Sequence[str]) -> tuple[Control, ...]:
    """Return the kinds of control images that are asked for, in the order of `CONTROLS`; none of "none".

    Raises:
        UserError: there is no such kind, or "none" is asked for beside another.
    """
    words = [asked] if isinstance(asked, str) else [*asked]
    for word in words:
        lookup(dict.fromkeys(("none", *CONTROLS)), word, "control")
    if "none" in words and len({*words}) > 1:
        raise UserError(f"--control {' '.join(words)}", "Leave none out.")
    return tuple(kind for kind in CONTROLS if kind in words)


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """Control images (docs/guide/control.md).

    Raises:
        UserError: a setting is out of bounds or has no effect.
    """

    control: tuple[Literal["none", "image", "labels"], ...] = ()
    """Kinds of control images that lead what is drawn: image (edges, depth, sketches), labels (label maps: which thing
    is where), or both. They are the metadata's column control (of both: control_image and control_labels), else
    cat-control.png beside cat.png (of both: cat-control-image.png and cat-control-labels.png)."""
    control_folder: str | None = None
    """Folder of the control images, named like their images, in the place of those beside them; of both kinds in its
    folders image and labels."""
    control_labels: str | None = None
    """Text file of the labels of label maps, one per line in the order of their ids: a name, or a name and #rrggbb.
    Default: those of the label maps, called by their numbers."""
    control_dropout: float = 0.2
    """Share of the samples that are trained without their control image, of each kind on its own, so that the model
    also draws without."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "control", control_kinds(self.control))
        if not 0.0 <= self.control_dropout < 1.0:
            raise UserError(f"--control-dropout is {self.control_dropout}", "Give a share from 0 to below 1.")
        if self.control_dropout != type(self).control_dropout and not self.control:
            raise UserError(
                "--control-dropout without --control", "Add --control image or labels, or leave it out."
            )
        if self.control_labels is not None and "labels" not in self.control:
            raise UserError("--control-labels without --control labels", "Add it, or leave this out.")
        if self.control_folder is not None and not self.control:
            raise UserError(
                "--control-folder without --control", "Say what it holds: --control image or labels."
            )

    def wanted(self) -> dict[str, Any]:
        """Return the keyword arguments of `find_source`."""
        return {"control": self.control, "control_folder": self.control_folder}

    def describe(self) -> dict[str, Any]:
        """Return the settings that must not change when a run is resumed; nothing of a run without control images.

        The labels are those of the network, and files may be moved.
        """
        if not self.control:
            return {}
        # A run of one kind says it in one word, as those of before did.
        return {"control": {"kind": " ".join(self.control), "dropout": self.control_dropout}}
