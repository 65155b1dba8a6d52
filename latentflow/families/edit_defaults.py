"""Settings of an edit that nobody gives."""

from __future__ import annotations

from typing import NamedTuple


class EditDefaults(NamedTuple):
    """Settings of FlowEdit (``latentflow.flow.flow_edit``) that suit a model.

    Attributes:
        steps: from noise to data; an edit takes those after t = 1 - ``strength``.
        strength: in [0, 1].
        source_guidance, guidance: guidance scales towards the source's and the target's prompt.
    """

    steps: int = 20
    strength: float = 0.9
    source_guidance: float = 1.0
    guidance: float = 2.0
