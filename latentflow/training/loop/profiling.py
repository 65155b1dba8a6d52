"""Profile of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

# The sections of a step; the loop marks each with `torch.profiler.record_function`.
SECTIONS = ("load", "forward", "backward", "clip", "optimizer", "average", "report")
_WAIT, _WARM_UP, _STEPS = 3, 2, 6  # the first steps of a process allocate, tune and compile
_OPERATORS = 15


@contextmanager
def profiler(folder: Path, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Profile six steps, from the sixth of this process on: ``folder`` gets ``trace.json`` and ``table.txt``.

    Within the context, call what it yields after every step. ``say`` gets the table. Profiled steps take longer, and
    learn the same.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()

    def ready(profiled: Any) -> None:
        folder.mkdir(exist_ok=True)
        profiled.export_chrome_trace(str(folder / "trace.json"))
        lines = table(profiled.key_averages())
        (folder / "table.txt").write_text("\n".join(lines) + "\n")
        say(
            "\n".join(lines)
            + f"\nthe trace of {_STEPS} steps is {folder / 'trace.json'}; https://ui.perfetto.dev shows it"
        )

    plan = schedule(wait=_WAIT, warmup=_WARM_UP, active=_STEPS, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=ready) as running:
        yield running.step


def table(events: Any) -> list[str]:
    """Return lines with the milliseconds of a step by section, and the operators that take most of it.

    On a GPU they are those of its own work: it runs behind the host, whose sections only start the work.
    """
    by_name = {event.key: event for event in events}
    steps = [event for event in events if event.key.startswith("ProfilerStep")]
    count = sum(event.count for event in steps)
    whole = sum(event.cpu_time_total for event in steps) / count / 1000
    gpu = any(event.self_device_time_total > 0 for event in events)
    name = "device_time_total" if gpu else "cpu_time_total"
    sections = {key: getattr(by_name[key], name) / count / 1000 for key in SECTIONS if key in by_name}
    if not gpu:
        sections["everything else"] = whole - sum(sections.values())
    lines = [f"a step takes {whole:.1f} ms" + (", of which the GPU computes" if gpu else "")]
    lines += [f"  {key:<42}{value:9.2f} ms {value / whole:6.1%}" for key, value in sections.items()]
    own = f"self_{name}"
    operators = [event for event in events if event.key not in SECTIONS and event not in steps]
    operators.sort(key=lambda event: -getattr(event, own))
    lines += ["operators, without what they call" + (" (GPU)" if gpu else "")]
    for event in operators[:_OPERATORS]:
        value = getattr(event, own) / count / 1000
        calls = f"{event.count / count:.0f} calls"
        lines.append(f"  {event.key[:40]:<42}{value:9.2f} ms {value / whole:6.1%} {calls:>12}")
    return lines
