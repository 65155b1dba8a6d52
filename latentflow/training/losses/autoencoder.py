"""Training an autoencoder: L1, KL where it has a posterior, LPIPS and a PatchGAN by choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...autoencoder import Autoencoder
from ...autoencoder.losses import SMALLEST_IMAGE, adaptive_weight, hinge_loss, perceptual_loss
from ...autoencoder.regularisation import noisy, scales, transformed
from ...config import AutoencoderConfig
from ..loop.data_order import SampleRandom, seeded
from ..loop.distributed import process_state

_ENOUGH_STEPS = 3000  # 64 px images are beyond 33 dB by then


def autoencoder_steps(asked: int | None, max_train_steps: int) -> int:
    """Steps of an autoencoder in a run of so many, unless others are asked for."""
    return asked or min(max_train_steps, _ENOUGH_STEPS)


class AutoencoderStage(nn.Module):
    """The loss of the autoencoder: ``{"images": (B, 3, H, W), "numbers": draws}`` -> ``{"loss", "l1", ...}``."""

    def __init__(
        self, vae: Autoencoder, config: AutoencoderConfig, seed: int, discriminator: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.vae = vae
        self._config, self._seed = config, seed
        # In a tuple, so that neither is a submodule: the discriminator has its own player, LPIPS is frozen.
        self._others = (discriminator, perceptual_loss() if config.perceptual_weight else None)
        self.pairs: tuple[Tensor, Tensor] | None = None  # (images, reconstructions) for the discriminator

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        images = batch["images"].contiguous(memory_format=torch.channels_last)
        pixels = images[0].numel()
        random = SampleRandom(self._seed, batch["numbers"], images.device)
        latents, kl = self._encode(images, random)
        if self.training and self._config.equivariance:
            images, latents = self._transform(images, latents, batch["numbers"][0])
        if self.training and self._config.latent_noise:
            level = self._config.latent_noise * random.uniform()
            latents = noisy(latents.float(), level, random.normal(latents.shape[1:]))
        reconstruction = self.vae.decode(latents).sample.float()
        per_sample = (reconstruction - images).abs().flatten(1).mean(1)
        loss = l1 = per_sample.mean()
        values = {"l1": l1.detach(), "per_sample": per_sample.detach()}
        if kl is not None:
            values["kl"] = kl.detach() / pixels
            loss = loss + self._config.kl_weight * kl / pixels
        discriminator, lpips = self._others
        if lpips is not None:
            perceptual = lpips.to(images.device)(reconstruction, images).mean()
            values["lpips"] = perceptual.detach()
            loss = loss + self._config.perceptual_weight * perceptual
        if discriminator is not None and self.training and self._adversarial(batch):
            self.pairs = (images, reconstruction.detach())
            adversarial = -_frozen(discriminator, reconstruction).mean()
            weight = adaptive_weight(loss, adversarial, _last_layer(self.vae))
            loss = loss + self._config.adversarial_weight * weight * adversarial
            values["adversarial"] = adversarial.detach()
        return values | {"loss": loss}

    def _encode(self, images: Tensor, random: SampleRandom) -> tuple[Tensor, Tensor | None]:
        """-> raw latents, and the KL divergence to N(0, I) in nats per image (None if deterministic)."""
        encoded = self.vae.encode(images)
        if not hasattr(encoded, "latent_dist"):
            return encoded.latent, None
        posterior = encoded.latent_dist
        noise = random.normal(posterior.mean.shape[1:])
        return posterior.mean + posterior.std * noise, posterior.kl().mean()

    def _transform(self, images: Tensor, latents: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Images and latents transformed alike, or, by chance, as they are; one draw for the whole step."""
        random = seeded(self._seed, 7, self._step(number))
        if torch.rand((), generator=random) >= self._config.equivariance:
            return images, latents
        # The discriminator and LPIPS see these images as well, and cannot see the smallest.
        smallest = 1 if self._others == (None, None) else SMALLEST_IMAGE
        choices = scales(latents.shape[2], latents.shape[3], smallest * latents.shape[3] // images.shape[3])
        scale = choices[int(torch.randint(len(choices), (), generator=random))]
        quarter_turns = int(torch.randint(1, 4, (), generator=random))
        return transformed(images, scale, quarter_turns), transformed(latents.float(), scale, quarter_turns)

    def _adversarial(self, batch: dict[str, Any]) -> bool:
        return self._step(batch["numbers"][0]) >= self._config.adversarial_start

    def _step(self, number: int) -> int:
        """The step (0-based) of a running number: the same in all processes and passes of that step."""
        samples: int = self._config.autoencoder_batch_size * process_state().num_processes
        return number // samples


class DiscriminatorStage(nn.Module):
    """The discriminator's loss on the images and reconstructions that the autoencoder's step just made."""

    def __init__(self, discriminator: nn.Module, autoencoder: AutoencoderStage) -> None:
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


def _frozen(module: nn.Module, inputs: Tensor) -> Tensor:
    """The module's output, with gradients to the inputs but not to its weights."""
    weights = {name: one.detach() for name, one in module.named_parameters()}
    output: Tensor = torch.func.functional_call(module, weights, (inputs,))
    return output


def _last_layer(vae: Autoencoder) -> Tensor:
    convolutions = [module for module in vae.decoder.modules() if isinstance(module, nn.Conv2d)]
    weight: Tensor = convolutions[-1].weight
    return weight
