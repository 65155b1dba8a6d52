"""The pictures of a run: found and split."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from ...data import LatentFolder, Source, find_source, readable, split
from ...data.config import DataConfig
from ...data.latent_folder import is_latent_folder
from ...documents import read_yaml
from .base import base_classes, base_resolution, with_base_classes
from .config import RunConfig
from .fine_tuning import held_out_share

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examples:
    """What was found.

    Attributes:
        source: all of it, with the classes of the checkpoint that is fine-tuned.
        training, validation: its parts.
        data: the settings with what cached latents or the checkpoint decide: here, not in the run's config, is the
            resolution that counts.
        autoencoder: folder or hub id of the one that is given; None: one is to be trained.
    """

    source: Source
    training: Source
    validation: Source
    data: DataConfig
    autoencoder: str | None


def find_examples(config: RunConfig, given_keys: Collection[str]) -> Examples:
    """Find and split the pictures.

    Raises:
        UserError: there are none, or they do not fit the checkpoint.
    """
    data, base = config.data, config.init_from
    if base:
        base_classes(base)  # refuses what is no checkpoint, before every picture is looked at
    source = readable(find_source(data.data, **data.wanted()))
    autoencoder = config.vae or base
    if isinstance(source, LatentFolder):
        data, autoencoder = source.adopt(data), autoencoder or source.autoencoder
    if base:
        source = with_base_classes(source, base, config.output)
        data = replace(data, validation=held_out_share(given_keys, data.validation, len(source)))
        if "resolution" not in given_keys and not isinstance(source, LatentFolder):
            data = replace(data, resolution=base_resolution(base) or data.resolution)
    training, validation = (source.subset(rows) for rows in split(source, data.validation, config.loop.seed))
    return Examples(source, training, validation, data, autoencoder)


def as_begun(data: DataConfig, output: str | Path, given_keys: Collection[str]) -> DataConfig:
    """The settings with the colours that the run in ``output`` was begun with, where none are given.

    Runs from before colour profiles were converted say nothing of colours in their config.yaml: what they have learnt
    are the numbers as they are stored, and so they go on.

    Raises:
        UserError: the config.yaml there is no YAML.
    """
    file = Path(output) / "config.yaml"
    if "colours" in given_keys or is_latent_folder(data.data) or not file.is_file():
        return data
    begun = read_yaml(file, "Restore it, or use another folder.")
    if not isinstance(begun, dict):
        return data
    if "colours" not in begun:
        log.info(
            f"the run in {output} was begun before colour profiles were converted to sRGB: it goes on with the colours "
            "as they are stored"
        )
    colours = begun.get("colours", "stored")
    return replace(data, colours=colours) if colours in ("srgb", "stored") else data
