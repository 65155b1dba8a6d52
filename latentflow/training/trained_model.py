"""The model that a run trains: networks, by choice an adapter of them, and the module whose output is their loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..autoencoder import downscale_factor
from ..autoencoder.latents import Autoencoder
from ..config import RunConfig
from ..data import Source
from ..families import FlowModel
from ..pipeline.generate import LatentFlowPipeline
from .fine_tune.adapters import Adapter
from .loop.distributed import process_state
from .losses.alignment import make_alignment
from .losses.average_velocity import flow_loss
from .losses.flow import FlowLoss
from .losses.masking import Masking
from .losses.routing import Routing
from .networks import Networks, networks_from, new_networks
from .recipe import Recipe


@dataclass(frozen=True)
class TrainedModel:
    """The networks of a run with their loss.

    Attributes:
        networks: with an adapter, those that it is in.
        flow_model: of these networks, as they are at any time: for previews and the export.
        adapter: None without one.
        loss: the module whose output is the loss.
        latent_size: side of the latents.
        batch: samples of a step, in all processes.
    """

    networks: Networks
    flow_model: FlowModel
    adapter: Adapter | None
    loss: FlowLoss
    latent_size: int
    batch: int

    def describe(self) -> dict[str, Any]:
        """Return plain values that a resumed run must have as well."""
        described: dict[str, Any] = {"network": self.networks.describe()}
        return described if self.adapter is None else described | {"adapter": self.adapter.description()}


def build(
    config: RunConfig, source: Source, resolution: int, vae: Autoencoder, recipe: Recipe
) -> TrainedModel:
    """Build new networks for the images of ``source``, or load those of the checkpoint; and make their loss.

    Raises:
        UserError: the settings contradict each other, the data or the checkpoint.
    """
    loop, flow = config.loop, config.flow
    inpainting = flow.inpainting or source.has_masks
    sizes = config.framing.size_conditioning
    latent_size = resolution // downscale_factor(vae)
    torch.manual_seed(loop.seed)

    # ---- networks ----
    if config.init_from:
        networks = networks_from(
            config.init_from, source, flow, inpainting, sizes, latent_size, student=recipe.student
        )
    else:
        networks = new_networks(
            source,
            vae,
            latent_size,
            config.network,
            config.text,
            inpainting,
            sizes,
            device="meta" if config.dry_run else "cpu",
            intervals=recipe.sampling.average,
        )
    adapter = None
    if config.init_from and config.adapter.lora_rank:
        adapter = Adapter(networks, config.adapter, config.init_from, source.classes, recipe.sampling.plain())
        networks = adapter.networks
    network = networks.network
    if config.network.gradient_checkpointing:
        network.enable_gradient_checkpointing()

    pipeline = LatentFlowPipeline(
        vae=vae,
        transformer=network,
        text_encoder=networks.text_encoder,
        tokenizer=networks.tokenizer,
        id2label=dict(enumerate(networks.classes)) or None,
        path=flow.path,
        path_options=flow.path_options,
        prediction=flow.prediction,
        coupling=flow.coupling,
        **recipe.sampling.plain(),
    )

    # ---- loss ----
    masking = None
    if pipeline.takes_masks:
        masking = Masking(vae, flow.shapes(source.has_masks), loop.seed)
    batch = loop.train_batch_size * loop.gradient_accumulation_steps * process_state().num_processes
    samples = loop.max_train_steps * batch
    loss = flow_loss(
        network,
        flow,
        loop.seed,
        networks.text_encoder if networks.trained_text else None,
        masking,
        Routing(config.routing, network, (samples, batch)) if config.routing.route_share else None,
        make_alignment(config.alignment, network),
        samples=samples,
        samples_per_step=batch,
        **recipe.loss_options,
    )
    return TrainedModel(networks, pipeline.model, adapter, loss, latent_size, batch)
