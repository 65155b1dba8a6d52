"""The training loop and what it trains."""

from __future__ import annotations

from .callbacks import Callbacks as Callbacks
from .config import LoopConfig as LoopConfig
from .logs import log_to as log_to
from .logs import resume_line as resume_line
from .loop import fit as fit
