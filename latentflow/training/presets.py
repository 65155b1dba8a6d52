"""Settings by size for `latentflow train --preset`: data, autoencoder, network and loop together."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Minutes on two CPU cores; what the tutorials and benchmarks use.
    "tiny": {
        "resolution": 32,
        "latent_channels": 16,
        "autoencoder_widths": (24, 48, 96, 128),
        "encoder_layers": (0, 1, 1, 1),
        "decoder_layers": (1, 1, 1, 1),
        "autoencoder_steps": 600,
        "network_preset": "tiny",
        "text_width": 192,
        "text_heads": 3,
        "max_train_steps": 800,
        "train_batch_size": 128,
        "learning_rate": 2e-3,
        "optimizer": "muon",
        "validation_steps": 200,
        "preview_steps": 200,
        "checkpointing_steps": 200,
    },
    # An hour or two on a few CPU cores, minutes on a GPU.
    "small": {
        "resolution": 64,
        "latent_channels": 16,
        "network_preset": "small",
        "max_train_steps": 20_000,
        "train_batch_size": 64,
        "learning_rate": 2e-3,
        "optimizer": "muon",
    },
    # A GPU for a day.
    "base": {
        "resolution": 256,
        "latent_channels": 16,
        "autoencoder_widths": (64, 128, 256, 512),
        "encoder_layers": (0, 2, 2, 3),
        "decoder_layers": (1, 2, 2, 3),
        "autoencoder_steps": 50_000,
        "network_preset": "small",
        "width": 768,
        "depth": 12,
        "heads": 12,
        "patch_size": 2,
        "max_train_steps": 200_000,
        "train_batch_size": 128,
        "learning_rate": 3e-4,
        "optimizer": "adamw",
    },
}
