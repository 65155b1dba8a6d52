"""Configurations of `DiT` by name."""

from __future__ import annotations

from typing import Any

from ..errors import lookup

# The parts of a block and of its inputs. Both kinds have about the same number of parameters.
BLOCKS: dict[str, dict[str, Any]] = {
    # LightningDiT's (arXiv:2501.01423): RMSNorm, SwiGLU, rotary positions, normalised queries and keys.
    "modern": {
        "norm": "rms",
        "activation": "swiglu",
        "position": "rope",
        "qk_norm": True,
        "time_scale": 1000.0,
    },
    # DiT's (arXiv:2212.09748) with the times of SiT (arXiv:2401.08740).
    "plain": {
        "norm": "layer",
        "activation": "gelu",
        "position": "sincos",
        "qk_norm": False,
        "time_scale": 1.0,
    },
}


def _sit(width: int, depth: int, heads: int) -> dict[str, Any]:
    """Return the settings of SiT (arXiv:2401.08740, table 1), patches of 2: ImageNet-256, 4 x 32 x 32 latents."""
    return {
        "in_channels": 4,
        "out_channels": 8,  # the upper half is the learned sigma of DiT, which SiT computes and ignores
        "patch_size": 2,
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_ratio": 4.0,
        "num_classes": 1000,
        "sample_size": 32,
    } | BLOCKS["plain"]


def _modern(width: int, depth: int, heads: int) -> dict[str, Any]:
    """Return the settings of the default block with one latent pixel per token, for latents of small autoencoders."""
    return {"width": width, "depth": depth, "heads": heads}


DIT_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _modern(192, 6, 3),
    "small": _modern(256, 8, 4),
    "S": _sit(384, 12, 6),
    "B": _sit(768, 12, 12),
    "L": _sit(1024, 24, 16),
    "XL": _sit(1152, 28, 16),
}


def dit_config(preset: str, block: str | None = None, **changes: Any) -> dict[str, Any]:
    """Return the arguments of `DiT` for a preset on other data: ``DiT(**dit_config("B", in_channels=16))``.

    ``block``, one of ``BLOCKS``, replaces the preset's own. Other ``in_channels`` also drop the preset's
    ``out_channels``, unless ``changes`` give them.

    Raises:
        UserError: there is no such preset, or no such block.
    """
    config = dict(lookup(DIT_PRESETS, preset, "preset"))
    if block is not None:
        config |= lookup(BLOCKS, block, "block")
    if changes.get("in_channels", config.get("in_channels")) != config.get("in_channels"):
        config.pop("out_channels", None)
    return config | changes
