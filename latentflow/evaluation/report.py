"""The report of an evaluation: notes on it, what is needed to repeat it, its files, and its lines for the terminal."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import __version__, metrics
from ..data import Source, fingerprint
from ..errors import UserError
from ..families import FlowModel
from ..inference.images import check_writable, whole_file
from ..utils.names import composed
from .data import ConditionKind, ImageSet

FEW = 50  # images; the covariance of fewer says little
MOST_NAMED = 1000  # classes or captions whose proportions are reported, of which the terminal shows 30


def notes(
    model: FlowModel,
    source: Source,
    test: Source | None,
    kind: ConditionKind,
    captions: list[str],
    real: metrics.RealSplit,
) -> list[str]:
    """Return one line for everything that was inferred, or that makes figures of this report less reliable.

    Args:
        captions: those of the generated images. Their unknown words are a note, and are not warned of any more.
    """
    from ..models.text import UnknownWords
    from ..pipeline.sampling import unknown_words_text

    found = list(source.notes)
    if test is not None:
        known = set(source.content_keys())
        if trained_on := sum(key in known for key in test.content_keys()):
            found.append(f"{trained_on} of the {len(test.examples)} images of --test are in DATA too")
    beside = len(real.beside)
    if beside < len(captions):
        found.append(
            f"DATA is small: {beside} of the {len(captions)} generated images, and as many real ones, are compared "
            f"with the {len(real.reference)} other training images"
        )
    if beside < FEW:
        found.append(
            f"distances of {beside} images say little: compare at least {FEW}, of {2 * FEW} training images"
        )
    if any(example.repeats != 1 or example.weight != 1 for example in source.examples):
        found.append("training follows DATA's repeats and weights; every figure counts each image once")
    if kind == "nothing" and source.kind != "unconditional":
        found.append("the checkpoint takes no condition: the captions or classes of DATA are not used")
    if kind == "prompt" and source.kind != "text":
        prompts = "the classes' names as captions" if source.kind == "class" else "the empty caption"
        found.append(f"the checkpoint takes captions, and DATA has none: it is prompted with {prompts}")
    there = {*map(composed, source.classes)}
    absent = [name for name in sorted(model.classes) if composed(name) not in there]
    if absent and kind == "class_labels":
        found.append(f"classes of the checkpoint that DATA lacks; none are generated: {', '.join(absent)}")
    spelled = getattr(model.pipeline, "unknown_words", None)  # pretrained vocabularies spell everything
    if kind == "prompt" and spelled is not None and (words := spelled(sorted(set(captions)))):
        found.append(unknown_words_text(model.pipeline.tokenizer, words))
    warnings.simplefilter("ignore", UnknownWords)
    return found


def describe_data(source: Source, train: ImageSet, unseen: dict[str, ImageSet]) -> dict[str, Any]:
    """Return name, kind, numbers of images and fingerprint of the data."""
    images = {"training": len(train), **{name: len(part) for name, part in unseen.items()}}
    return {"name": source.name, "kind": source.kind, "images": images, "fingerprint": source.fingerprint()}


def proportions(asked: list[str], captions: list[str], kind: ConditionKind) -> dict[str, Any]:
    """Return how often each caption was asked for, beside its share of the training images.

    Of a single caption, or of more than `MOST_NAMED`, only the numbers are returned.
    """
    generated, real = Counter(asked), Counter(captions)
    counts = {"n": len(asked), "different": len(generated), "in_training": len(real)}
    if not 1 < len(real) <= MOST_NAMED:
        return {"with": kind, **counts}
    shares = {
        name: {"asked": generated[name] / len(asked), "training": count / len(captions)}
        for name, count in sorted(real.items())
    }
    return {"with": kind, **counts, "proportions": shares}


def versions() -> dict[str, str]:
    """Return the versions of everything that figures depend on."""
    libraries = ("torch", "torchvision", "diffusers", "transformers", "torchmetrics", "numpy", "pillow")
    return {
        "latentflow": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: importlib.metadata.version(name) for name in libraries},
    }


def weight_hashes(model: FlowModel) -> dict[str, str]:
    """Return a hash of every network's config and weights, adapters merged."""
    networks = {
        name: getattr(model.pipeline, name, None) for name in ("transformer", "unet", "vae", "text_encoder")
    }
    return {name: fingerprint(network) for name, network in networks.items() if network is not None}


def output_files(output: Path) -> dict[str, Path]:
    """Return the report's file and those of the images beside it."""
    return {
        "report": output,
        "generated images": output.with_suffix(".png"),
        "nearest training images": output.with_name(f"{output.stem}-nearest.png"),
    }


def check_output(path: str, overwrite: bool) -> Path:
    """Return the report's path if it, and the images beside it, can be written.

    Raises:
        UserError: it is no .json, a file is a folder, exists and is not to be overwritten, or cannot be written.
    """
    output = Path(path)
    if output.suffix != ".json":
        raise UserError(
            f"the report is JSON, '{output}' is not", f"Did you mean -o {output.with_suffix('.json')}?"
        )
    for content, file in output_files(output).items():
        use = "" if file == output else f", where the {content} of {output.name} would be written"
        if file.is_dir():
            raise UserError(f"{file} is a folder{use}", "Give another name with -o.")
        if file.exists() and not overwrite:
            raise UserError(
                f"{file} already exists{use}",
                "Give another name with -o, or add --overwrite to replace the report and its images.",
            )
    check_writable(path)
    return output


def write(output: Path, report: dict[str, Any], shown: Tensor, neighbours: Tensor, columns: int) -> None:
    """Write the report, and beside it images (N, 3, H, W) in [-1, 1]: those generated, and their neighbours.

    Args:
        columns: images in a row of the neighbours.

    Raises:
        RunError: a file cannot be written.
    """
    from torchvision.utils import save_image

    files = output_files(output)
    with whole_file(output) as partial:
        text = json.dumps(strict_json(report), indent=2, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")
    with whole_file(files["generated images"]) as partial:
        save_image((shown + 1) / 2, partial, nrow=math.ceil(len(shown) ** 0.5))
    with whole_file(files["nearest training images"]) as partial:
        save_image((neighbours + 1) / 2, partial, nrow=columns, pad_value=1.0)


def strict_json(value: Any) -> Any:
    """Return ``value`` as JSON can hold it: infinity and NaN become null, with the reason beside it."""
    if isinstance(value, dict):
        plain = {}
        for key, item in value.items():
            plain[key] = strict_json(item)
            if isinstance(item, float) and not math.isfinite(item):
                plain[f"{key}_reason"] = f"it came out as {item}"
        return plain
    if isinstance(value, list | tuple):
        return [strict_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
