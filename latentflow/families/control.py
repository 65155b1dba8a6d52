"""Flow models that draw under control images and, as a part of the samples was trained so, without them as well."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .. import flow
from ..errors import UserError
from ..models import ControlInputs
from .model import FlowModel, Rows
from .rows import Values, check_counts, keep

#: kind of control images -> what rows keep of them
KEPT = {"image": "control", "labels": "layout"}
CONTROL = {*KEPT.values()}


class ControlledModel(FlowModel):
    """The part of a flow model that takes control images, if it takes any.

    Its rows keep control (B, C, h, w), the latents of images; layout (B, H, W), label maps; and control_scale
    (B, 1, 1, 1), or (B, 2, 1, 1) where they have one of each kind.
    """

    @property
    @abstractmethod
    def control_inputs(self) -> ControlInputs:
        """The control images that the network takes."""

    @property
    def control_kinds(self) -> tuple[str, ...]:
        """Kinds of the control images that the network takes, all of which it also draws without."""
        return self.control_inputs.kinds or super().control_kinds

    @property
    def control_labels(self) -> tuple[tuple[str, str], ...]:
        """(name, "#rrggbb" or "") of each label of the label maps that it takes, in the order of their ids."""
        return self.control_inputs.labels

    def with_control(self, rows: Rows, images: Tensor) -> Rows:
        """See `Rows.with_control`."""
        if not self.control_inputs.image:
            return super().with_control(rows, images)
        check_counts(rows, images)
        return keep(rows, control=self.encode(images.to(self.device)))

    def with_layout(self, rows: Rows, layouts: Tensor) -> Rows:
        """See `ImageInputMixin.with_layout`.

        Raises:
            UserError: the network takes no label maps; numbers of maps and rows that do not fit; labels beyond those
                that the network knows.
        """
        if not self.control_inputs.labels:
            return super().with_layout(rows, layouts)
        check_counts(rows, layouts[:, None])
        if not -1 <= int(layouts.min()) <= int(layouts.max()) < len(self.control_labels):
            raise UserError(
                f"the label maps have labels from {int(layouts.min())} to {int(layouts.max())}",
                f"This checkpoint knows 0 to {len(self.control_labels) - 1}; -1 is a pixel without a label.",
            )
        return keep(rows, layout=layouts.to(self.device))

    def with_control_scale(self, rows: Rows, scale: float | Mapping[str, float]) -> Rows:
        """Return the rows with guidance over their control images: 0 leaves them out, 1 is what was learnt.

        Args:
            scale: of all of them, or kind -> that of its; 1 of those that are not named.

        Two guidance scales, w over the condition c (``guidance_scale``) and s over the control images, lead to

            V(null) + w (V(c) - V(null)),    V(c) = v(c, without) + s (v(c, control) - v(c, without))

        where v is the network's velocity. More than 1 follows them harder; every s but 0 and 1 doubles the evaluations.
        With a scale s1 of one kind, and a smaller one s2 of the other,

            V(c) = v(c, without) + s1 (v(c, first) - v(c, without)) + s2 (v(c, both) - v(c, first))

        which is the above where they are equal, and leaves the second out at 0; it triples the evaluations.
        """
        if scale == 1.0:
            return rows
        if not self.control_inputs.kinds:
            return super().with_control_scale(rows, scale)
        named: Mapping[str, float] = scale if isinstance(scale, Mapping) else dict.fromkeys(KEPT, scale)
        scales = {kind: named.get(kind, 1.0) for kind, name in KEPT.items() if name in rows.kept}
        rows = _without(rows, {KEPT[kind] for kind, value in scales.items() if value == 0.0})
        values = [value for value in scales.values() if value != 0.0]
        if len({*values}) <= 1:
            values = values[:1]
        if values in ([], [1.0]):
            return rows
        return keep(rows, control_scale=torch.tensor(values, device=self.device).reshape(1, -1, 1, 1))

    def _bound(self, rows: Rows, times: Tensor | None, scale: float) -> flow.Velocity:
        """Return the velocity under ``rows`` alone; with a scale of their control images, see `with_control_scale`."""
        kept = dict(rows.kept)
        strength = kept.pop("control_scale", None)
        under = super()._bound(replace(rows, kept=kept), times, scale)
        if not isinstance(strength, Tensor):
            return under
        without = super()._bound(_without(rows, {*CONTROL, "control_scale"}), times, scale)
        if strength.shape[1] == 1:
            return lambda x, t: torch.lerp(without(x, t), under(x, t), strength.to(x))
        first = super()._bound(replace(rows, kept=_under_the_stronger(kept, strength)), times, scale)

        def guided(x: Tensor, t: Tensor) -> Tensor:
            scales, led = strength.to(x), first(x, t)
            alone = torch.lerp(without(x, t), led, scales.amax(1, keepdim=True))
            return alone + scales.amin(1, keepdim=True) * (under(x, t) - led)

        return guided


def _without(rows: Rows, names: Collection[str]) -> Rows:
    """Return the rows without some of what they keep."""
    return replace(rows, kept={name: value for name, value in rows.kept.items() if name not in names})


def _under_the_stronger(kept: Mapping[str, Values], scales: Tensor) -> dict[str, Values]:
    """Return what rows keep with nothing in the control images of the kind whose scale (B, 2, 1, 1) is smaller."""
    image, layout, led = kept["control"], kept["layout"], scales[:, 0] >= scales[:, 1]
    assert isinstance(image, Tensor) and isinstance(layout, Tensor)
    return {
        **kept, "control": image * led[:, None].to(image), "layout": torch.where(led.to(layout.device), -1, layout)
    }  # fmt: skip
