"""Measure how fast images and cached latents are loaded, and the memory that a million of them take.

    python benchmarks/loading.py FOLDER [--resolution 128] [--repeats 5] [--images 1024]
    python benchmarks/loading.py --entries 10000 100000 1000000

The first form compares, turn by turn, a plain `torchvision.datasets.ImageFolder` with a DataLoader of as many processes
as there are cores, with images read as latentflow reads them (the same transform: same resize filter, crop and type)
from the folder and from WebDataset shards of it, and with cached latents. FOLDER holds images in subfolders.

The second form makes folders of random latents (4 x 8 x 8) and starts a training on each in a process of its own:
seconds from the start of the data's set-up to the end of the first training step (imports not counted), and memory
after 200 further batches, without the mapped pages, which the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from latentflow.autoencoder import build_autoencoder
from latentflow.config import AutoencoderConfig, DataConfig, FlowConfig
from latentflow.data import LatentTable, Source, cached_latents, find_source, one_size, readable, split
from latentflow.data.cache.store import Shard, digests
from latentflow.data.cache.tensors import read_pixels
from latentflow.data.dataset import Example
from latentflow.data.images import to_pixels, to_rgb
from latentflow.data.sources.precomputing import Precomputation, describe, write_index
from latentflow.models import DiT
from latentflow.training.loop.data_order import DataOrder
from latentflow.training.losses.flow import FlowLoss
from latentflow.training.losses.latent_data import BucketData, LatentData

BATCH, SIDE = 64, 64
TINY = AutoencoderConfig(autoencoder_widths=(8, 8, 8, 8), encoder_layers=(0, 1, 1, 1), decoder_layers=(0, 1, 1, 1),
                         latent_channels=4)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- throughput


def plain(folder: Path, resolution: int, count: int) -> int:
    """ImageFolder and DataLoader; the number of images."""
    from PIL import ImageOps

    def transform(image: Image.Image) -> torch.Tensor:
        size = (resolution, resolution)
        return to_pixels(ImageOps.fit(to_rgb(image), size, method=Image.Resampling.LANCZOS))

    data: Any = torch.utils.data.Subset(ImageFolder(str(folder), transform, loader=Image.open), range(count))
    return sum(len(batch) for batch, _ in DataLoader(data, BATCH, num_workers=os.cpu_count() or 1))


def ours(source: Source, resolution: int, count: int) -> int:
    """Images as the cache is filled with them."""
    done = 0
    for batch in batched(read_pixels(source.examples[:count], resolution)):
        done += len(torch.stack(batch))
    return done


def batched(items: Iterator[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    part = []
    for item in items:
        part.append(item)
        if len(part) == BATCH:
            yield part
            part = []
    if part:
        yield part


def latents(data: LatentData) -> int:
    """Batches of cached latents, one epoch in training's order, the first of the process: rows are verified."""
    order = DataOrder(size=len(data), batch_size=BATCH)
    return sum(
        len(data.__getitems__(draws)["latents"]) for draws in order.batches(0, max(1, len(data) // BATCH), 0)
    )


def write_tar(source: Source, count: int, path: Path) -> None:
    """The first images, as they are, in one WebDataset shard."""
    with tarfile.open(path, "w") as tar:
        for number, example in enumerate(source.examples[:count]):
            content = Path(example.path).read_bytes()  # type: ignore[attr-defined]
            info = tarfile.TarInfo(f"{number:08d}.jpg")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def throughput(folder: Path, resolution: int, repeats: int, count: int) -> None:
    source = find_source(str(folder), condition="none")
    count = min(count, len(source))
    vae = build_autoencoder(TINY, resolution).eval()
    some = source.subset(list(range(count)))
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["LATENTFLOW_CACHE"] = f"{temporary}/cache"
        cached_latents(some, vae, resolution, flips=False, progress=False)
        write_tar(source, count, Path(temporary) / "shard.tar")
        tar = find_source(f"{temporary}/shard.tar", condition="none")

        def from_cache() -> int:
            table = cached_latents(some, vae, resolution, flips=False, progress=False)
            return timed_inside(LatentData(one_size(some, (SIDE, SIDE)), [BucketData(table)], {}))

        ways: dict[str, Callable[[], int]] = {
            "ImageFolder + DataLoader": lambda: plain(folder, resolution, count),
            "latentflow, JPEG folder": lambda: ours(source, resolution, count),
            "latentflow, WebDataset shard": lambda: ours(tar, resolution, count),
            "latentflow, cached latents": from_cache,
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                start = time.perf_counter()
                done = way()
                seconds = TIMED.pop() if TIMED else time.perf_counter() - start
                rates[name].append(done / seconds)
    print(f"{count} images at {resolution} px, {os.cpu_count()} cores; images a second (range), and the ratio "
          f"to ImageFolder + DataLoader of the same round")  # fmt: skip
    base = rates["ImageFolder + DataLoader"]
    for name, values in rates.items():
        ratios = [one / other for one, other in zip(values, base, strict=True)]
        print(
            f"{name:30} {statistics.median(values):10.0f} ({min(values):.0f} to {max(values):.0f})   "
            f"{statistics.median(ratios):8.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


TIMED: list[float] = []  # seconds of a turn that times itself


def timed_inside(data: LatentData) -> int:
    """An epoch of latents, without what comes before it (hashing the images, which every start does once)."""
    start = time.perf_counter()
    done = latents(data)
    TIMED.append(time.perf_counter() - start)
    return done


# ---------------------------------------------------------------------------------------------------- many entries


class Nothing(Example):
    """An image that is only counted."""

    def open(self) -> Image.Image:
        raise NotImplementedError

    def content_key(self) -> str:
        return f"{int(self.name):064x}"


def write_random(folder: Path, entries: int) -> None:
    """A folder of random latents of ``entries`` images in ten classes."""
    torch.manual_seed(0)
    vae = build_autoencoder(TINY, SIDE)
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scaling_factor=1.0)
    classes = tuple(f"class {number}" for number in range(10))
    examples = tuple(Nothing(f"{number:08d}", label=classes[number % 10]) for number in range(entries))
    source = Source("random", examples, "class", classes)
    job = Precomputation(
        framing=one_size(source, (SIDE, SIDE)), vae=vae, data=DataConfig(data=""), pixels=False, given=""
    )
    vae.save_pretrained(folder / "autoencoder")
    (folder / "latents").mkdir()
    for start in range(0, entries, 4096):
        keys = digests(example.content_key() for example in examples[start : start + 4096])
        Shard(keys, {"mean": torch.randn(len(keys), 1, 4, 8, 8).numpy()}).write(folder / "latents")
    describe(job, folder, complete=True, index=write_index(job.framing, folder, np.arange(entries)))


def start_training(folder: Path) -> None:
    """Set up the data of a folder, take one step, read 200 batches; prints a line of JSON."""
    torch.set_num_threads(1)
    start, used = time.perf_counter(), time.process_time()
    source = readable(find_source(str(folder)))
    training, _ = (source.subset(rows) for rows in split(source, 0.02))
    from latentflow import load_autoencoder

    vae = load_autoencoder(source.autoencoder)  # type: ignore[attr-defined]
    table: LatentTable = cached_latents(training, vae, SIDE, flips=False, progress=False)
    data = LatentData(
        one_size(training, (SIDE, SIDE)),
        [BucketData(table)],
        {"class_labels": torch.as_tensor(training.class_ids())},
    )
    network = DiT(in_channels=4, width=64, depth=2, heads=2, sample_size=8, num_classes=10)
    stage = FlowLoss(network, FlowConfig(), 0)
    batches = DataOrder(size=len(data), batch_size=BATCH).batches(0, 201, 0)
    draws = next(batches)
    stage(data.__getitems__(draws) | {"sample_ids": [draw.sample_id for draw in draws]})["loss"].backward()
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    for draws in batches:
        data.__getitems__(draws)
    told = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    sizes = {name: int(told[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile", "VmHWM")}
    print(json.dumps({"entries": len(source), "seconds": seconds, "cpu": cpu} | sizes))


def many(entries: list[int]) -> None:
    results = []
    for number in entries:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_random(folder, number)
            command = [sys.executable, __file__, "--start", str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
        one = results[-1]
        print(
            f"{one['entries']:8} latents: first step after {one['seconds']:.1f} s ({one['cpu']:.1f} s of one "
            f"core); memory {one['RssAnon']:.0f} MiB "
            f"({one['RssAnon'] / results[0]['RssAnon']:.2f} of the first), mapped pages {one['RssFile']:.0f} MiB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--entries", type=int, nargs="+")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        start_training(options.start)
    elif options.entries:
        many(options.entries)
    elif options.folder:
        throughput(options.folder, options.resolution, options.repeats, options.images)
    else:
        parser.error("give a folder, or --entries")


if __name__ == "__main__":
    main()
