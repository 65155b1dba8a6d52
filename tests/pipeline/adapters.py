"""Adapters with random weights, made as a training makes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from latentflow.config import AdapterConfig
from latentflow.models import with_words
from latentflow.pipeline import LatentFlowPipeline
from latentflow.training.fine_tune.adapters import Adapter


def make_adapter(
    base: Path,
    folder: Path,
    *,
    seed: int = 0,
    words: Iterable[str] = (),
    classes: Iterable[str] = (),
    size: float = 0.2,
    **config: Any,
) -> Adapter:
    """An adapter of ``base``, saved in ``folder``; with ``size`` 0 as it is before the first step."""
    pipe = LatentFlowPipeline.from_pretrained(base)
    network, encoder, tokenizer = pipe.transformer, pipe.text_encoder, pipe.tokenizer
    names = list(pipe.labels)
    with torch.no_grad():
        if words:
            known = len(tokenizer)
            tokenizer = with_words(tokenizer, words)
            mean = encoder.get_input_embeddings().weight.mean(0)
            encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            encoder.get_input_embeddings().weight[known:] = mean
        if classes:
            # Before the known ones: the numbers of a training need not be the base's.
            old = network
            names = [*classes, *names]
            network = type(old).from_config({**old.config, "num_classes": len(names)})
            network.load_state_dict(old.state_dict() | {_TABLE: network.state_dict()[_TABLE]})
            table = old.y_embedder.embedding_table.weight
            new = table.mean(0).expand(len(names) - len(pipe.labels), -1)
            network.y_embedder.embedding_table.weight.copy_(torch.cat([new, table]))
    torch.manual_seed(seed)
    parts = {"text_encoder": encoder, "tokenizer": tokenizer, "id2label": dict(enumerate(names)) or None}
    settings = {name: pipe.config[name] for name in ("average", "step_counts") if name in pipe.config}
    model = LatentFlowPipeline(pipe.vae, network, **parts, **settings).model
    adapter = Adapter(model, AdapterConfig(lora_rank=2, **config), str(base), trains_text=encoder is not None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in (network, encoder):
            for one in () if module is None else module.parameters():
                if one.requires_grad:
                    one.add_(size * torch.randn(one.shape, generator=generator))
    adapter.save(folder)
    return adapter


_TABLE = "y_embedder.embedding_table.weight"
