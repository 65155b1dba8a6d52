"""Building what a run trains: new networks or those of a checkpoint, by choice an adapter of them, and their loss."""

from __future__ import annotations

import torch

from ..autoencoder import downscale_factor
from ..autoencoder.latents import Autoencoder
from ..config import RunConfig
from ..data import Source
from .fine_tune.adapters import Adapter
from .loop.distributed import process_state
from .losses.alignment import make_alignment
from .losses.masking import Masking
from .losses.routing import Routing
from .networks import Networks, networks_from, new_networks
from .recipe import Lesson
from .trained_model import Built


def build(config: RunConfig, source: Source, resolution: int, vae: Autoencoder, lesson: Lesson) -> Built:
    """New networks for the images of ``source``, or those of the checkpoint; and how they are trained.

    Raises:
        UserError: the settings contradict each other, the data or the checkpoint.
    """
    loop, flow = config.loop, config.flow
    torch.manual_seed(loop.seed)
    latent_size = resolution // downscale_factor(vae)
    networks = _networks(config, source, latent_size, vae, lesson)
    adapter = None
    if config.init_from and config.adapter.lora_rank:
        followed = lesson.few_steps(flow).plain()
        adapter = Adapter(networks, config.adapter, config.init_from, source.classes, followed)
        networks = adapter.networks
    network = networks.network
    if config.network.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    masking = None
    if network.config.condition_channels:
        masking = Masking(vae, flow.shapes(source.has_masks), loop.seed)
    batch = loop.train_batch_size * loop.gradient_accumulation_steps * process_state().num_processes
    samples = loop.max_train_steps * batch
    stage = lesson.stage(flow)(
        network,
        flow,
        loop.seed,
        networks.text_encoder if networks.trained_text else None,
        masking,
        Routing(config.routing, network, (samples, batch)) if config.routing.route_share else None,
        make_alignment(config.alignment, network),
        samples=samples,
        samples_per_step=batch,
    )
    return Built(networks, adapter, stage, latent_size, batch)


def _networks(
    config: RunConfig, source: Source, latent_size: int, vae: Autoencoder, lesson: Lesson
) -> Networks:
    inpainting = config.flow.inpainting or source.has_masks
    told = config.framing.size_conditioning
    if config.init_from:
        return networks_from(
            config.init_from, source, config.flow, inpainting, told, latent_size, student=lesson.taught
        )
    return new_networks(
        source,
        vae,
        latent_size,
        config.network,
        config.text,
        inpainting,
        told,
        device="meta" if config.dry_run else "cpu",
        intervals=config.flow.choices().objective.average,
    )
