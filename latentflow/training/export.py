"""The pipeline that a run makes of what it has trained."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..autoencoder.latents import Autoencoder
from ..config import RunConfig
from ..data import Source
from ..families.latentflow import FewSteps
from ..pipeline.generate import LatentFlowPipeline
from .loop.folders import write_folder, writing
from .networks import Networks
from .preview import preview_steps
from .report.card import CardFacts, write_card
from .report.export import carry_over
from .trained_model import Built


@dataclass(frozen=True)
class Result:
    """What comes out.

    Attributes:
        config: of the run.
        source: its images, with those that were held out.
        vae: its autoencoder.
        built: what is trained.
        followed: how the network is followed.
    """

    config: RunConfig
    source: Source
    vae: Autoencoder
    built: Built
    followed: FewSteps

    @property
    def folder(self) -> Path:
        """The pipeline's."""
        return Path(self.config.output) / "pipeline"

    def pipeline(self, networks: Networks | None = None) -> LatentFlowPipeline:
        """Of the networks as they are now, or of others."""
        networks, flow = networks or self.built.networks, self.config.flow
        return LatentFlowPipeline(
            vae=self.vae,
            transformer=networks.network,
            text_encoder=networks.text_encoder,
            tokenizer=networks.tokenizer,
            id2label=dict(enumerate(networks.classes)) or None,
            path=flow.path,
            path_options=flow.path_options,
            prediction=flow.prediction,
            coupling=flow.coupling,
            **self.followed.plain(),
        )

    def export(self, folder: Path) -> None:
        """Write the pipeline with its card; of an adapter the merged one, and the adapter beside it.

        Raises:
            RunError: the disk gave out.
        """
        config, adapter = self.config, self.built.adapter
        result = self.pipeline() if adapter is None else self.pipeline(adapter.merged())
        if config.export_dtype != "float32":
            result = copy.deepcopy(result).to(dtype=getattr(torch, config.export_dtype))
        facts = CardFacts(
            where=config.push_to_hub or str(self.folder),
            source=self.source,
            parts={name: one for name, one in result.components.items() if isinstance(one, torch.nn.Module)},
            inpaints=result.takes_masks,
            sample_steps=preview_steps(result),
        )
        output = Path(config.output)
        with writing(f"the result {self.folder}", self.folder):
            result.save_pretrained(folder)
            write_card(folder, output, facts)
            carry_over(self.folder, folder)
            if adapter is not None:
                write_folder(output / "adapter", partial(adapter.save, earlier=output / "adapter"))
