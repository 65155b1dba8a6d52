"""A run that trains an adapter of a pretrained model: what is opened is its base, with the adapter as it is so far."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import AdapterConfig
from ..errors import UserError
from ..families.added_inputs import KEPT, ExtendableModel
from ..families.from_configs import model_from_configs
from ..utils.files import result_of, unfinished_run
from ..utils.flags import parse_options
from .fine_tune.pretrained_adapter import PretrainedAdapter
from .fine_tune.pretrained_base import is_pretrained
from .loop.checkpoint import load_latest
from .report.folder import Run, read_run


@dataclass(frozen=True)
class AdaptedRun:
    """A run that trains an adapter, or has trained one.

    Attributes:
        base: pipeline folder or hub id of the pretrained model.
        options: of its family, as ``--family-options`` has them.
    """

    run: Run
    base: str
    options: tuple[str, ...]

    def adapter(self) -> tuple[Path, str]:
        """Return the folder of the adapter; of an unfinished run, a temporary one with that of the newest checkpoint.

        Returns:
            The folder; and a line that says so and how the run is finished, or "".

        Raises:
            UserError: the run has saved nothing yet, or all of its checkpoints are damaged, or do not fit the base.
        """
        run = self.run
        if (made := run.folder / "adapter").is_dir():
            return made, ""
        state = load_latest(run.folder / "checkpoints")
        if state is None:
            raise nothing_saved(run)
        shape = model_from_configs(self.base, parse_options(self.options))
        settings = dict(state["description"]["adapter"])
        base = settings.pop("base", {})
        settings["lora_layers"] = tuple(settings["lora_layers"])
        adapter = PretrainedAdapter(shape, AdapterConfig(**settings))
        adapter.fingerprint = base  # which the shapes alone do not have
        weights = {**state["flow-weights"], **state["flow-average"]}
        if kinds := [kind for kind in KEPT if any(f".added.{kind}." in name for name in weights)]:
            assert isinstance(shape, ExtendableModel)
            described = state["description"]
            labels = tuple((name, colour) for name, colour in described.get("labels", ()))
            shape.add_inputs(dict.fromkeys(kinds), coupling=described["flow"]["coupling"], labels=labels)
        parts = {  # by their names in `PretrainedLoss`
            "network.network.": shape.network,
            **{f"text_encoders.{name}.": part for name, part in adapter.encoders.items()},
        }
        learned = {
            f"{start}{name}": weight.shape
            for start, part in parts.items()
            for name, weight in part.named_parameters()
            if weight.requires_grad
        }
        if learned != {name: value.shape for name, value in weights.items()}:
            raise UserError(
                f"the newest checkpoint of {run.folder} does not fit {self.base}",
                "Another model lies there than the one that the run started from. Put that one back.",
            )
        with torch.no_grad():
            for start, part in parts.items():
                own = {
                    name.removeprefix(start): value
                    for name, value in weights.items()
                    if name.startswith(start)
                }
                part.load_state_dict(own, strict=False, assign=True)
        temporary = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        # The page calls the adapter by the name of the run.
        folder = Path(temporary) / run.folder.resolve().name / "adapter"
        adapter.save(folder)
        target = f" of {run.target}" if run.target else ""
        line = f"{run.folder} is not finished: step {state['step']}{target}. To finish it:\n  {run.resume()}"
        return folder, line


def adapted_run(source: str) -> AdaptedRun | None:
    """Return the run of an adapter in a folder; None where there is none.

    Raises:
        UserError: the base cannot be found; or the run has saved nothing yet.
    """
    folder = Path(source)
    if not unfinished_run(source) or (folder / "checkpoints" / "initial").is_dir():
        return None
    run = read_run(folder)
    base = run.config.get("init_from")
    if base is None or not ((folder / "adapter").is_dir() or run.config.get("lora_rank")):
        return None
    try:
        pretrained = is_pretrained(str(base))
    except UserError as error:
        raise UserError(
            f"{source} trains an adapter of {base}, which cannot be opened: {error.what}", error.fix
        ) from error
    if not pretrained:
        return None
    if not any((folder / "checkpoints").glob("step-*")) and not (folder / "adapter").is_dir():
        raise nothing_saved(run)
    return AdaptedRun(run, result_of(str(base)), tuple(map(str, run.config.get("family_options") or ())))


def nothing_saved(run: Run) -> UserError:
    """Build the error for a run without a result and without checkpoints."""
    return UserError(
        f"{run.folder} is not finished and has saved no checkpoint yet", f"Go on with it:\n  {run.resume()}"
    )
