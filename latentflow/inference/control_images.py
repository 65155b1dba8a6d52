"""Control images made of images: edges, depth maps, and label maps of a segmentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..data import Source
from ..data.images import to_rgb
from ..data.labels import NO_LABEL, Labels, to_label_image
from ..data.sources.beside import CONTROL_ENDING, stem_of
from ..errors import UserError, few, finite, lookup, plural, shown
from ..utils.components import library_reads, load_transformers_model, quiet_libraries
from ..utils.libraries import missing
from ..utils.progress import progress_bar
from .images import whole_file

#: Canny's thresholds that the control checkpoints of the field (ControlNet, FLUX.1 Canny) were trained with
EDGES = (100.0, 200.0)
LABEL_FILE = "control-labels.txt"
_TEXT = "latentflow edges"  # key of the thresholds in a PNG
_FIX = {
    "depth": "Give --model a folder or hub id of a depth model, such as depth-anything/Depth-Anything-V2-Small-hf.",
    "segmentation": "Give --model a folder or hub id of a model of semantic segmentation, such as "
    "nvidia/segformer-b0-finetuned-ade-512-512.",
}


@dataclass(frozen=True)
class ControlMaker:
    """A way to make control images.

    Attributes:
        make: RGB image -> its control image, of the same size.
        text: what the PNGs say of it.
        labels: of label maps.
    """

    make: Callable[[Image.Image], Image.Image]
    text: PngInfo | None = None
    labels: Labels = ()


def open_maker(kind: str, model: str | None, thresholds: tuple[float, float], device: str) -> ControlMaker:
    """Return the maker of control images of a kind: "edges", "depth" or "segmentation".

    Args:
        model: folder or hub id of a model of transformers, for the last two.
        thresholds: of edges, see `edge_map`.
        device: torch's name of the one that the model computes on.

    Raises:
        UserError: there is no such kind; its library or its model is missing; the model cannot be opened or is of
            another task; thresholds are out of order.
    """
    lookup(dict.fromkeys(("edges", *_FIX)), kind, "kind")
    if kind == "edges":
        low, high = thresholds
        for value in thresholds:
            finite("--thresholds", value, 0.0)
        if low > high:
            raise UserError(f"--thresholds {low:g} {high:g}", "The second is not below the first.")
        if model is not None:
            raise UserError("--model with --kind edges", "Leave it out: edges need none.")
        _canny()
        text = PngInfo()
        text.add_text(_TEXT, f"{low:g} {high:g}")
        return ControlMaker(lambda image: edge_map(image, low, high), text)
    if model is None:
        raise UserError(f"--kind {kind} needs a model", _FIX[kind])
    return _depth(model, device) if kind == "depth" else _segmentation(model, device)


def edge_map(image: Image.Image, low: float = EDGES[0], high: float = EDGES[1]) -> Image.Image:
    """Return the edges of an RGB image, white lines of a pixel's width on black (mode "L").

    Canny (1986), as OpenCV computes it without smoothing.

    Args:
        low, high: thresholds of the gradient; lines go on above ``low``, and begin above ``high``.
    """
    return Image.fromarray(_canny()(np.asarray(image), low, high))


def edge_thresholds(control: Image.Image) -> tuple[float, float] | None:
    """Return the thresholds of `edge_map` that a control image from a file was made with; None: it is none of its."""
    words = str(control.info.get(_TEXT, "")).split()
    try:
        low, high = map(float, words)
    except ValueError:
        return None
    return low, high


def _canny() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise missing("edges need", "opencv-python-headless") from error
    return cv2.Canny


def voc_colours(count: int) -> list[str]:
    """Return colours "#rrggbb" that differ, up to 256: those of Pascal VOC's label maps, black first."""
    colours = []
    for number in range(count):
        channels = [
            sum(((number >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8))
            for channel in range(3)
        ]
        colours.append("#{:02x}{:02x}{:02x}".format(*channels))
    return colours


def write_control_images(source: Source, folder: Path, maker: ControlMaker) -> tuple[int, int]:
    """Write the control image of every image of a folder, cat-control.png for cat.png; of label maps their labels too.

    Files that exist are kept.

    Returns:
        Number of images that were written, and of those that were kept.

    Raises:
        UserError: two images differ in their ending alone; the labels of the folder are others.
        RunError: a file cannot be written.
    """
    examples = {
        folder / f"{stem_of(example.name)}{CONTROL_ENDING}.png": example for example in source.examples
    }
    if len(examples) < len(source):
        names = {example.name for example in source.examples} - {value.name for value in examples.values()}
        raise UserError(
            f"images with the same name as others but for the ending: {few(sorted(names))}", "Rename them."
        )
    if maker.labels:
        listed, file = "".join(f"{name} {colour}\n" for name, colour in maker.labels), folder / LABEL_FILE
        if file.is_file() and file.read_text(encoding="utf-8") != listed:
            raise UserError(f"{file} lists other labels", "Give another -o.")
        with whole_file(file) as partial:
            partial.write_text(listed, encoding="utf-8")
    missing_files = [(path, example) for path, example in examples.items() if not path.exists()]
    for path, example in progress_bar(missing_files, desc="making control images"):
        with example.open() as image:
            control = maker.make(to_rgb(image))
        with whole_file(path) as partial:
            control.save(partial, pnginfo=maker.text)
    return len(missing_files), len(examples) - len(missing_files)


# ---------------------------------------------------------------- by models of transformers


def _depth(model: str, device: str) -> ControlMaker:
    import transformers

    run = _pipeline("depth-estimation", model, device, lambda _: transformers.AutoModelForDepthEstimation)

    def make(image: Image.Image) -> Image.Image:
        depth: Image.Image = run(image)["depth"]
        return depth if depth.size == image.size else depth.resize(image.size, Image.Resampling.BILINEAR)

    return ControlMaker(make)


def _segmentation(model: str, device: str) -> ControlMaker:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

    def family(config: Any) -> Any:
        if config.model_type in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES:
            return transformers.AutoModelForSemanticSegmentation
        return transformers.AutoModelForUniversalSegmentation

    run = _pipeline("image-segmentation", model, device, family)
    labels = _labels(model, run.model.config.id2label)
    ids = {name: number for number, (name, _) in enumerate(labels)}

    def make(image: Image.Image) -> Image.Image:
        layout: NDArray[np.uint8] = np.full(image.size[::-1], NO_LABEL, np.uint8)
        for segment in run(image, subtask="semantic"):
            layout[np.asarray(segment["mask"].resize(image.size, Image.Resampling.NEAREST)) > 0] = ids[
                " ".join(segment["label"].split())
            ]
        return to_label_image(layout, labels)

    return ControlMaker(make, labels=labels)


def _labels(model: str, names: dict[int, str]) -> Labels:
    """Return the labels of a model with colours that differ."""
    found = [" ".join(str(names.get(number, number)).split()) for number in range(max(names, default=-1) + 1)]
    if not 1 <= len(found) <= NO_LABEL or len({*found}) < len(found) or not all(found):
        raise UserError(
            f"--model {model} has {plural(len(found), 'label')} ({plural(len({*found}), 'name')})",
            "Label maps take 1 to 255, each with a name of its own: mend id2label in its config.json.",
        )
    return tuple(zip(found, voc_colours(len(found)), strict=True))


def _pipeline(task: str, model: str, device: str, family: Callable[[Any], Any]) -> Any:
    """Return a pipeline of transformers over a model in safetensors."""
    from transformers import AutoImageProcessor, pipeline

    quiet_libraries()
    name, fix = f"--model {shown(model)}", _FIX["depth" if task == "depth-estimation" else "segmentation"]
    network = load_transformers_model(model, name, family, fix=fix)
    with library_reads(name, fix=fix):
        processor = AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
        return pipeline(task, model=network, image_processor=processor, device=device)
