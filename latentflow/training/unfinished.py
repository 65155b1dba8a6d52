"""The pipeline of a run that is not finished: from its newest checkpoint, and the parts that checkpoints leave out.

A checkpoint holds what is trained. The settings of the pipeline, its autoencoder and tokenizer are written once, before
the first step, into ``checkpoints/initial``, a pipeline folder that goes when the run is finished.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import AdapterConfig, JointConfig
from ..errors import UserError, reason
from ..families import FlowModel
from ..models import load_text_encoder
from ..utils.files import result_of, unfinished_run
from .adapted_run import adapted_run, nothing_saved
from .fine_tune.adapters import Adapter
from .fine_tune.pretrained_base import is_pretrained
from .loop.checkpoint import State, load_latest
from .loop.distributed import process_state
from .loop.run_folder import remove_folder, write_folder
from .losses.joint import collapse, set_statistics
from .report.folder import Run, read_run

log = logging.getLogger(__name__)

_INITIAL = Path("checkpoints") / "initial"
_ADAPTER_SETTINGS = {field.name for field in dataclasses.fields(AdapterConfig)}


def keep_initial(run: Path, pipeline: Any) -> None:
    """Write the pipeline of networks that are not trained yet; a failure is a warning, as the run does not need it.

    A pretrained text encoder, which may be larger than all the rest, is not copied.
    """
    if not pipeline.model.trains_text:
        pipeline = pipeline.from_pipe(pipeline, text_encoder=None)
    try:
        write_folder(run / _INITIAL, pipeline.save_pretrained)
    except OSError as error:
        log.warning(
            f"WARNING: {run / _INITIAL} could not be written: {reason(error)}. Nothing can be generated with this run "
            "before it is finished."
        )


def forget_initial(run: Path) -> None:
    """Remove what `keep_initial` wrote: the run is finished."""
    remove_folder(run / _INITIAL)


def initial_folder(run: Path) -> Path:
    """Return the folder that `keep_initial` wrote, whose configs are those of the unfinished pipeline.

    Raises:
        UserError: there is none, or no checkpoint yet; says how the run goes on. Or an autoencoder is trained there, or
            a pretrained model.
    """
    if read_run(run).is_autoencoder:
        raise UserError(
            f"{run} is the run of an autoencoder, which generates nothing by itself",
            f"Train a generator with it: latentflow train DATA --vae {run / 'autoencoder'}",
        )
    read = read_run(run)
    if (base := read.config.get("init_from")) and not (run / _INITIAL).is_dir():
        _refuse_pretrained(read, str(base))
    if not any((run / "checkpoints").glob("step-*")):
        raise nothing_saved(read)
    if not (run / _INITIAL / "model_index.json").is_file():
        raise UserError(
            f"{run} is not finished, and was begun by a version of latentflow whose unfinished runs do not open",
            f"Go on with it, if only for a few steps:\n  {read.resume()}",
        )
    return run / _INITIAL


def _refuse_pretrained(run: Run, base: str) -> None:
    """Refuse the run of a pretrained model, whose checkpoints hold what is trained and no pipeline.

    Raises:
        UserError: it is one; or it is the run of an adapter whose pipeline is gone.
    """
    folder = run.folder
    if adapted_run(str(folder)):
        raise UserError(
            f"{folder} trains an adapter of {base}, and is no pipeline to start from",
            f"Make one of both first, and start from FOLDER: latentflow export {folder} -o FOLDER",
        )
    if is_pretrained(base):
        raise UserError(
            f"{folder} trains all weights of {base}, and its pipeline is written when it is finished",
            f"Its images so far are in {folder / 'samples'}. Go on with it:\n  {run.resume()}",
        )
    if (folder / "adapter").is_dir():
        raise UserError(
            f"{folder} holds an adapter of {base}, and no pipeline",
            f"Draw with both: --checkpoint {base} --lora {folder}",
        )


def unfinished_pipeline(run: Path) -> tuple[Any, str]:
    """Return the pipeline of a run's newest intact checkpoint, with the averaged weights and an adapter merged.

    Returns:
        The pipeline, as the run would export it now; and a line that says so and how the run is finished.

    Raises:
        UserError: the run has saved nothing yet, or all of its checkpoints are damaged; what it started from is gone.
    """
    folder, read = initial_folder(run), read_run(run)
    model = FlowModel.from_pretrained(folder)
    state = load_latest(run / "checkpoints")
    assert state is not None  # `initial_folder` has seen one
    base = read.config.get("checkpoint") or read.config.get("init_from")  # of a student, of a fine-tune
    base = None if base is None else starting_checkpoint(str(base), run)
    model = _with_text_encoder(model, base or read.config.get("text_encoder"))
    adapter = None
    if described := state["description"].get("adapter"):
        settings = {name: value for name, value in described.items() if name in _ADAPTER_SETTINGS}
        settings["lora_layers"] = tuple(settings["lora_layers"])
        adapter = Adapter(model, AdapterConfig(**settings), str(base), trains_text=model.trains_text)
    _load(model, state, run)
    pipeline = model.pipeline
    if adapter is not None:
        pipeline = pipeline.from_pipe(pipeline, **adapter.merged())
    target = f" of {read.target}" if read.target else ""
    return pipeline, f"{run} is not finished: step {state['step']}{target}. To finish it:\n  {read.resume()}"


def starting_checkpoint(checkpoint: str, output: Path | None) -> str:
    """Return the pipeline folder, or hub id, that training starts from where a run folder may be named.

    Args:
        checkpoint: pipeline folder, run folder or hub id.
        output: the run folder, which keeps a copy of an unfinished run's pipeline: that run may go on. None: the copy
            is temporary, for a plan.

    Raises:
        UserError: as `unfinished_pipeline`.
    """
    if not unfinished_run(checkpoint):
        return result_of(checkpoint)
    if output is None:
        output = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, output, ignore_errors=True)
    copy = output / "start"
    with process_state().main_process_first():
        if not (copy / "model_index.json").is_file():
            pipeline, line = unfinished_pipeline(Path(checkpoint))
            log.info(line)
            write_folder(copy, pipeline.save_pretrained)
    return str(copy)


def _with_text_encoder(model: FlowModel, origin: str | None) -> FlowModel:
    """Return the model with the pretrained text encoder that `keep_initial` left out: of a pipeline or by itself."""
    if not model.takes_text or model.pipeline.text_encoder is not None:
        return model
    _, encoder = load_text_encoder(str(origin))
    return type(model)(model.pipeline.from_pipe(model.pipeline, text_encoder=encoder))


@torch.no_grad()
def _load(model: FlowModel, state: State, run: Path) -> None:
    """Load a checkpoint's weights into the networks, averaged where they are trained.

    Raises:
        UserError: they do not fit; or an encoder that learned along has collapsed.
    """
    parts = {"network": model.network, "text_encoder": model.pipeline.text_encoder}
    saved, averages = state["flow-weights"], state["flow-average"]
    if "autoencoder-weights" in state:  # it learns together with the network
        parts["vae"] = model.vae
        saved, averages = saved | state["autoencoder-weights"], averages | state["autoencoder-average"]
        joint = JointConfig(**state["description"]["joint"])
        if error := collapse(saved["spread"], saved["first_spread"], joint):
            raise UserError(f"{run}: {error.what}", error.fix)
        if "norm.running_mean" not in saved:
            raise UserError(
                f"{run}: an earlier version began it, whose network saw latents at any spread",
                "Begin a new run: nothing can go on from this one.",
            )
        set_statistics(model.vae, saved["norm.running_mean"], saved["norm.running_var"])
    trained = nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, nn.Module)})
    # Those of a loss that has more than the networks, such as the head of a feature alignment, are not needed.
    weights = {name: value for name, value in saved.items() if name.partition(".")[0] in parts}
    missing = {name.partition(".")[0] for name in trained.state_dict().keys() - weights.keys()}
    if missing - {"text_encoder"} or not weights:
        raise _unfit(run, "the network's weights are not all there")
    try:
        trained.load_state_dict(weights, strict=False)  # a text encoder that is not trained is in the folder
    except RuntimeError as error:  # other shapes
        raise _unfit(run, reason(error)) from error
    for name, parameter in trained.named_parameters():
        if name in averages:
            parameter.copy_(averages[name])


def _unfit(run: Path, why: str) -> UserError:
    return UserError(
        f"the newest checkpoint of {run} does not fit its {_INITIAL}: {why}",
        f"Go on with the run, if only for a few steps:\n  {read_run(run).resume()}",
    )
