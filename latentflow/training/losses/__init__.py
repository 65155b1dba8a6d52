"""Losses: modules that turn a batch into the loss that is minimised; `flow.py` first, `tokens.py` beside it.

The formula of the error is an objective in `latentflow.flow.objectives`; `flow_loss` chooses the module that an
objective needs.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ...config import FlowConfig
from .alignment import AlignedFlowLoss, Alignment, Routing
from .average_velocity import AverageVelocityLoss, ProgressiveLoss
from .control import ControlImages as ControlImages
from .flow import FlowLoss, Masking
from .tokens import CodeLoss as CodeLoss
from .tokens import TokenLoss as TokenLoss

#: the losses of objectives that need more than `AverageVelocityLoss`
_OWN_LOSSES: dict[str, type[AverageVelocityLoss]] = {"progressive": ProgressiveLoss}


def flow_loss(
    network: nn.Module,
    config: FlowConfig,
    seed: int,
    text_encoder: Any = None,
    masking: Masking | None = None,
    routing: Routing | None = None,
    alignment: Alignment | None = None,
    *,
    kind: type[FlowLoss] | None = None,
    **options: Any,
) -> FlowLoss:
    """Return the loss that trains by the config's objective, or that of a ``kind``.

    Args:
        network, config, seed, text_encoder, masking: see `FlowLoss`.
        routing, alignment: by choice, of objectives that go with them.
        options: further arguments of the loss.

    Raises:
        UserError: see `AverageVelocityLoss`.
    """
    if kind is None:
        if config.choices().objective.average:
            kind = _OWN_LOSSES.get(config.objective, AverageVelocityLoss)
        elif routing is not None or alignment is not None:
            kind = AlignedFlowLoss
    if kind is not None and issubclass(kind, AlignedFlowLoss):
        options |= {"routing": routing, "alignment": alignment}
    return (kind or FlowLoss)(network, config, seed, text_encoder, masking, **options)
