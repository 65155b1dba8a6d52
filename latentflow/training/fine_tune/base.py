"""The checkpoint that a fine-tune or a student starts from: what it is, and how its classes join the data's."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...autoencoder import downscale_factor, load_autoencoder
from ...config import FineTuningConfig, FlowConfig
from ...data import Source
from ...data.labels import Labels
from ...errors import UserError, few, reason, with_article
from ...families import FlowModel
from ...families.tokens import CodeModel, TokenModel
from ...flow import OBJECTIVES
from ...models import MODELS, ControlInputs, DiT, UNet
from ...pipeline.generate import LatentFlowPipeline
from ...utils.components import quiet_libraries
from ...utils.files import CONFIG, check_settings, read_settings
from ...utils.flags import flag_of
from ...utils.names import as_spelled, composed


def open_base(checkpoint: str) -> FlowModel:
    """Load the model that a fine-tune or a student starts from.

    Raises:
        UserError: it cannot be opened, or its network is not one of ours.
    """
    quiet_libraries()
    with _starting(checkpoint):
        model = FlowModel.from_pretrained(checkpoint)
    if isinstance(model, TokenModel | CodeModel):
        raise _of_codes(checkpoint, model.draws_tokens)
    if not isinstance(model.network, DiT | UNet):
        kind = type(model.network).__name__
        raise UserError(
            f"{checkpoint} is a pretrained model: its network is {with_article(kind)}. Only models that latentflow has "
            "trained from scratch are distilled",
            f"It can be fine-tuned: latentflow train DATA --init-from {checkpoint}",
        )
    return model


def base_classes(checkpoint: str) -> tuple[str, ...]:
    """Return the names of a checkpoint's classes, as `FlowModel.classes` does, without loading weights.

    Raises:
        UserError: ``checkpoint`` is no pipeline.
    """
    names = _pipeline_config(checkpoint).get("id2label") or {}
    count = _network_config(checkpoint).get("num_classes") or 0
    return tuple(names.get(str(number), str(number)) for number in range(count))


def base_labels(checkpoint: str | None) -> Labels:
    """Return the labels of the label maps that a checkpoint takes, without loading weights; none without a checkpoint.

    Raises:
        UserError: ``checkpoint`` is no pipeline.
    """
    return () if checkpoint is None else ControlInputs.of(_network_config(checkpoint).get("control")).labels


def base_resolution(checkpoint: str) -> int | None:
    """Return the side in pixels of the images that a checkpoint was trained on (the longer one), without loading the
    network's weights; None if it does not say.

    Raises:
        UserError: ``checkpoint`` is no pipeline.
    """
    size = _network_config(checkpoint).get("sample_size")
    if size is None:
        return None
    side: int = size if isinstance(size, int) else max(size)
    return side * downscale_factor(load_autoencoder(checkpoint, subfolder="vae"))


def refuse_own_result(checkpoint: str, output: Path, result: str = "pipeline") -> None:
    """Refuse a checkpoint that the run in ``output`` would replace by its own ``result``, a folder in it.

    Raises:
        UserError: it is that.
    """
    if Path(checkpoint).expanduser().resolve() in (output.resolve(), (output / result).resolve()):
        raise UserError(
            f"{checkpoint} is the place of this run's own result, which would replace it",
            "Use another output folder.",
        )


def refuse_pretrained_settings(config: FineTuningConfig) -> None:
    """Refuse settings that only count for pretrained models of diffusers.

    Raises:
        UserError: there is one.
    """
    for name in ("quantize", "family_options", "outside_mask"):
        if getattr(config, name) != getattr(FineTuningConfig(), name):
            raise UserError(
                f"{flag_of(name)} is for pretrained models of diffusers, and none is trained",
                "Leave it out, or name one: --init-from.",
            )


def with_base_classes(source: Source, checkpoint: str) -> Source:
    """Return ``source`` with the checkpoint's classes before its own new ones: known classes keep their ids.

    Raises:
        UserError: ``checkpoint`` is no pipeline, or a class differs from one of the checkpoint's only in case, spaces,
            hyphens or underscores.
    """
    known = base_classes(checkpoint)
    if source.kind != "class" or not known:
        return source
    _refuse_nearly_equal(source, checkpoint, known)
    plain = {*map(composed, known)}
    shared = [name for name in source.classes if composed(name) in plain]
    new = [name for name in source.classes if composed(name) not in plain]
    note = f"classes of {checkpoint}: all {len(known)} stay, under their numbers"
    note += f"; {len(shared)} of them are in the data and trained on: {few(shared, 12)}" if shared else ""
    note += f"; {len(new)} new ones follow: {few(new, 12)}" if new else "; none is new"
    return dataclasses.replace(source, classes=(*known, *new)).noted(note)


def with_base_flow(flow: FlowConfig, checkpoint: str, given: Collection[str]) -> FlowConfig:
    """Return ``flow`` with what is not ``given`` as the checkpoint was trained: path, prediction, coupling, the density
    of the times, and the objective (with its guidance) of a checkpoint of average velocities, whose times are its own.

    Raises:
        UserError: ``checkpoint`` is no pipeline.
    """
    config = _pipeline_config(checkpoint)
    adopted: dict[str, Any] = {
        name: config[name]
        for name in ("path", "path_options", "prediction", "coupling")
        if name in config and name not in given and not (name == "path_options" and "path" in given)
    }
    times = {name: config[name] for name in ("time_density", "time_options") if config.get(name)}
    if not {"time_density", "time_options", "weighting", "objective"}.intersection(given):
        adopted |= times
    if config.get("average"):
        usual = "consistency" if config.get("consistency") else "mean-flow"
        adopted["objective"] = flow.objective if "objective" in given else usual
        if OBJECTIVES[adopted["objective"]].average:
            learned = {} if "guidance" in given else {"guidance": config.get("folded_guidance", 1.0)}
            adopted["objective_options"] = learned | flow.objective_options
    if adopted.get("coupling") == "data-dependent" and "inpainting" not in given:
        adopted["inpainting"] = True
    return dataclasses.replace(flow, **adopted)


def kept_guidance(checkpoint: str) -> dict[str, Any]:
    """Return the settings of a checkpoint's guidance, which a fine-tune of it keeps."""
    config = _pipeline_config(checkpoint)
    names = (
        ("guidance_channels", "usual_guidance")
        if config.get("trained_null", True)
        else ("guidance_channels",)
    )
    return {name: config[name] for name in names if name in config}


def lost_guidance(flow: FlowConfig, checkpoint: str, given: Collection[str]) -> float:
    """Return the guidance that is distilled into a checkpoint, if ``flow`` trains it to something without; else 1."""
    learned = float(_pipeline_config(checkpoint).get("folded_guidance", 1.0))
    return 1.0 if with_base_flow(flow, checkpoint, given).choices().objective.average else learned


def _refuse_nearly_equal(source: Source, checkpoint: str, known: tuple[str, ...]) -> None:
    plain = {_plain(name): name for name in known}
    near = [
        f"'{name}' and '{plain[_plain(name)]}'"
        for name in source.classes
        if as_spelled(name, known) not in known and _plain(name) in plain
    ]
    if near:
        raise UserError(
            f"classes of {source.name} and of {checkpoint} differ only in case or spaces (or - or _): {few(near)}",
            "Spell them as the checkpoint does if they are the same; if not, give them names of their own.",
        )


def _plain(name: str) -> str:
    """Return what names that look alike have in common."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name)).strip().casefold()


def _pipeline_config(checkpoint: str) -> dict[str, Any]:
    with _starting(checkpoint):
        config = LatentFlowPipeline.read_index(LatentFlowPipeline.local_folder(checkpoint))
    tokens = config.get("token_path") is not None
    if tokens or config.get("prediction") == "codes":
        raise _of_codes(checkpoint, tokens)
    return config


def _of_codes(checkpoint: str, tokens: bool) -> UserError:
    what, flag = ("draws tokens", "--tokens") if tokens else ("predicts codes", "--prediction codes")
    return UserError(
        f"{checkpoint} {what}: such models are neither fine-tuned nor distilled",
        f"Train one from scratch: latentflow train DATA {flag} --vae CHECKPOINT, with the same tokenizer.",
    )


def _network_config(checkpoint: str) -> dict[str, Any]:
    """Return what the network's file of settings says; no weights are loaded."""
    with _starting(checkpoint):
        file = LatentFlowPipeline.local_folder(checkpoint) / "transformer" / CONFIG
        config = read_settings(file)
        kind = next((kind for kind in MODELS.values() if kind.__name__ == config.get("_class_name")), DiT)
        check_settings(file, config, kind)
        return config


@contextmanager
def _starting(checkpoint: str) -> Iterator[None]:
    """Let every `UserError` within the context say that this is no checkpoint to start from."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{checkpoint} is no checkpoint to start from: {reason(error)}",
            error.fix or "Give a pipeline folder, such as runs/cats/pipeline.",
        ) from error


def refuse_other_flow(checkpoint: str, model: FlowModel, flow: FlowConfig) -> None:
    """Refuse to train another path or prediction: the meaning of a network's output is part of its weights.

    Raises:
        UserError: the checkpoint was trained on another path, or to another prediction.
    """
    for name in ("path", "path_options", "prediction"):
        straight = getattr(FlowConfig(), name)  # of a family whose config does not say it
        trained, asked = model.pipeline.config.get(name, straight), getattr(flow, name)
        if trained != asked:
            flag = flag_of(name)
            words = (
                [f"{key} {value}" for key, value in trained.items()]
                if isinstance(trained, dict)
                else [trained]
            )
            raise UserError(
                f"{checkpoint} was trained with {name} {trained}, this run asks for {asked}",
                f"Use {flag} {' '.join(words)}." if words else f"Leave {flag} out.",
            )
