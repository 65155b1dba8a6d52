"""Images that a network takes beside the noise: to fill a hole, to draw under, or for a prompt to speak of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ..errors import UserError, shown

if TYPE_CHECKING:
    from .rows import Rows


class ImageInputMixin:
    """The part of a `FlowModel` that takes images. By default it takes none."""

    #: images beside the noise that the network draws from: those that a prompt speaks of, one that guides it, or one
    #: whose hole it fills
    image_input: Literal["none", "reference", "control", "mask"] = "none"
    #: it cannot draw without a reference
    needs_images: bool = False
    #: it draws at the size of the control image where nobody asks for a size, as its stock pipeline does
    sized_by_control: bool = False

    @property
    def takes_masks(self) -> bool:
        """True for a network that was trained to inpaint."""
        return False

    @property
    def control_kinds(self) -> tuple[str, ...]:
        """Kinds of the control images that the network takes: "image" (edges, depth, ...), "labels" (label maps)."""
        return ("image",) if self.image_input == "control" else ()

    @property
    def control_labels(self) -> tuple[tuple[str, str], ...]:
        """(name, "#rrggbb" or "") of each label of the label maps that it takes, in the order of their ids."""
        return ()

    def describe_condition(self) -> str:
        """Return what the checkpoint takes, as the second half of an error."""
        raise NotImplementedError

    def check_image_input(self, control: Any = None, fills: bool = False, refers: bool = False) -> None:
        """Refuse a call without the image that the network needs, or with a control image that it does not take.

        Args:
            control: the control image of the call; None = not given.
            fills: the call fills the hole of an image.
            refers: the prompts of the call draw from images.

        Raises:
            UserError: says what the checkpoint takes.
        """
        wrong = None
        if self.needs_images and not refers:
            wrong = "this checkpoint edits an image by instruction, and does nothing else"
        elif self.image_input == "mask" and not fills:
            wrong = "this checkpoint fills the hole of an image, and does nothing else"
        elif self.image_input == "control" and control is None:
            wrong = "this checkpoint draws under a control image, and none is given"
        elif not self.control_kinds and control is not None:
            wrong = "control_image is given, but this checkpoint takes no control image"
        if wrong:
            raise UserError(wrong, self.describe_condition())

    def with_known(self, rows: Rows, images: Tensor, masks: Tensor, known: Tensor | None = None) -> Rows:
        """See `Rows.with_known`.

        Args:
            known: latents (P, C, h, w) of the images with their holes hidden; default: made from them.
        """
        raise UserError("this checkpoint was not trained with masks", "Steer it: latentflow.flow.INPAINTING.")

    def with_control(self, rows: Rows, images: Tensor) -> Rows:
        """See `Rows.with_control`."""
        raise UserError("this checkpoint takes no control image", self.describe_condition())

    def with_layout(self, rows: Rows, layouts: Tensor) -> Rows:
        """Return the rows of label maps that control what is drawn.

        Args:
            layouts: (P, H, W) integers, -1 = no label; row b is of map b * P // B.
        """
        raise UserError("this checkpoint takes no label maps", self.describe_condition())

    def with_control_scale(self, rows: Rows, scale: float | Mapping[str, float]) -> Rows:
        """Return the rows with another strength of their control images; 1 is what the network has learnt."""
        if scale != 1.0:
            raise UserError(
                f"control_scale is {shown(scale)}, but this checkpoint does not draw without its control image",
                "Leave it out: the scale leads away from what is drawn without.",
            )
        return rows

    def known_latents(self, rows: Rows) -> Tensor:
        """Return the latents (B, C, h, w) of the images that `with_known` has added, their holes hidden."""
        raise UserError("these rows have no known images", "Add them: rows.with_known(images, masks).")
