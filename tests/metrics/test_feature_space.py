"""How well the learned space sees, on real photos; and the wiring of Inception's."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from latentflow.data import to_tensor
from latentflow.metrics import features, frechet_distance, learned, neighbour_labels

from ..models.test_vision import installed
from .test_learned import Levels


def test_inception_sees_bytes_and_gives_its_own_features(monkeypatch: pytest.MonkeyPatch) -> None:
    learned._kept_fid.cache_clear()
    monkeypatch.setattr(learned, "open_fid", lambda: SimpleNamespace(inception=Levels()))
    levels = torch.tensor([-1.0, 0.0, 1.0, 3.0])
    found = features(levels[:, None, None, None].expand(4, 3, 8, 8), "inception")
    assert found.tolist() == [[level] * 3 for level in (0, 128, 255, 255)]
    learned._kept_fid.cache_clear()


def load(files: list[Path]) -> Tensor:
    """Load whole images on white, at the network's own size."""
    images = []
    for file in files:
        image = Image.open(file).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        images.append(
            Image.alpha_composite(white, image).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
        )
    return torch.stack([to_tensor(image) for image in images])


@pytest.mark.data
@pytest.mark.slow
@installed
def test_the_learned_space_tells_classes_apart_and_halves_of_one_set_are_near(data_folder: Path) -> None:
    """70 training and 20 test photos of each of ten classes (`clothing`), 5-NN; all photos against `emoji`."""
    order, space = random.Random(0), "efficientnet-lite0"
    by_class = {}
    for folder in sorted((data_folder / "clothing" / "train").iterdir()):
        files = sorted(folder.iterdir())
        order.shuffle(files)
        by_class[folder.name] = files
    rows = {name: features(load(files), space) for name, files in by_class.items()}
    found = neighbour_labels(
        torch.cat([part[70:90] for part in rows.values()]),
        torch.cat([part[:70] for part in rows.values()]),
        [name for name in rows for _ in range(70)],
    )
    right = [one == name for one, name in zip(found, [name for name in rows for _ in range(20)], strict=True)]
    assert sum(right) / len(right) >= 0.75

    every = torch.cat(list(rows.values()))
    every = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
    half, other = every.tensor_split(2)
    drawings = sorted((data_folder / "emoji" / "train").glob("*.png"))
    order.shuffle(drawings)
    far = frechet_distance(half, features(load(drawings[: len(half)]), space))
    assert frechet_distance(half, other) <= 0.05 * far
