"""The model card of a run: README.md of its pipeline folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment

from ..data import Source
from .run_report import data_lines, read_run

_TAGS = {
    "text": "text-to-image",
    "class": "image-generation",
    "unconditional": "unconditional-image-generation",
}
_SHOWN = (
    "resolution", "network", "network_preset", "width", "depth", "heads", "patch_size", "vae", "init_from",
    "text_encoder", "path", "prediction", "coupling", "objective", "weighting", "time_density", "condition_dropout",
    "inpainting", "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "optimizer", "learning_rate",
    "lr_scheduler", "ema_decay", "seed",
)  # fmt: skip

_CARD = """---
{{ header }}# license: name the licence here (https://huggingface.co/docs/hub/repositories-licenses).
#   The pictures that it learnt from have one too, and it may bind you. This line is yours to write.
---

# {{ name }}

Draws pictures of {{ resolution }} x {{ resolution }} pixels{{ asked }}. Made by latent flow matching with
[latentflow](https://pypi.org/project/latentflow/){% if inpaints %}; it fills holes in pictures as well{% endif %}.
{% if sample %}
![Samples](sample.png)

*What it drew at step {{ step }}, one try each, seeds 0 to 15, 10 steps.
{%- if inpaints %} Below: pictures with holes, and what it put there.{% endif %}*
{% endif %}
## Use

```python
from latentflow import LatentFlowPipeline

pipe = LatentFlowPipeline.from_pretrained("{{ where }}")
pipe({{ call }}).images[0].save("picture.png")
```

```bash
latentflow generate {{ words }}--checkpoint {{ where }} -o picture.png
```

| part | class | parameters |
|---|---|---|
{% for part, kind, count in parts -%}
| `{{ part }}` | {{ kind }} | {{ "%.1f" % (count / 1e6) }} M |
{% endfor %}
## Data

{% for line in data -%}
- {{ line }}
{% endfor %}
## Training

{{ step }} steps of {{ batch }} samples
{%- if hours %}, {{ hours }} hours{% endif %}
{%- if device %} on {{ device }}{% endif %}.

| setting | value |
|---|---|
{% for name, value in settings -%}
| {{ name }} | {{ value }} |
{% endfor %}
## Figures

{% if figures -%}
On held-out pictures, always with the same noises and times, at step {{ measured }}: {{ figures }}. They compare
checkpoints of one data set and autoencoder only; `latentflow evaluate` measures the pictures.
{%- else -%}
None were measured.
{%- endif %}

## Limits

It knows what its data show and little else. A model of few pictures repeats them: `latentflow evaluate` measures that.
"""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says that the run's files do not.

    Attributes:
        where: what to load it from: a folder, or ``owner/name`` on the hub.
        parts: name -> module of the pipeline, those that have parameters.
    """

    where: str
    source: Source
    parts: Mapping[str, Any]
    inpaints: bool = False


def write_card(folder: Path, run: Path, facts: CardFacts) -> None:
    """Write README.md and sample.png, the run's last preview, into the pipeline folder ``folder``.

    A README.md that is there already, in ``folder`` or in the run's ``pipeline`` of before, is the user's: it stays,
    and the new card lies beside it as README-step-000450.md.
    """
    read = read_run(run)
    samples = sorted((run / "samples").glob("step-*.png"))
    if samples:
        shutil.copyfile(samples[-1], folder / "sample.png")
    old = run / "pipeline" / "README.md"
    readme = folder / "README.md"
    if old.is_file() and not readme.exists():
        shutil.copyfile(old, readme)
    card = _card(read, facts, bool(samples))
    if not readme.exists():
        readme.write_text(card, encoding="utf-8")
    elif readme.read_text(encoding="utf-8", errors="replace") != card:
        (folder / f"README-step-{read.step:06d}.md").write_text(card, encoding="utf-8")


def _card(run: Any, facts: CardFacts, sample: bool) -> str:
    kind = facts.source.kind
    header = {
        "library_name": "diffusers",
        "pipeline_tag": _TAGS.get(kind, "text-to-image"),
        "tags": ["latentflow", "flow-matching", *(["inpainting"] if facts.inpaints else [])],
    }
    caption, label = _first(facts.source.captions() if kind == "text" else []), _first(facts.source.classes)
    measured, figures = _last_figures(run.rows)
    data = str(run.config.get("data", "data"))
    return str(
        Environment(keep_trailing_newline=True)
        .from_string(_CARD)
        .render(
            header=yaml.safe_dump(header, sort_keys=False),
            name=(run.folder.resolve() if Path(facts.where).name == "pipeline" else Path(facts.where)).name,
            where=facts.where,
            resolution=run.config.get("resolution", "?"),
            asked={"text": " from captions", "class": " of its classes"}.get(kind, ""),
            call={"text": f"prompt={caption!r}", "class": f"class_labels=[{label!r}]"}.get(kind, ""),
            words={"text": f"{_quoted(caption)} ", "class": f"--class {_quoted(label)} "}.get(kind, ""),
            inpaints=facts.inpaints,
            sample=sample,
            step=run.step,
            batch=run.batch(),
            hours=f"{run.seconds / 3600:.1f}" if run.seconds else "",
            device=run.starts[-1]["device"] if run.starts else "",
            parts=[
                (n, type(m).__name__, sum(p.numel() for p in m.parameters())) for n, m in facts.parts.items()
            ],
            data=[line.replace(data, Path(data).name) for line in data_lines(run.log)],
            settings=[(n, _shown(run.config[n])) for n in _SHOWN if run.config.get(n) not in (None, {}, [])],
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


def _shown(value: Any) -> str:
    """A setting without where it lies on the author's disk."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)


def _quoted(text: str) -> str:
    return '"' + text.replace('"', "'") + '"'
