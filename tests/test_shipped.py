"""The checkpoints that the repository ships, and the README's first command as printed there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow import LatentFlowInpaintPipeline, LatentFlowPipeline
from latentflow.data.sources import shapes
from latentflow.metrics import psnr
from latentflow.utils.files import result_of

MEGABYTE = 1_000_000


@pytest.fixture(scope="module", params=["emoji-64", "pictograms-128"])
def pipe(request: pytest.FixtureRequest, repository: Path) -> LatentFlowPipeline:
    pipe = LatentFlowPipeline.from_pretrained(repository / "checkpoints" / request.param)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", ["emoji-64", "pictograms-128"])
def test_shipped_checkpoints_have_a_name_everywhere(name, repository, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = str(repository / "checkpoints" / name)
    assert result_of(name) == result_of(f"checkpoints/{name}") == shipped
    assert result_of(f"owner/{name}") == f"owner/{name}"
    (tmp_path / name).mkdir()  # the user's own comes first
    assert result_of(name) == name


@pytest.mark.parametrize(
    ("name", "megabytes", "words"),
    [
        (
            "emoji-64",
            40,
            ("Noto Emoji", "Apache-2.0", "memorises", "train/recipes/emoji-64.yaml", "PSNR", "`fast`"),
        ),
        (
            "pictograms-128",
            71,
            ("Fluent Emoji", "CC-BY-4.0", "memorises", "train/recipes/pictograms-128.yaml", "PSNR", "`fast`"),
        ),
    ],
)
def test_it_is_small_safe_and_has_a_card(
    name: str, megabytes: int, words: tuple[str, ...], repository: Path
) -> None:
    shipped = repository / "checkpoints" / name
    files = [path for path in shipped.rglob("*") if path.is_file()]
    fast = [path for path in files if path.parent.name == "fast"]
    size, of_fast = (sum(path.stat().st_size for path in some) for some in (files, fast))
    assert size - of_fast <= megabytes * MEGABYTE and of_fast <= 15 * MEGABYTE
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".png", ".md"}
    card = (shipped / "README.md").read_text()
    for word in words:
        assert word in card


@pytest.mark.parametrize("start", [r"pip install -e \. && latentflow generate", "latentflow generate --fast"])
def test_the_readme_s_commands_draw_a_red_apple(start: str, repository: Path, tmp_path: Path) -> None:
    readme = (repository / "README.md").read_text()
    line = re.search(rf"^{start} .*?(?= *(#.*)?$)", readme, re.MULTILINE)
    assert line is not None
    _, _, command = line[0].rpartition("latentflow ")
    # The installed command is this module: the environment of the tests may lack the script on its PATH.
    words = [sys.executable, "-m", "latentflow", *shlex.split(command)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    image = np.asarray(Image.open(tmp_path / "apple.png").convert("RGB")).astype(int)
    assert image.shape == (128, 128, 3)
    red, green, blue = image.transpose(2, 0, 1)
    is_red = (red > 150) & (green < 110) & (blue < 110)
    assert is_red[40:112, 24:104].mean() > 0.5  # an apple's worth of red in the middle
    corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners > 225).all()  # on white


def test_it_loads_in_float32_and_the_same_seed_gives_the_same_image(pipe: LatentFlowPipeline) -> None:
    assert {pipe.vae.dtype, pipe.transformer.dtype, pipe.text_encoder.dtype} == {torch.float32}

    def draw(prompt: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return pipe(prompt, num_inference_steps=4, generator=generator, output_type="pt").images

    first = draw("red heart")
    assert torch.equal(first, draw("red heart"))
    assert (first - draw("blue heart")).abs().mean() > 0.02  # the words matter


def test_its_autoencoder_copes_with_images_of_another_kind(pipe: LatentFlowPipeline) -> None:
    from latentflow.autoencoder import decode, encode

    specs, (side, _) = shapes.all_specs()[::240], pipe.model.native_size
    images = torch.stack(
        [torch.from_numpy(np.array(shapes.render(spec, side)[0])).permute(2, 0, 1) for spec in specs]
    )
    images = images / 127.5 - 1
    with torch.no_grad():
        copies = decode(pipe.vae, encode(pipe.vae, images))
    assert float(psnr(copies, images).mean()) > 22


def test_it_fills_a_hole_with_what_was_there(pipe: LatentFlowPipeline) -> None:
    """Its own image with the middle cut out: nearer to it than grey is, and the rest untouched."""
    whole = pipe("red heart", generator=torch.Generator().manual_seed(1), output_type="pt").images
    side = whole.shape[-1]
    mask = torch.zeros(1, 1, side, side)
    mask[..., side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = 1.0
    inpaint = LatentFlowInpaintPipeline.from_pipe(pipe)
    inpaint.set_progress_bar_config(disable=True)
    call = {"image": whole, "mask_image": mask, "generator": torch.Generator().manual_seed(2)}
    filled = inpaint("red heart", output_type="pt", **call).images
    kept = (mask == 0).expand_as(whole)
    assert torch.equal(filled[kept], whole[kept])
    error, grey = (
        (other - whole).square()[~kept].mean().sqrt() for other in (filled, torch.full_like(whole, 0.5))
    )
    assert error < 0.15 < grey
