"""Make control images: `latentflow control photos --kind edges -o photos`, for `latentflow train --control`.

    latentflow control photos --kind edges -o photos
    latentflow control photos --kind depth --model depth-anything/Depth-Anything-V2-Small-hf -o depth
    latentflow control streets --kind segmentation --model nvidia/segformer-b0-finetuned-ade-512-512 -o layouts

Writes cat-control.png for cat.png, in the same subfolder of the output: beside the images, if that is their folder.
Edges are Canny's (extra `edges`), white on black. Depth and segmentation are what a model of transformers says, from a
folder or from the hub; nothing is downloaded unless --model names a model that is not on this machine. Label maps are
palette images, with their names and colours in control-labels.txt. Existing files are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from latentflow.cli import parse, run
from latentflow.errors import UserError, plural


@dataclass(frozen=True, kw_only=True)
class ControlImagesConfig:
    """Make control images of a folder of images."""

    images: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Folder of images, with its subfolders."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """Folder to write to. The images' own, or another for `--control-folder`."""
    kind: Literal["edges", "depth", "segmentation"] = "edges"
    """edges or depth, for `train --control image`; or segmentation, for `train --control labels`."""
    model: str | None = None
    """Model of depth or segmentation: a folder, or a hub id such as depth-anything/Depth-Anything-V2-Small-hf."""
    thresholds: tuple[float, float] = (100.0, 200.0)
    """Gradients above which an edge goes on, and begins. Lower ones find more edges."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ..."""


def main(argv: Sequence[str] | None = None) -> None:
    """Make the control images, and write them."""
    config = parse(ControlImagesConfig, argv, prog="latentflow control", description=__doc__ or "")
    source, output = Path(config.images).expanduser(), Path(config.output).expanduser()
    if not source.is_dir():
        raise UserError(f"{source} is no folder", "Give a folder of images.")

    from latentflow.data import find_source, readable
    from latentflow.inference.control_images import LABEL_FILE, open_maker, write_control_images
    from latentflow.inference.opening import check_device, fastest_device

    apart = output.resolve() != source.resolve()
    folder = str(output) if apart and output.is_dir() else None  # what lies there is no image of the set
    images = readable(find_source(config.images, condition="none", control="image", control_folder=folder))
    device = fastest_device() if config.device == "auto" else check_device(config.device)
    maker = open_maker(config.kind, config.model, config.thresholds, device)
    written, kept = write_control_images(images, output, maker)
    print(
        f"Wrote {plural(written, 'control image')} to {output}" + f"; {kept} exist and were kept" * bool(kept)
    )
    kind = "labels" if maker.labels else "image"
    more = f" --control-folder {output}" if apart else ""
    more += f" --control-labels {output / LABEL_FILE}" if maker.labels else ""
    print(f"Train with them: latentflow train {config.images} --control {kind}{more}")


if __name__ == "__main__":
    run(main)
