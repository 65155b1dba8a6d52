"""Large images in tiles: diffusers' own code for it, which fails for some classes, and is tried first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError
from ..utils.components import without_reports
from .latents import Autoencoder, _cells, downscale_factor, encoded, latent_channels, of_videos

# What diffusers' code for tiles raises where shapes do not fit or a method is missing.
_FAILURES = (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)


@torch.no_grad()
def use_tiles(vae: Autoencoder, *, encodes: bool = True) -> None:
    """Let an autoencoder encode and decode large images in tiles from now on.

    A copy without weights is tried first on an image of several tiles, which takes neither memory nor time.

    Args:
        encodes: it is to encode as well.

    Raises:
        UserError: it has no tiles, or diffusers' code for them fails.
    """
    what, config = f"--vae-tiling: the autoencoder ({type(vae).__name__})", vae.config
    factor, frames = downscale_factor(vae) // _cells(vae), (1,) * of_videos(vae)
    # with alpha; others that say more join pixels into channels themselves
    channels = 4 if config.get("in_channels") == 4 else 3
    with torch.device("meta"), without_reports():
        try:
            trial = type(vae).from_config(config).eval()
            trial.enable_tiling()
            tile = getattr(trial, "tile_sample_min_size", None) or trial.tile_sample_min_height
        except (AttributeError, NotImplementedError) as error:
            raise UserError(f"{what} has no tiles", "Leave it out.") from error
        cells = 3 * tile // (2 * factor)
        image = torch.zeros(1, channels, *frames, cells * factor, cells * factor)
        latents = torch.zeros(1, latent_channels(vae) // _cells(vae) ** 2, *frames, cells, cells)
        works = {
            "decode": _makes(image, lambda: trial.decode(latents, return_dict=False)[0]),
            "encode": not encodes or _makes(latents, lambda: encoded(trial, image)[0]),
        }
    for does, fine in works.items():
        if not fine:
            advice = " In Python, pipe.vae.enable_tiling() is enough where no image is encoded."
            fix = f"Leave it out.{advice if works['decode'] else ''}"
            raise UserError(f"{what} cannot {does} in tiles in this version of diffusers", fix)
    vae.enable_tiling()


def _makes(like: Tensor, compute: Callable[[], Tensor]) -> bool:
    """Return True if a result has the height and width of ``like``."""
    try:
        return compute().shape[-2:] == like.shape[-2:]
    except _FAILURES:
        return False
