"""What a run trains: networks, by choice an adapter of them, and the module whose output is their loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .fine_tune.adapters import Adapter
from .losses.flow import FlowLoss
from .networks import Networks


@dataclass(frozen=True)
class Built:
    """What is trained.

    Attributes:
        networks: with an adapter, those that it is in.
        adapter: None without one.
        stage: the module whose output is the loss.
        latent_size: side of the latents.
        batch: samples of a step, in all processes.
    """

    networks: Networks
    adapter: Adapter | None
    stage: FlowLoss
    latent_size: int
    batch: int

    @property
    def told(self) -> bool:
        """Whether the network is told of sizes and crops."""
        return bool(self.networks.network.config.size_conditioning)

    def describe(self) -> dict[str, Any]:
        """Plain values that a resumed run must have as well."""
        described: dict[str, Any] = {"network": self.networks.describe()}
        return described if self.adapter is None else described | {"adapter": self.adapter.description()}
