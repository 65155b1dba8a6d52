"""The losses of an autoencoder: L1, KL where it has a posterior, the commitment where it has codes, a perceptual loss
and a PatchGAN by choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...autoencoder import Autoencoder
from ...autoencoder.losses import (
    SMALLEST_IMAGE,
    adaptive_weight,
    hinge_loss,
    lpips_loss,
    noisy,
    scales,
    stage_distance,
    transformed,
)
from ...config import AutoencoderConfig
from ...models.vision import load_vision_network
from ..loop.data_order import Stream, seeded
from ..loop.distributed import process_state
from ..loop.random_numbers import RANDOM_NUMBERS, SampleRandom
from .codebook import CodebookLoss
from .conditioned import weighted_mean

_ENOUGH_STEPS = 3000  # 64 px images are beyond 33 dB by then


def autoencoder_steps(asked: int | None, max_train_steps: int) -> int:
    """Return the steps of an autoencoder in a run of ``max_train_steps``, unless others are ``asked`` for."""
    return asked or min(max_train_steps, _ENOUGH_STEPS)


class FeatureDistance(nn.Module):
    """A perceptual loss of a vision network's stages, which it neither trains nor holds as weights of its own.

    Args:
        name: see `load_vision_network`.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._vision = load_vision_network(name)

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Return the distances (B,) of images (B, 3, H, W) in [-1, 1]."""
        with torch.no_grad():
            wanted = self._vision.stages((images + 1) / 2)
        return stage_distance(self._vision.stages((reconstructions + 1) / 2), wanted)


class AutoencoderLoss(nn.Module):
    """The loss of the autoencoder: L1, and by choice the KL divergence, a perceptual loss and an adversarial term.

    That of a `VQModel` decodes the codes of its latents, adds the commitment, and moves the codes when a step ends.

    A batch holds ``images`` (B, 3, H, W) in [-1, 1], ``sample_ids`` and perhaps ``weights`` (B,) of the errors.
    """

    def __init__(
        self,
        vae: Autoencoder,
        config: AutoencoderConfig,
        seed: int,
        discriminator: nn.Module | None = None,
        random_numbers: str = "philox",
    ) -> None:
        super().__init__()
        self.vae = vae
        self._config, self._seed = config, seed
        self._make_random = RANDOM_NUMBERS[random_numbers]
        self.codes: CodebookLoss | None = None
        if config.has_codebook:
            fixed = config.autoencoder_class == "fsq"
            self.codes = CodebookLoss(vae.quantize.embedding, fixed=fixed, seed=seed)
        self._step_now = 0  # 0-based
        perceptual = None
        if config.perceptual_weight:
            lpips = config.perceptual_features == "lpips"
            perceptual = lpips_loss() if lpips else FeatureDistance(config.perceptual_features)
        # In a tuple, so that neither is a submodule: the discriminator has a loss of its own, the other is frozen.
        self._others = (discriminator, perceptual)
        self.pairs: tuple[Tensor, Tensor] | None = None  # (images, reconstructions) for the discriminator

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images = batch["images"].contiguous(memory_format=torch.channels_last)
        pixels = images[0].numel()
        random = self._make_random(self._seed, batch["sample_ids"], images.device)
        latents, kl = self._encode(images, random)
        if self.training and self._config.equivariance:
            images, latents = self._transform(images, latents, batch["sample_ids"][0])
        if self.training and self._config.latent_noise:
            level = self._config.latent_noise * random.uniform()
            latents = noisy(latents.float(), level, random.normal(latents.shape[1:]))
        self._step_now = self._step(batch["sample_ids"][0])
        if self.codes is None:
            of_codes = {}
            reconstruction = self.vae.decode(latents).sample.float()
        else:
            latents, of_codes = self.codes(latents, batch["sample_ids"])
            reconstruction = self.vae.decode(latents, force_not_quantize=True).sample.float()
        per_sample = self.distance(reconstruction, images)
        loss = weighted_mean(per_sample, batch)
        values = {"l1": per_sample.detach().mean(), "per_sample": per_sample.detach()}
        values |= {name: value.detach() for name, value in of_codes.items()}
        if of_codes:
            loss = loss + self._config.commitment_weight * of_codes["commitment"]
        if kl is not None:
            values["kl"] = kl.detach() / pixels
            loss = loss + self._config.kl_weight * kl / pixels
        discriminator, perceptual = self._others
        if perceptual is not None:
            apart = perceptual.to(images.device)(reconstruction, images).mean()
            values["lpips" if self._config.perceptual_features == "lpips" else "perceptual"] = apart.detach()
            loss = loss + self._config.perceptual_weight * apart
        started = self._step_now >= self._config.adversarial_start
        if discriminator is not None and self.training and started:
            self.pairs = (images, reconstruction.detach())
            with frozen(discriminator):
                adversarial = -discriminator(reconstruction).mean()
            weight = adaptive_weight(loss, adversarial, _last_layer(self.vae))
            loss = loss + self._config.adversarial_weight * weight * adversarial
            values["adversarial"] = adversarial.detach()
        return values | {"loss": loss}

    def distance(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Return the reconstruction errors (B,): the mean over pixel values of the absolute difference."""
        return (reconstructions - images).abs().flatten(1).mean(1)

    def finish_step(self, skip: Tensor) -> None:
        """Let the codes learn from the step's latents, unless ``skip``, a bool scalar."""
        if self.codes is not None:
            self.codes.finish_step(skip, self._step_now)

    def _encode(self, images: Tensor, random: SampleRandom) -> tuple[Tensor, Tensor | None]:
        """Return raw latents, and the KL divergence to N(0, I) in nats per image (None if deterministic)."""
        encoded = self.vae.encode(images)
        if not hasattr(encoded, "latent_dist"):
            return encoded.latent if self.codes is None else encoded.latents, None
        posterior = encoded.latent_dist
        noise = random.normal(posterior.mean.shape[1:])
        return posterior.mean + posterior.std * noise, posterior.kl().mean()

    def _transform(self, images: Tensor, latents: Tensor, sample_id: int) -> tuple[Tensor, Tensor]:
        """Return images and latents transformed alike, or, by chance, as they are; one draw for the whole step."""
        random = seeded(self._seed, Stream.AUTOENCODER, self._step(sample_id))
        if torch.rand((), generator=random) >= self._config.equivariance:
            return images, latents
        # The discriminator and the perceptual loss see these images as well, and cannot see the smallest.
        smallest = 1 if self._others == (None, None) else SMALLEST_IMAGE
        choices = scales(latents.shape[2], latents.shape[3], smallest * latents.shape[3] // images.shape[3])
        scale = choices[int(torch.randint(len(choices), (), generator=random))]
        quarter_turns = int(torch.randint(1, 4, (), generator=random))
        return transformed(images, scale, quarter_turns), transformed(latents.float(), scale, quarter_turns)

    def _step(self, sample_id: int) -> int:
        """Return the step (0-based) of a sample: the same in all processes and passes of that step."""
        samples: int = self._config.autoencoder_batch_size * process_state().num_processes
        return sample_id // samples


class DiscriminatorLoss(nn.Module):
    """The discriminator's loss on the images and reconstructions that the autoencoder's step just made."""

    def __init__(self, discriminator: nn.Module, autoencoder: AutoencoderLoss) -> None:
        super().__init__()
        self.discriminator = discriminator
        self._autoencoder = (autoencoder,)  # in a tuple: not a submodule

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        pairs = self._autoencoder[0].pairs
        if pairs is None:
            return {}
        images, reconstructions = pairs
        loss = hinge_loss(self.discriminator(images), self.discriminator(reconstructions))
        return {"loss": loss, "discriminator": loss.detach()}


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let gradients pass the module within the context, and reach none of its weights."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _last_layer(vae: Autoencoder) -> Tensor:
    convolutions = [module for module in vae.decoder.modules() if isinstance(module, nn.Conv2d)]
    weight: Tensor = convolutions[-1].weight
    return weight
