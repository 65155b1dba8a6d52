"""TensorBoard and Weights & Biases, through accelerate's trackers."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL.Image import Image

from ...errors import UserError
from .processes import process_state

log = logging.getLogger(__name__)


class Tracker:
    """Curves and pictures outside the run folder's own files. What fails here is said once, and no run ends of it."""

    def __init__(self, tracker: GeneralTracker, folder: Path) -> None:
        self._tracker: GeneralTracker | None = tracker
        tracker.start()
        settings = folder / "config.yaml"
        if isinstance(tracker, WandBTracker) and settings.is_file():
            self._call("store_init_configuration", yaml.safe_load(settings.read_text(encoding="utf-8")))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._call("log", values, step=step)

    def picture(self, step: int, image: Image) -> None:
        self._call("log_images", {"preview": np.asarray(image)[None]}, step=step)  # (1, H, W, 3)

    def close(self) -> None:
        self._call("finish")

    def _call(self, method: str, *arguments: Any, **options: Any) -> None:
        if self._tracker is None:
            return
        if method == "log_images" and isinstance(self._tracker, TensorBoardTracker):
            options["dataformats"] = "NHWC"
        try:
            getattr(self._tracker, method)(*arguments, **options)
        except Exception as error:  # a server that went away, a full disk: the run goes on
            log.warning("WARNING: --report-to: %s; the run goes on without it", error)
            self._tracker = None


def start(report_to: str, folder: Path) -> Tracker | None:
    """The tracker of a run in ``folder``; None for "none".

    Raises:
        UserError: its package is not installed, or it could not start.
    """
    if report_to == "none":
        return None
    process_state()  # accelerate's trackers need it
    try:
        if report_to == "wandb":
            import wandb  # noqa: F401

            name = "/".join(folder.resolve().parts[-2:])  # of two stages both say which they are
            tracker: Any = WandBTracker(
                "latentflow", name=name, dir=str(folder), id=_wandb_id(folder), resume="allow"
            )
        else:
            import tensorboard  # noqa: F401

            tracker = TensorBoardTracker("tensorboard", str(folder))
    except ImportError as error:
        raise UserError(
            f"--report-to {report_to} needs the package {report_to}", f'pip install "latentflow[{report_to}]"'
        ) from error
    try:
        return Tracker(tracker, folder)
    except Exception as error:
        fix = "Run `wandb login`, or set WANDB_MODE=offline (and `wandb sync` later)."
        raise UserError(
            f"--report-to {report_to} could not start: {error}", fix if report_to == "wandb" else ""
        ) from error


def _wandb_id(folder: Path) -> str:
    """The same for every start of a run, so that a resumed one goes on with its curves; another for another run."""
    file = folder / "wandb" / "run-id.txt"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(8))
    return file.read_text().strip()
