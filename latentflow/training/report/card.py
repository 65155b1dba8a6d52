"""Model cards: README.md of a run's pipeline folder and of its adapter's, and of an exported pipeline; from templates.

The header is for the hub. Its ``library_name`` is our distribution's where diffusers alone does not know the pipeline:
for `diffusers` the hub would show a snippet that fails, and for a library that it does not know it shows none.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from safetensors import safe_open

from ...errors import few, one_line, plural, printable
from ...families.few_steps import FewSteps
from ...families.stored_weights import parameter_count
from ...utils.files import replacing
from ...utils.flags import parse_options
from ...utils.html_page import render
from ...utils.libraries import DISTRIBUTION, requirement
from ...utils.progress import duration_text
from .export import is_generated, signed
from .folder import Run, data_lines, preview_step, read_run
from .origins import ADAPTER_FILE, Origin, checkpoint_origin, data_origins
from .verdict import judge, measured_lines

_TAGS = {
    "text": "text-to-image",
    "class": "unconditional-image-generation",  # the hub knows no other that takes no text
    "unconditional": "unconditional-image-generation",
}
#: what a pretrained model draws from -> argument of its call, and a name for the file
_FILES = {
    "mask": {"image": "photo.png", "mask_image": "mask.png"},
    "control": {"control_image": "control.png"},
}
_CONTROLS = {"image": "a control image", "labels": "a label map"}
_SHOWN = (
    "resolution", "joint", "network", "network_preset", "width", "depth", "heads", "patch_size", "vae", "init_from",
    "lora_rank", "lora_alpha", "lora_layers", "quantize", "family_options", "prior_samples", "prior_prompts",
    "checkpoint", "method", "guidance", "text_encoder", "path", "prediction", "coupling", "objective", "weighting",
    "time_density", "token_source", "kappa", "kappa_options", "token_objective", "token_weighting", "condition_dropout",
    "inpainting", "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "optimizer", "learning_rate",
    "lr_scheduler", "lr_decay_share", "ema_decay", "seed",
)  # fmt: skip
# Settings without effect where the network is a checkpoint's.
_OF_NEW_NETWORK = ("network", "network_preset", "width", "depth", "heads", "patch_size")
# Settings of our own networks and their training, which a pretrained model does not have.
_OF_OWN_NETWORKS = ("path", "prediction", "coupling", "objective", "inpainting")
_OF_TOKENS = ("token_source", "kappa", "kappa_options", "token_objective", "token_weighting")
_WITHOUT_ADAPTER = ("lora_rank", "lora_alpha", "lora_layers")  # settings that have no effect at rank 0


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Facts for a card that are not in the run's files.

    Attributes:
        where: folder, or ``owner/name`` on the hub, to load the pipeline or adapter from.
        kind: what the model is conditioned on: text, class or unconditional.
        example: a caption or class that it was trained on.
        classes: the names of all its classes.
        parts: name -> module, of the pipeline's modules that have parameters.
        inpaints: it was trained to inpaint.
        control: kinds of the control images that it draws under.
        varies: it has a latent variable, which may be that of an image.
        samples: number of images of a preview.
        sample_steps: numbers of steps with which previews are sampled, one after the other.
        few_steps: how it is sampled, if in few steps.
        resolution: side of its images in pixels; None: as the run's settings have it.
        stock: class of diffusers that opens it, or for an adapter that it is loaded into; "": one of ours.
        draws_from: images beside noise without which that draws nothing: a key of `_FILES`, or "none".
    """

    where: str
    kind: str
    parts: Mapping[str, Any]
    example: str = ""
    classes: tuple[str, ...] = ()
    inpaints: bool = False
    control: tuple[str, ...] = ()
    varies: bool = False
    samples: int = 16
    sample_steps: tuple[int, ...] = (10,)
    few_steps: FewSteps = FewSteps()
    resolution: int | None = None
    stock: str = ""
    draws_from: str = "none"


def write_card(folder: Path, run: Path, facts: CardFacts) -> None:
    """Write README.md and sample.png, the run's last preview, into the pipeline folder ``folder``.

    If README.md in the run's existing ``pipeline`` was written or edited by the user, it is kept, and the new card
    becomes README-step-000450.md beside it.
    """
    read = read_run(run)
    _write(folder, run / "pipeline", read, facts, "model_card.md.jinja", {})


def write_adapter_card(folder: Path, run: Path, facts: CardFacts) -> None:
    """Write README.md and sample.png into the folder of a run's adapter, whose file is there already; see `write_card`.

    Args:
        facts: the run's pipeline's.
    """
    from ...pipeline.adapter_files import facts_of

    read = read_run(run)
    with safe_open(folder / ADAPTER_FILE, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        brought = facts_of(file.metadata())
    words = [word for word in brought.words if not word.startswith("##")]  # no pieces of words
    base = _base(read)
    values: dict[str, Any] = {
        "adapter": {
            "kind": "DoRA" if read.config.get("lora_dora") else "LoRA",
            "rank": read.config.get("lora_rank"),
            "alpha": f"{read.config.get('lora_alpha') or read.config.get('lora_rank'):g}",
        },
        "brought": [
            (noun, _as_text(few(names, 12)))
            for noun, names in (("words", words), ("classes", brought.classes))
            if names
        ],
        "base": json.dumps(one_line(base.place if base else "BASE")),
        "extra": f' "{requirement("peft")}"',
        "parts": _adapter_parts(shapes),
    }
    _write(folder, run / "adapter", read, facts, "adapter_card.md.jinja", values)


def write_export_card(folder: Path, facts: CardFacts, source: str, adapters: Sequence[str]) -> None:
    """Write README.md of a pipeline that was exported from a checkpoint without a card, or with adapters merged.

    Args:
        source: the checkpoint: a folder or hub id.
        adapters: what was merged into its weights: names, each perhaps with its weight.
    """
    base = checkpoint_origin(source)
    merged = f", with adapters merged into its weights: {_as_text(', '.join(adapters))}" if adapters else ""
    lines = [
        f"{'Made from' if adapters else 'A copy of'} {_described(base)}{merged}.",
        *_few_steps_lines(facts),
    ]
    header = _header(facts, {}, base if adapters else None, [])
    values = _values(facts, header) | {
        "name": _as_text(Path(facts.where).name),
        "lineage": lines,
        "run": None,
    }
    (folder / "README.md").write_text(signed(render("model_card.md.jinja", **values)), encoding="utf-8")


def _write(
    folder: Path, previous: Path, run: Run, facts: CardFacts, template: str, values: dict[str, Any]
) -> None:
    """Write a card of ``template`` into ``folder``, which is or replaces ``previous``."""
    old = previous / "README.md"
    suffix = ""
    if old.is_file() and not is_generated(old.read_text(encoding="utf-8", errors="replace")):
        if folder != old.parent:
            shutil.copyfile(old, folder / "README.md")
        suffix = f"-step-{run.step:06d}"
    sample: dict[str, Any] = {}
    if previews := run.previews():
        sample = {"sample": f"sample{suffix}.png", "sample_step": preview_step(previews[-1])}
        shutil.copyfile(previews[-1], folder / sample["sample"])
    card = render(template, **_values_of_run(run, facts, of_adapter="adapter" in values) | values | sample)
    with replacing(folder / f"README{suffix}.md") as partial:
        partial.write_text(signed(card), encoding="utf-8")


# ---------------------------------------------------------------- the hub's header


def _header(
    facts: CardFacts,
    config: Mapping[str, Any],
    base: Origin | None,
    data: Sequence[Origin],
    adapter: bool = False,
) -> str:
    """Return the YAML of a card's header. Only ids of the hub are given as such, and what is unknown is left out."""
    tags = ["diffusers", "latentflow"] if facts.stock else ["latentflow", "flow-matching"]
    tags += [*["lora"] * adapter, *["inpainting"] * facts.inpaints, *["few-step"] * bool(facts.few_steps)]
    name, _, link = str(config.get("license") or "").partition("=")
    derived: dict[str, Any] = {}
    if base and base.hub_id:
        derived = {"base_model": base.hub_id, "base_model_relation": "adapter" if adapter else "finetune"}
    header = ModelCardData(
        license="other" if link else name or None,
        license_name=name if link else None,
        license_link=link or None,
        library_name="diffusers" if facts.stock else DISTRIBUTION,
        pipeline_tag=_TAGS[facts.kind],
        datasets=[origin.hub_id for origin in data] or None,
        tags=tags,
        **derived,
    )
    return header.to_yaml()


# ---------------------------------------------------------------- the body


def _values(facts: CardFacts, header: str) -> dict[str, Any]:
    """Return what a template takes of any model."""
    kind, example, where = facts.kind, _in_a_line(facts.example), one_line(facts.where)
    conditions = {"text": " from captions", "class": f" of {plural(len(facts.classes), 'class')}"}
    return {
        "header": header,
        "licensed": header.startswith("license:") or "\nlicense:" in header,
        "checkpoint": json.dumps(where),
        "resolution": facts.resolution or "?",
        "conditions": conditions.get(kind, ""),
        "classes": ", ".join(_as_text(name) for name in facts.classes) if kind == "class" else "",
        "call": {"text": f"prompt={example!r}", "class": f"class_labels=[{example!r}]"}.get(kind, ""),
        "command": generate_command(kind, example, where, draws_from=facts.draws_from),
        "pipeline": "LatentFlowInpaintPipeline" if facts.draws_from == "mask" else "LatentFlowPipeline",
        "files": _FILES.get(facts.draws_from, {}),
        "stock": facts.stock,
        "inpaints": facts.inpaints,
        "varies": facts.varies,
        "control": " and ".join(_CONTROLS[kind] for kind in facts.control),
        "parts": [(name, type(part).__name__, parameter_count(part)) for name, part in facts.parts.items()],
        **(_stock_values(facts, ()) if facts.stock else {}),
    }


def _values_of_run(run: Run, facts: CardFacts, *, of_adapter: bool) -> dict[str, Any]:
    """Return what a template takes of a run's result, but for the adapter's own facts."""
    base, sets = _base(run), data_origins(str(run.config.get("data")))
    facts = replace(facts, resolution=facts.resolution or run.config.get("resolution"))
    verdict = judge(run)
    measured, figures = _last_figures([row for row in run.rows if row["step"] <= run.result_step])
    where = Path(one_line(facts.where))
    values = _values(facts, _header(facts, run.config, base, sets, of_adapter))
    if of_adapter and base:
        values["command"] = generate_command(
            facts.kind,
            _in_a_line(facts.example),
            one_line(base.place),
            one_line(facts.where),
            run.config.get("family_options") or (),
            facts.draws_from,
        )
    if facts.stock:
        values |= _stock_values(facts, run.config.get("family_options") or ())
    places = [str(run.config.get("data")), *([_named_base(run)] if base and not base.hub_id else [])]
    licences = [
        f"{origin.name}: licence {_as_text(origin.license)}, as its card states"
        for origin in sets
        if origin.license
    ]
    return values | {
        "name": _as_text((run.folder.resolve() if where.name in ("pipeline", "adapter") else where).name),
        "lineage": [*_base_lines(run, base, of_adapter=of_adapter), *_few_steps_lines(facts)],
        "sample_steps": " and ".join(map(str, facts.sample_steps)),
        "sample_rows": 2 * len(facts.sample_steps),
        "samples": facts.samples,
        "run": run,
        "unfinished": run.target is not None and run.step < run.target and not run.stopped_early,
        "time": duration_text(run.seconds) if run.seconds else "",
        "device": _as_text(str(run.starts[-1].get("device", ""))) if run.starts else "",
        "data": [*(_as_text(_without_folders(line, places)) for line in data_lines(run.log)), *licences],
        "settings": [
            (name, _as_text(_setting(name, run.config[name])))
            for name in _SHOWN
            if run.config.get(name) not in (None, {}, [])
            and not (name in _WITHOUT_ADAPTER and not run.config.get("lora_rank"))
            and not (name in _OF_NEW_NETWORK and base)
            and not (name in _OF_OWN_NETWORKS and (facts.stock or run.config.get("tokens")))
            and not (name in _OF_TOKENS and not run.config.get("tokens"))
            and not (name == "lr_decay_share" and run.config.get("lr_scheduler") == "constant")
        ],
        "verdict": _as_text(verdict.remark) if verdict else "",
        "learnt": [_as_text(line) for line in measured_lines(run, verdict)],
        "measured": measured,
        "figures": ", ".join(f"`{name}` {value:.4f}" for name, value in figures),
    }


def _stock_values(facts: CardFacts, family_options: Sequence[str]) -> dict[str, str]:
    """Return what a template takes of a pretrained model: how our pipeline is opened, how it and diffusers' are called.

    Args:
        family_options: as of the run.
    """
    import diffusers

    taken = inspect.signature(getattr(diffusers, facts.stock).__call__).parameters
    example, options = _in_a_line(facts.example), parse_options(family_options)
    sides = {} if facts.resolution is None else dict.fromkeys(("height", "width"), facts.resolution)
    stock = {name: value for name, value in {**sides, **options}.items() if name in taken}
    files = [f'{name}=Image.open("{file}")' for name, file in _FILES.get(facts.draws_from, {}).items()]
    is_class = facts.kind == "class"
    own = f"class_labels=[{example!r}]" if is_class else f"prompt={example!r}"
    shown = f"class_labels=pipe.get_label_ids([{example!r}])" if is_class else own
    return {
        "open": ', dtype="auto"' + (f", family_options={options!r}" if options else ""),
        "call": ", ".join([own, *files, *(f"{name}={value!r}" for name, value in sides.items())]),
        "stock_call": ", ".join([shown, *files, *(f"{name}={value!r}" for name, value in stock.items())]),
    }


def _base(run: Run) -> Origin | None:
    """Return the checkpoint that a fine-tune or a student started from."""
    named = _named_base(run)
    return checkpoint_origin(named) if named else None


def _named_base(run: Run) -> str:
    return str(run.config.get("checkpoint") or run.config.get("init_from") or "")


def _base_lines(run: Run, base: Origin | None, *, of_adapter: bool) -> list[str]:
    if base is None:
        return []
    if of_adapter:
        return [f"Made for {_described(base)}{', and distilled from it' * run.is_student}."]
    merged = ""
    if rank := run.config.get("lora_rank"):
        merged = f", by an adapter of rank {rank} that is merged into these weights"
    return [f"{'Distilled' if run.is_student else 'Fine-tuned'} from {_described(base)}{merged}."]


def _few_steps_lines(facts: CardFacts) -> list[str]:
    counts, guidance = facts.few_steps.step_counts, facts.few_steps.folded_guidance
    if not counts:
        return []
    learned = f", with a guidance of {guidance:g} learned in" if guidance != 1.0 else ""
    return [f"Made for {' or '.join(map(str, counts))} evaluations of the network{learned}."]


def _described(origin: Origin) -> str:
    """Return an origin in Markdown, with its licence where its card states one."""
    name = _as_text(origin.name)
    if origin.hub_id:
        name = f"[{name}](https://huggingface.co/{origin.hub_id})"
    elif origin.place != origin.name:
        name += ", which comes with latentflow"
    else:
        name += ", a local checkpoint"
    return name + (f" (licence: {_as_text(origin.license)}, as its card states)" if origin.license else "")


def _adapter_parts(shapes: Mapping[str, Sequence[int]]) -> list[tuple[str, str, int]]:
    """Return the rows of the table of an adapter's parts: part, its layers, parameters."""
    rows = []
    for part in dict.fromkeys(name.partition(".")[0] for name in sorted(shapes, reverse=True)):
        own = {name: prod(shape) for name, shape in shapes.items() if name.startswith(f"{part}.")}
        layers = {name.partition(".lora_")[0] for name in own if ".lora_" in name}
        rows.append((part, str(len(layers)) if layers else "", sum(own.values())))
    return rows


def generate_command(
    kind: str,
    example: str,
    checkpoint: str,
    adapter: str = "",
    family_options: Sequence[str] = (),
    draws_from: str = "none",
) -> str:
    """Return the line that generates an image of ``example`` with a checkpoint of this ``kind``, and with the adapter
    and the options of its family that are given; see `CardFacts`."""
    files = [*_FILES.get(draws_from, {}).values()]
    flags = {"text": [_in_a_line(example)], "class": ["--class", _in_a_line(example)]}.get(kind, [])
    flags += ["--checkpoint", checkpoint, *(["--lora", adapter] if adapter else [])]
    flags += ["--family-options", *family_options] if family_options else []
    if draws_from == "mask":
        return shlex.join(["latentflow", "inpaint", *files, *flags, "-o", "filled.png"])
    flags += ["--control", *files] if files else []
    return shlex.join(["latentflow", "generate", *flags, "-o", "image.png"])


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


def _without_folders(line: str, places: Sequence[str]) -> str:
    """Return a line of the log without the folders of the author's disk.

    Args:
        places: data and checkpoints as the author named them.
    """
    for place in places:
        trimmed = place.rstrip("/")
        if "/" in trimmed and not trimmed.startswith("hub:"):
            line = line.replace(trimmed, Path(trimmed).name)
    return re.sub(r"(?<![\w/:])/(?:[^\s/:]+/)+", "", line)


def _setting(name: str, value: Any) -> str:
    """Return a setting without the folders of the author's disk."""
    if not isinstance(value, str):
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)
    if name in ("init_from", "checkpoint"):
        return checkpoint_origin(value).name
    path = Path(value).expanduser()
    return path.name if path.is_absolute() or path.exists() else value
