"""The model card of a run: README.md of its pipeline folder."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment

from ...data import Source
from ...errors import one_line, printable
from .export import is_generated, signed
from .folder import Run, data_lines, duration, preview_step, read_run

_TAGS = {
    "text": "text-to-image",
    "class": "image-generation",
    "unconditional": "unconditional-image-generation",
}
_SHOWN = (
    "resolution", "network", "network_preset", "width", "depth", "heads", "patch_size", "vae", "init_from",
    "checkpoint", "method", "guidance", "text_encoder", "path", "prediction", "coupling", "objective", "weighting",
    "time_density", "condition_dropout", "inpainting", "max_train_steps", "train_batch_size",
    "gradient_accumulation_steps", "optimizer", "learning_rate", "lr_scheduler", "lr_decay_share", "ema_decay", "seed",
)  # fmt: skip

_CARD = """---
{{ header }}# license: name the licence here (https://huggingface.co/docs/hub/repositories-licenses).
#   The images that it learnt from have one too, and it may bind you. This line is yours to write.
---

# {{ name }}

Draws images of {{ resolution }} x {{ resolution }} pixels{{ asked }}. Made by latent flow matching with
[latentflow](https://pypi.org/project/latentflow/){% if inpaints %}; it fills holes in images as well{% endif %}.
{% if sample %}
![Samples]({{ sample }})

*What it drew at step {{ sample_step }}, one try each, seeds 0 to 15, {{ sample_steps }} steps
{%- if sample_rows > 2 %}, two rows each{% endif %}.
{%- if inpaints %} Below: images with holes, and what it put there.{% endif %}*
{% endif %}
## Use

```python
from latentflow import LatentFlowPipeline

pipe = LatentFlowPipeline.from_pretrained({{ where }})
pipe({{ call }}).images[0].save("image.png")
```

```bash
{{ command }}
```

| part | class | parameters |
|---|---|---|
{% for part, kind, count in parts -%}
| `{{ part }}` | {{ kind }} | {{ "%.2f" % (count / 1e6) }} M |
{% endfor %}
## Data

{% for line in data -%}
- {{ line }}
{% endfor %}
## Training

{{ step }} steps of {{ batch }} samples
{%- if time %}, {{ time }}{% endif %}
{%- if device %} on {{ device }}{% endif %}
{%- if result_step != step %}; the weights are of step {{ result_step }}, the best on held-out images{% endif %}.

| setting | value |
|---|---|
{% for name, value in settings -%}
| {{ name }} | {{ value }} |
{% endfor %}
## Figures

{% if figures -%}
On held-out images, always with the same noises and times, at step {{ measured }}: {{ figures }}. They compare
checkpoints of one data set and autoencoder only; `latentflow evaluate` measures the images.
{%- else -%}
None were measured.
{%- endif %}

## Limits

It knows what its data show and little else. A model of few images repeats them: `latentflow evaluate` measures that.
"""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says that the run's files do not.

    Attributes:
        where: what to load it from: a folder, or ``owner/name`` on the hub.
        parts: name -> module of the pipeline, those that have parameters.
        sample_steps: numbers of steps in which previews are drawn, one after the other.
    """

    where: str
    source: Source
    parts: Mapping[str, Any]
    inpaints: bool = False
    sample_steps: tuple[int, ...] = (10,)


def write_card(folder: Path, run: Path, facts: CardFacts) -> None:
    """Write README.md and sample.png, the run's last preview, into the pipeline folder ``folder``.

    A README.md in the run's ``pipeline`` of before that we did not write, or that was changed since, is the user's:
    it stays, and the new card lies beside it as README-step-000450.md.
    """
    read = read_run(run)
    old = run / "pipeline" / "README.md"
    suffix = ""
    if old.is_file() and not is_generated(old.read_text(encoding="utf-8", errors="replace")):
        shutil.copyfile(old, folder / "README.md")
        suffix = f"-step-{read.step:06d}"
    sample = ""
    if previews := read.previews():
        sample = f"sample{suffix}.png"
        shutil.copyfile(previews[-1], folder / sample)
    card = _card(read, facts, sample, preview_step(previews[-1]) if previews else 0)
    (folder / f"README{suffix}.md").write_text(signed(card), encoding="utf-8")


def _card(run: Run, facts: CardFacts, sample: str, sample_step: int) -> str:
    kind = facts.source.kind
    header = {
        "library_name": "diffusers",
        "pipeline_tag": _TAGS.get(kind, "text-to-image"),
        "tags": ["latentflow", "flow-matching", *(["inpainting"] if facts.inpaints else [])],
    }
    caption = _in_a_line(_first(facts.source.captions() if kind == "text" else []))
    label = _in_a_line((facts.source.examples[0].label or "") if kind == "class" else "")
    where = one_line(facts.where)
    asked = {"text": [caption], "class": ["--class", label]}.get(kind, [])
    measured, figures = _last_figures([row for row in run.rows if row["step"] <= run.result_step])
    return str(
        Environment(keep_trailing_newline=True)
        .from_string(_CARD)
        .render(
            header=yaml.safe_dump(header, sort_keys=False),
            name=_as_text((run.folder.resolve() if Path(where).name == "pipeline" else Path(where)).name),
            where=json.dumps(where),
            resolution=run.config.get("resolution", "?"),
            asked={"text": " from captions", "class": " of its classes"}.get(kind, ""),
            call={"text": f"prompt={caption!r}", "class": f"class_labels=[{label!r}]"}.get(kind, ""),
            command=shlex.join(["latentflow", "generate", *asked, "--checkpoint", where, "-o", "image.png"]),
            inpaints=facts.inpaints,
            sample=sample,
            sample_step=sample_step,
            sample_steps=" and ".join(map(str, facts.sample_steps)),
            sample_rows=2 * len(facts.sample_steps),
            step=run.step,
            result_step=run.result_step,
            batch=run.batch,
            time=duration(run.seconds) if run.seconds else "",
            device=_as_text(str(run.starts[-1].get("device", ""))) if run.starts else "",
            parts=[
                (n, type(m).__name__, sum(p.numel() for p in m.parameters())) for n, m in facts.parts.items()
            ],
            data=[
                _as_text(_without_places(line, str(run.config.get("data")))) for line in data_lines(run.log)
            ],
            settings=[
                (n, _as_text(_shown(run.config[n])))
                for n in _SHOWN
                if run.config.get(n) not in (None, {}, [])
            ],
            measured=measured,
            figures=", ".join(f"`{name}` {value:.4f}" for name, value in figures),
        )
    )


def _last_figures(rows: Sequence[Mapping[str, float]]) -> tuple[int, list[tuple[str, float]]]:
    for row in reversed(rows):
        found = [(name, value) for name, value in row.items() if name.startswith("val_")]
        if found:
            return int(row["step"]), found
    return 0, []


def _first(names: Sequence[str]) -> str:
    return names[0] if names else ""


def _in_a_line(text: str) -> str:
    """Text of the data for a block of code: a line of its own in it could end the block."""
    return " ".join(printable(text).split())


def _as_text(text: str) -> str:
    """Text of the data or of the machine for Markdown, in which it is no markup."""
    return re.sub(r"([\\`*\[\]<>|&~#])", r"\\\1", one_line(text))


def _without_places(line: str, data: str) -> str:
    """A line of the log without where things lie on the author's disk."""
    place = data.rstrip("/")
    if "/" in place and not place.startswith("hub:"):
        line = line.replace(place, Path(place).name)
    return re.sub(r"(?<![\w/:])/(?:[^\s/:]+/)+", "", line)


def _shown(value: Any) -> str:
    """A setting without where it lies on the author's disk."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)
