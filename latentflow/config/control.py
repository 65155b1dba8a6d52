"""Settings of control images: second images that lead what is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UserError


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """Control images (docs/guide/control.md).

    Raises:
        UserError: a setting is out of bounds or has no effect.
    """

    control: Literal["none", "image", "labels"] = "none"
    """Kind of control images that lead what is drawn: image (edges, depth, sketches), or labels (label maps: which
    thing is where). They are the metadata's control column, else cat-control.png beside cat.png."""
    control_folder: str | None = None
    """Folder of the control images, named like their images, in the place of those beside them."""
    control_labels: str | None = None
    """Text file of the labels of label maps, one per line in the order of their ids: a name, or a name and #rrggbb.
    Default: those of the label maps, called by their numbers."""
    control_dropout: float = 0.2
    """Share of the samples that are trained without their control image, so that the model also draws without."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.control_dropout < 1.0:
            raise UserError(f"--control-dropout is {self.control_dropout}", "Give a share from 0 to below 1.")
        if self.control_dropout != type(self).control_dropout and self.control == "none":
            raise UserError(
                "--control-dropout without --control", "Add --control image or labels, or leave it out."
            )
        if self.control_labels is not None and self.control != "labels":
            raise UserError("--control-labels without --control labels", "Add it, or leave this out.")
        if self.control_folder is not None and self.control == "none":
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
        if self.control == "none":
            return {}
        return {"control": {"kind": self.control, "dropout": self.control_dropout}}
