"""Make a checkpoint of published weights of SiT, DiT, REPA or LightningDiT: `latentflow import SiT-XL-2-256.pt ...`.

latentflow import SiT-XL-2-256.pt --vae stabilityai/sd-vae-ft-ema -o sit-xl
latentflow generate --checkpoint sit-xl --class "golden retriever" -o dog.png
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from latentflow.cli import parse, run
from latentflow.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Make a checkpoint of latentflow of weights of SiT, DiT, REPA or LightningDiT as their authors publish them.

    The averaged weights of a training checkpoint are taken. Nothing in the file is executed.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """File of weights: .pt, .pth, .ckpt or .safetensors."""
    vae: Annotated[str, tyro.conf.arg(metavar="FOLDER_OR_HUB_ID")]
    """Autoencoder that the network was trained with: a folder, or a hub id, which is downloaded. SiT, DiT and REPA:
    stabilityai/sd-vae-ft-ema."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """Folder to write. It must be new or empty."""
    kind: Literal["auto", "sit", "dit", "repa", "lightningdit"] = "auto"
    """Kind of network. auto: by the names of the weights and of the file."""
    class_names: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Text file with the name of one class a line. Default: ImageNet's, for 1000 classes."""


def main(argv: Sequence[str] | None = None) -> None:
    """Read the weights, and write the checkpoint."""
    config = parse(ImportConfig, argv, prog="latentflow import", description=__doc__ or "")
    output = Path(config.output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"-o {output} exists", "Choose another folder: nothing is overwritten.")

    from latentflow.families.original import import_pipeline, kind_of, read_weights
    from latentflow.training.loop.run_folder import write_folder

    weights = read_weights(Path(config.source))
    kind = kind_of(weights, Path(config.source).name) if config.kind == "auto" else config.kind
    pipe = import_pipeline(weights, kind, config.vae, _class_names(config.class_names))
    write_folder(output, pipe.save_pretrained)
    network, names = pipe.transformer, pipe.config.id2label
    classes = network.config["num_classes"]
    shown = "" if names is None else f', for example --class "{names[str(min(207, classes - 1))]}"'
    print(f"{output}: {kind} of {network.num_parameters() / 1e6:,.0f} M parameters, {classes} classes")
    print(f"latentflow generate --checkpoint {output}{shown}")


def _class_names(file: str | None) -> list[str] | None:
    """Return the lines of a file, the names of the classes in the order of their ids; None where none is given."""
    if file is None:
        return None
    try:
        return Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class-names {file} cannot be read: {error}") from error


if __name__ == "__main__":
    run(main)
