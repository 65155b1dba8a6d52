"""The processes and the device of this run, by accelerate."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env


def process_state() -> PartialState:
    """accelerate's state of this process: ``device``, ``num_processes``, ``is_main_process``.

    Several processes (torchrun, accelerate launch) on a machine without an accelerator talk through gloo; accelerate's
    own default would take each of them for the only one.
    """
    launched = int(os.environ.get("LOCAL_RANK", -1)) != -1
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (launched and not torch.accelerator.is_available())
    return PartialState(cpu=on_cpu)


def in_any_process(accelerator: Accelerator, here: bool) -> bool:
    """Whether it holds in any process of the run; all of them must ask."""
    if accelerator.num_processes == 1:
        return here
    flag = torch.tensor(float(here), device=accelerator.device)
    return float(accelerator.reduce(flag, reduction="sum")) > 0
