"""The model card of a run: README.md of its pipeline folder, from the template ``model_card.md.jinja``."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ...errors import one_line, plural, printable
from ...utils.files import replacing
from ...utils.html_page import render
from .export import is_generated, signed
from .folder import Run, data_lines, duration, preview_step, read_run
from .verdict import judge, measured_lines

_TAGS = {
    "text": "text-to-image",
    "class": "unconditional-image-generation",  # the hub knows no other that takes no text
    "unconditional": "unconditional-image-generation",
}
_SHOWN = (
    "resolution", "network", "network_preset", "width", "depth", "heads", "patch_size", "vae", "init_from", "lora_rank",
    "checkpoint", "method", "guidance", "text_encoder", "path", "prediction", "coupling", "objective", "weighting",
    "time_density", "condition_dropout", "inpainting", "max_train_steps", "train_batch_size",
    "gradient_accumulation_steps", "optimizer", "learning_rate", "lr_scheduler", "lr_decay_share", "ema_decay", "seed",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Facts for a card that are not in the run's files.

    Attributes:
        where: folder, or ``owner/name`` on the hub, to load the pipeline from.
        kind: what the model is conditioned on: text, class or unconditional.
        example: a caption or class that it was trained on.
        classes: the names of all its classes.
        parts: name -> module, of the pipeline's modules that have parameters.
        inpaints: it was trained to inpaint.
        sample_steps: numbers of steps with which previews are sampled, one after the other.
    """

    where: str
    kind: str
    parts: Mapping[str, Any]
    example: str = ""
    classes: tuple[str, ...] = ()
    inpaints: bool = False
    sample_steps: tuple[int, ...] = (10,)


def write_card(folder: Path, run: Path, facts: CardFacts) -> None:
    """Write README.md and sample.png, the run's last preview, into the pipeline folder ``folder``.

    If README.md in the run's existing ``pipeline`` was written or edited by the user, it is kept, and the new card
    becomes README-step-000450.md beside it.
    """
    read = read_run(run)
    old = run / "pipeline" / "README.md"
    suffix = ""
    if old.is_file() and not is_generated(old.read_text(encoding="utf-8", errors="replace")):
        if folder != old.parent:
            shutil.copyfile(old, folder / "README.md")
        suffix = f"-step-{read.step:06d}"
    sample = ""
    if previews := read.previews():
        sample = f"sample{suffix}.png"
        shutil.copyfile(previews[-1], folder / sample)
    card = _card(read, facts, sample, preview_step(previews[-1]) if previews else 0)
    with replacing(folder / f"README{suffix}.md") as partial:
        partial.write_text(signed(card), encoding="utf-8")


def _card(run: Run, facts: CardFacts, sample: str, sample_step: int) -> str:
    """Return the text of the card."""
    kind, example = facts.kind, _in_a_line(facts.example)
    header = ModelCardData(
        library_name="diffusers",
        pipeline_tag=_TAGS.get(kind, "text-to-image"),
        tags=["latentflow", "flow-matching", *(["inpainting"] if facts.inpaints else [])],
    )
    where = one_line(facts.where)
    verdict = judge(run)
    measured, figures = _last_figures([row for row in run.rows if row["step"] <= run.result_step])
    return render(
        "model_card.md.jinja",
        header=f"{header.to_yaml()}\n",
        name=_as_text((run.folder.resolve() if Path(where).name == "pipeline" else Path(where)).name),
        checkpoint=json.dumps(where),
        resolution=run.config.get("resolution", "?"),
        conditions={"text": " from captions", "class": f" of {plural(len(facts.classes), 'class')}"}.get(
            kind, ""
        ),
        classes=", ".join(_as_text(name) for name in facts.classes) if kind == "class" else "",
        call={"text": f"prompt={example!r}", "class": f"class_labels=[{example!r}]"}.get(kind, ""),
        command=generate_command(kind, example, where),
        inpaints=facts.inpaints,
        sample=sample,
        sample_step=sample_step,
        sample_steps=" and ".join(map(str, facts.sample_steps)),
        sample_rows=2 * len(facts.sample_steps),
        run=run,
        time=duration(run.seconds) if run.seconds else "",
        device=_as_text(str(run.starts[-1].get("device", ""))) if run.starts else "",
        parts=[(n, type(m).__name__, sum(p.numel() for p in m.parameters())) for n, m in facts.parts.items()],
        data=[_as_text(_without_folders(line, str(run.config.get("data")))) for line in data_lines(run.log)],
        settings=[
            (name, _as_text(_setting(run.config[name])))
            for name in _SHOWN
            if run.config.get(name) not in (None, {}, []) and (name, run.config[name]) != ("lora_rank", 0)
        ],
        verdict=_as_text(verdict.remark) if verdict else "",
        learnt=[_as_text(line) for line in measured_lines(run, verdict)],
        measured=measured,
        figures=", ".join(f"`{name}` {value:.4f}" for name, value in figures),
    )


def generate_command(kind: str, example: str, checkpoint: str) -> str:
    """Return the line that generates an image of ``example`` with a checkpoint of this ``kind``; see `CardFacts`."""
    flags = {"text": [_in_a_line(example)], "class": ["--class", _in_a_line(example)]}.get(kind, [])
    return shlex.join(["latentflow", "generate", *flags, "--checkpoint", checkpoint, "-o", "image.png"])


def _in_a_line(text: str) -> str:
    """Return text of the data in one line, since a line of its own could end a code block."""
    return " ".join(printable(text).split())


def _last_figures(rows: Sequence[Mapping[str, float]]) -> tuple[int, list[tuple[str, float]]]:
    """Return the last validation figures, and their step."""
    for row in reversed(rows):
        found = [(name, value) for name, value in row.items() if name.startswith("val_")]
        if found:
            return int(row["step"]), found
    return 0, []


def _as_text(text: str) -> str:
    """Return text of the data or of the machine with Markdown's markup escaped; our own commands stay code."""
    escaped = re.sub(r"([\\`*\[\]<>|&~#])", r"\\\1", one_line(text))
    return re.sub(r"\\`(latentflow [\w -]+)\\`", r"`\1`", escaped)


def _without_folders(line: str, data: str) -> str:
    """Return a line of the log without the folders of the author's disk."""
    place = data.rstrip("/")
    if "/" in place and not place.startswith("hub:"):
        line = line.replace(place, Path(place).name)
    return re.sub(r"(?<![\w/:])/(?:[^\s/:]+/)+", "", line)


def _setting(value: Any) -> str:
    """Return a setting without the folders of the author's disk."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)
