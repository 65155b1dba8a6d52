"""Tiny pipelines; the stub knows the exact velocity of a Gaussian whose mean the condition decides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor, nn

from latentflow.models import Condition, DiT, encode_text, small_text_encoder, train_tokenizer
from latentflow.pipeline import LatentFlowPipeline
from latentflow.pipeline.img2img import LatentFlowImg2ImgPipeline
from latentflow.pipeline.inpaint import LatentFlowInpaintPipeline

CAPTIONS = ["a red apple", "a small blue hat", "green tree", "big yellow sun over a house"]
NAMES = {0: "apple", 1: "hat", 2: "tree"}


class GaussianFlow(ModelMixin, ConfigMixin):
    """Exact velocity of x1 ~ N(mean, SPREAD^2 I) on the straight path: it carries x0 to mean + SPREAD x0.

    The mean is the class's row, or the mean over a caption's tokens, or ``null`` for dropped rows. Guidance
    acts on the mean alone, so a guided flow ends at null + scale (mean - null) + SPREAD x0.

    With ``condition_channels`` (of ``masked_condition`` for the tiny autoencoder) the mean of a cell that is kept
    whole is its known latent, whether the row is dropped or not.
    """

    SPREAD = 0.5

    @register_to_config
    def __init__(
        self,
        in_channels: int = 2,
        sample_size: int = 4,
        num_classes: int | None = None,
        text_dim: int | None = None,
        condition_channels: int = 0,
    ) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.tensor([[1.0, -1.0], [3.0, 0.5], [-2.0, 2.0]]))
        self.null = nn.Parameter(torch.tensor([0.25, -0.5]))
        self.calls: list[tuple[int, float, torch.dtype]] = []  # (rows, t, dtype of x)

    def mean(self, cond: Condition | None, rows: int) -> Tensor:
        mean = self.null.expand(rows, -1)
        if cond is not None and cond.class_labels is not None:
            mean = self.means[cond.class_labels]
        if cond is not None and cond.text is not None:
            weight = cond.text_mask[..., None].to(cond.text.dtype)
            mean = 10.0 * (cond.text[..., :2] * weight).sum(1) / weight.sum(1).clamp_min(1.0)
        if cond is not None and cond.drop is not None:
            mean = torch.where(cond.drop[:, None], self.null, mean)
        return mean

    def forward(
        self, x: Tensor, t: Tensor, cond: Condition | None = None, return_dict: bool = False
    ) -> Tensor:
        self.calls.append((x.shape[0], float(t.flatten()[0]), x.dtype))
        m, t = self.mean(cond, x.shape[0])[:, :, None, None], t.view(-1, 1, 1, 1)
        if cond is not None and cond.channels is not None:
            m = torch.where(cond.channels[:, :4].amin(1, keepdim=True) > 0, cond.channels[:, 4:], m)
        variance = (t * self.SPREAD) ** 2 + (1 - t) ** 2
        velocity = m + (t * self.SPREAD**2 - (1 - t)) / variance * (x - t * m)
        return velocity.to(x.dtype)

    def end(self, mean: Tensor, x0: Tensor) -> Tensor:
        """Where the exact flow ends."""
        mean = mean if mean.ndim == 4 else mean.view(-1, 2, 1, 1)
        return mean + self.SPREAD * x0

    def end_from(self, mean: Tensor, x: Tensor, t: float) -> Tensor:
        """Where the exact flow ends that is at ``x`` at time ``t``."""
        mean = mean if mean.ndim == 4 else mean.view(-1, 2, 1, 1)
        return mean + self.SPREAD * (x - t * mean) / ((t * self.SPREAD) ** 2 + (1 - t) ** 2) ** 0.5


def tiny_vae(levels: int = 2, **config: Any) -> AutoencoderKL:
    """2 latent channels, downscale factor 2^(levels - 1), statistics that are neither 0 nor 1."""
    torch.manual_seed(0)
    statistics = {"latents_mean": [0.3, -0.7], "latents_std": [1.5, 0.4], "scaling_factor": 1.0}
    vae = AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        latent_channels=2,
        mid_block_add_attention=False,
        **{**statistics, **config},
    )
    return vae.eval()


def tiny_text() -> dict[str, Any]:
    torch.manual_seed(1)
    tokenizer = train_tokenizer(CAPTIONS)
    return {
        "tokenizer": tokenizer,
        "text_encoder": small_text_encoder(tokenizer, width=16, depth=1, heads=2).eval(),
    }


def awake(network: nn.Module) -> nn.Module:
    """Random numbers in place of the zeros that a fresh network's output layers start with."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def tiny_dit(depth: int = 1, **config: Any) -> DiT:
    return awake(DiT(in_channels=2, width=16, depth=depth, heads=2, sample_size=4, **config))


@pytest.fixture
def assemble() -> Callable[[Any], LatentFlowPipeline]:
    """A pipeline around a real network, with the other components that its condition needs."""

    def pipeline(network: Any) -> LatentFlowPipeline:
        text = tiny_text() if network.config.text_dim is not None else {}
        names = NAMES if network.config.num_classes is not None else None
        return quiet(LatentFlowPipeline(tiny_vae(), awake(network), id2label=names, **text))

    return pipeline


@pytest.fixture
def class_pipe() -> LatentFlowPipeline:
    return quiet(LatentFlowPipeline(tiny_vae(), GaussianFlow(num_classes=3), id2label=NAMES))


@pytest.fixture
def text_pipe() -> LatentFlowPipeline:
    return quiet(LatentFlowPipeline(tiny_vae(), GaussianFlow(text_dim=16), **tiny_text()))


@pytest.fixture
def plain_pipe() -> LatentFlowPipeline:
    return quiet(LatentFlowPipeline(tiny_vae(), GaussianFlow()))


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved caption checkpoint with a real network. Tests may read it, never write to it."""
    folder = tmp_path_factory.mktemp("dit") / "pipeline"
    LatentFlowPipeline(tiny_vae(), tiny_dit(text_dim=16), **tiny_text()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def class_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved class checkpoint with a real network."""
    folder = tmp_path_factory.mktemp("classes") / "pipeline"
    LatentFlowPipeline(tiny_vae(), tiny_dit(num_classes=3), id2label=NAMES).save_pretrained(folder)
    return folder


@pytest.fixture
def img2img_pipe() -> LatentFlowImg2ImgPipeline:
    return quiet(LatentFlowImg2ImgPipeline(tiny_vae(), GaussianFlow(num_classes=3), id2label=NAMES))


@pytest.fixture
def inpaint_pipe() -> LatentFlowInpaintPipeline:
    """Trained with masks."""
    network = GaussianFlow(num_classes=3, condition_channels=6)
    return quiet(LatentFlowInpaintPipeline(tiny_vae(), network, id2label=NAMES))


@pytest.fixture
def steered_pipe() -> LatentFlowInpaintPipeline:
    """Not trained with masks."""
    return quiet(LatentFlowInpaintPipeline(tiny_vae(), GaussianFlow(num_classes=3), id2label=NAMES))


@pytest.fixture
def program(
    load_program: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dit_folder: Path,
) -> Callable[..., list[Path]]:
    """Run a program in an empty folder, on captions unless asked otherwise; return the paths that it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: object) -> list[Path]:
        checkpoint = () if "--checkpoint" in arguments else ("--checkpoint", dit_folder)
        words = (*arguments, *checkpoint, "--device", "cpu", "--steps", 2)
        load_program(name).main([str(word) for word in words])
        return [Path(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.fixture
def images() -> Callable[..., Tensor]:
    """Fixed random images (n, 3, height, width) in [0, 1], on the 8-bit grid."""

    def draw(n: int = 1, height: int = 8, width: int = 8) -> Tensor:
        generator = torch.Generator().manual_seed(4)
        return torch.randint(0, 256, (n, 3, height, width), generator=generator).float() / 255.0

    return draw


@pytest.fixture
def x0() -> Callable[[int], Tensor]:
    """Fixed noise, (n, 2, 4, 4)."""
    return lambda n: torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def text_mean() -> Callable[[LatentFlowPipeline, str], Tensor]:
    """The stub's mean for one caption, encoded alone."""

    def mean(pipe: LatentFlowPipeline, caption: str) -> Tensor:
        with torch.no_grad():
            text, mask = encode_text(pipe.tokenizer, pipe.text_encoder, [caption])
            return pipe.transformer.mean(Condition(text=text, text_mask=mask), 1)[0]

    return mean


def pixels(path: Path | str) -> Any:
    """Levels of an image file as whole numbers, (H, W, 3)."""
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def latents_of(pipe: Any, images: Tensor) -> Tensor:
    """Latents of images in [0, 1]."""
    with torch.no_grad():
        latents: Tensor = pipe.encode_images(2.0 * images - 1.0)
    return latents
