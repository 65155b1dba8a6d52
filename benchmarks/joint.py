"""Compare the latents of autoencoders that learnt alone or with their flow: `python benchmarks/joint.py DATA RUN...`

DATA is the data set of the runs of `latentflow train`, with `--joint` or without. Of each run, on the images that it
held out: PSNR of the reconstructions, the spread of the latents (standard deviation over all elements), and the flow
loss with the latents scaled to a spread of one, the mean over eight times as `latentflow evaluate` has it, at one noise
for each image. The scaling makes losses of latents of different spreads comparable: of y = z / s the straight path at
time t is that of z at time t / (t + s (1 - t)), up to a factor. How well a run draws: `latentflow evaluate RUN DATA`.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor

from latentflow import LatentFlowPipeline
from latentflow.evaluation.data import ImageSet, held_out, load_images, open_source, run_settings
from latentflow.evaluation.figures import VALIDATION_TIMES, reconstruction
from latentflow.flow import Velocity

BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    asked = parser.parse_args()
    for run in asked.runs:
        model: Any = LatentFlowPipeline.from_pretrained(f"{run}/pipeline").model
        settings = run_settings(run, asked.data)
        source = held_out(open_source(asked.data, settings), settings)
        images = load_images(model, source, settings["background"])
        print(json.dumps({"run": run, "images": len(images), **figures(model, images)}), flush=True)


@torch.no_grad()
def figures(model: Any, images: ImageSet) -> dict[str, Any]:
    """Return PSNR, spread and the loss of latents of a spread of one, with its standard error over the images."""
    latents = torch.cat([model.encode(part).cpu() for part in images.images.split(BATCH)])
    spread = float(latents.std())
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    losses = []
    for start in range(0, len(latents), BATCH):
        rows = slice(start, start + BATCH)
        velocity = model.velocity(model.encode_prompt(images.captions[rows]), 1.0)
        losses.append(
            torch.stack(
                [scaled_loss(velocity, noise[rows], latents[rows], t, spread) for t in VALIDATION_TIMES]
            )
        )
    found = torch.cat(losses, 1)  # (times, images)
    return {
        "psnr": round(float(reconstruction(model, images.images, BATCH)["psnr"]), 2),
        "spread": round(spread, 3),
        "loss": round(float(found.mean()), 4),
        "error": round(float(found.mean(0).std() / len(latents) ** 0.5), 4),
        "by_time": [round(float(value), 3) for value in found.mean(1)],
    }


def scaled_loss(velocity: Velocity, x0: Tensor, latents: Tensor, t: float, spread: float) -> Tensor:
    """Return the losses (B,) of y = latents / spread at time t, of a velocity of the latents themselves."""
    y = latents / spread
    yt = t * y + (1 - t) * x0
    time = t / (t + spread * (1 - t))
    x = (1 - time) / (1 - t) * yt
    data = (x + (1 - time) * velocity(x, torch.tensor(time))) / spread
    return ((data - yt) / (1 - t) - (y - x0)).square().flatten(1).mean(1)


if __name__ == "__main__":
    main()
