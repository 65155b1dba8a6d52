"""Results of the run of a pretrained model: previews while it trains, and the adapter or pipeline with its card."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from ..config import RunConfig
from ..data import Source, to_pil
from ..data.control import cut_control
from ..data.dataset import read_image
from ..families.index import read_index
from ..families.pretrained import PretrainedModel
from ..pipeline.generate import LatentFlowPipeline
from ..pipeline.inpaint import LatentFlowInpaintPipeline
from ..pipeline.over_model import over_model
from .data import DataSplits, shown_by
from .fine_tune.defaults import FEW
from .fine_tune.learning import LearningMeter
from .fine_tune.memorisation import report_memorisation
from .fine_tune.pretrained_adapter import PretrainedAdapter
from .fine_tune.pretrained_base import PretrainedBase, drawing_precision
from .fine_tune.prompts import Prompts
from .loop.run_folder import writing
from .report.card import CardFacts, generate_command, write_adapter_card, write_card
from .report.export import carry_over

_SHOWN = 4  # images of a preview: each takes as many evaluations as users spend


@dataclass(frozen=True)
class PretrainedResult:
    """The result of a run, as its network is at any time.

    Args:
        model: the network with autoencoder and scheduler, and with text encoders only where these learn.
        adapter: in the network; None: all weights are trained.
        prompts: those of ``splits``.
    """

    model: PretrainedModel
    adapter: PretrainedAdapter | None
    prompts: Prompts
    splits: DataSplits
    config: RunConfig
    base: PretrainedBase

    @property
    def output(self) -> Path:
        """The run folder."""
        return Path(self.config.output)

    @property
    def folder(self) -> Path:
        """The folder of the result: an adapter, or a pipeline of the base's own class."""
        return self.output / ("adapter" if self.adapter else "pipeline")

    # ---------------------------------------------------------------- images

    def draw(self, source: Source, rows: list[int], device: torch.device, *, led: bool = True) -> Tensor:
        """Draw what the images at ``rows`` of a source show, by the pipeline that users load; with fixed seeds.

        Args:
            led: by their control images too, where there are any.

        Returns:
            (B, 3, side, side) in [0, 1], on the CPU.
        """
        side, model = self.splits.data.resolution, self.model
        fills = self.base.draws_from == "mask"
        pipe = over_model(LatentFlowInpaintPipeline if fills else LatentFlowPipeline, model)
        pipe.set_progress_bar_config(disable=True)
        others = _beside_network(model)
        for part in others:
            part.to(device)
        images = []
        with drawing_precision(model, device):
            for seed, row in enumerate(rows):  # one by one: memory is that of the smallest card
                drawn = pipe(
                    **self._condition(source, row, led=led),
                    height=side,
                    width=side,
                    generator=torch.Generator().manual_seed(seed),
                    output_type="pt",
                )
                images.append(drawn.images.float().cpu())
        for part in others:
            part.cpu()
        return torch.cat(images)

    def preview(self, device: torch.device) -> Image.Image:
        """Draw four images with fixed seeds, of captions or classes spread over held-out images, or over all."""
        from torchvision.utils import make_grid

        held_out = self.splits.validation
        source = held_out if len(held_out) >= _SHOWN else self.splits.training
        spread = source.spread(_SHOWN)
        rows = [spread[number % len(spread)] for number in range(_SHOWN)]
        images = self.draw(source, rows, device)
        return to_pil(make_grid(images * 2 - 1, nrow=_SHOWN, padding=2, pad_value=1.0))

    def _condition(self, source: Source, row: int, *, led: bool) -> dict[str, Any]:
        model, side = self.model, self.splits.data.resolution
        given: dict[str, Any] = {}
        if source.control and led:
            given["control_image"] = {
                kind: cut_control(source.examples[row], (side, side), kind, source.labels)
                for kind in source.control
            }
        if self.base.draws_from == "mask":  # the middle of the image is drawn anew
            given["image"] = read_image(source.examples[row], side, self.splits.data.background)
            given["mask_image"] = Image.new("L", (side, side))
            given["mask_image"].paste(255, (side // 4, side // 4, side - side // 4, side - side // 4))
        if model.takes_classes:
            return given | model.call_arguments(shown_by(source, [row], model))
        if source.kind == "text":
            return given | {"prompt_embeds": self.prompts.rows(shown_by(source, [row], model), model)}
        return given | {"prompt_embeds": self.prompts.null(model)}

    # ---------------------------------------------------------------- files

    def export(self, folder: Path, meter: LearningMeter | None, device: torch.device) -> None:
        """Write the result as its network is now, with its card, into ``folder``, which becomes `folder`.

        Raises:
            RunError: the disk gave out.
        """
        if meter is not None:
            meter.write(self.output)
        training, validation = self.splits.training, self.splits.validation
        # what is filled, or follows the image's own edges, resembles it however little was learnt: copies are counted
        # among images drawn from prompts alone, and not of a base that draws none
        reported = training.kind != "unconditional" and self.base.draws_from not in ("mask", "control")
        if len(training) <= FEW and reported:
            report_memorisation(
                self.output,
                training,
                validation,
                self.splits.data.background,
                self.splits.data.resolution,
                lambda rows: self.draw(training, rows, device, led=False),
            )
        with writing(f"the result {self.folder}", self.folder):
            if self.adapter is not None:
                folder.mkdir(parents=True, exist_ok=True)
                self.adapter.save(folder)
            else:
                self._save_pipeline(folder)
            if self.folder.is_dir():
                carry_over(self.folder, folder)
            self.write_card(folder)

    def _save_pipeline(self, folder: Path) -> None:
        """Write a pipeline of the base's class: its files, but for the network's; none is of a variant, which whoever
        opens it would have to name."""
        source, network, own = Path(self.base.folder), self.model.network, self.base.network_name
        folder.mkdir(parents=True, exist_ok=True)
        for name in read_index(source):
            if (source / name).is_dir() and name != own:
                shutil.copytree(source / name, folder / name)
        shutil.copyfile(source / DiffusionPipeline.config_name, folder / DiffusionPipeline.config_name)
        for file in [*folder.glob(f"*/*.{self.base.variant}.*")]:
            whole = file.with_name(file.name.replace(f".{self.base.variant}.", "."))
            if "-of-" not in file.name and not whole.exists():  # shards have the names that their index says
                file.rename(whole)
        dtype = getattr(torch, self.config.export_dtype)
        if network.dtype != dtype:
            network = _in_main_memory(network, dtype)
        network.save_pretrained(folder / own)

    def write_card(self, folder: Path | None = None) -> None:
        """Write the card of the result into ``folder``; default: its own."""
        write = write_adapter_card if self.adapter else write_card
        write(folder or self.folder, self.output, self.facts())

    def facts(self) -> CardFacts:
        """Return the facts for the card of the result."""
        model, pipeline = self.model, self.base.shape.pipeline  # which has all parts, if only their shapes
        parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        return CardFacts(
            where=self.config.push_to_hub or str(self.folder),
            kind=model.condition_kind,
            example=self._example(),
            classes=tuple(model.classes),
            parts=parts,
            samples=_SHOWN,
            sample_steps=(model.usual_steps,),
            resolution=self.splits.data.resolution,
            inpaints=model.takes_masks and not model.extra,
            control=() if model.extra else model.control_kinds,
            stock=type(pipeline).__name__,
            draws_from=self.base.draws_from,
        )

    def command(self) -> str:
        """Return the line that draws an image with the result."""
        opened = self.output if self.adapter else self.folder
        return generate_command(
            self.model.condition_kind, self._example(), str(opened), draws_from=self.base.draws_from
        )

    def _example(self) -> str:
        return shown_by(self.splits.source, [0], self.model)[0]


def _beside_network(model: PretrainedModel) -> list[nn.Module]:
    """Return what draws beside the network that is trained: the autoencoder, Ideogram 4's network without a prompt."""
    parts = model.pipeline.components.values()
    return [part for part in parts if isinstance(part, nn.Module) and part is not model.network]


def _in_main_memory(network: Any, dtype: torch.dtype) -> Any:
    """Return a copy of a network in another precision: a GPU that trained all weights has no room for it."""
    with torch.device("meta"):
        made = type(network).from_config(network.config)
    weights = {
        name: value.to("cpu", dtype if value.is_floating_point() else None)
        for name, value in network.state_dict().items()
    }
    made.load_state_dict(weights, assign=True)
    return made
