"""The training loop and what it trains."""

from __future__ import annotations

from ..config import LoopConfig as LoopConfig
from ..utils import quick_imports

with quick_imports():
    from .loop.fit import Callbacks as Callbacks
    from .loop.fit import fit as fit
    from .loop.logging import log_to as log_to
    from .loop.logging import resume_line as resume_line
    from .loop.stopping import Stop as Stop
    from .loop.stopping import resumable as resumable
