"""Previews on the page: decoded by a tiny autoencoder while an image is drawn."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderTiny
from PIL import Image

pytest.importorskip("gradio", reason='needs Gradio: pip install -e ".[app]"')

from latentflow import autoencoder, load_autoencoder
from latentflow.autoencoder import downscale_factor, latent_channels, open_decoder
from latentflow.errors import UserError
from latentflow.web.inference_server import GenerationRequest, InferenceServer

from .test_serving import begin, serving


def tiny(checkpoint: Path, folder: Path, channels: int | None = None) -> str:
    vae = load_autoencoder(checkpoint)
    levels = downscale_factor(vae).bit_length()
    ones, widths = (1,) * levels, (8,) * levels
    AutoencoderTiny(
        latent_channels=channels or latent_channels(vae), num_encoder_blocks=ones, num_decoder_blocks=ones,
        encoder_block_out_channels=widths, decoder_block_out_channels=widths,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def test_a_preview_after_each_step(caption_checkpoint: Path, tmp_path: Path) -> None:
    server = InferenceServer(
        str(caption_checkpoint), "cpu", preview_vae=tiny(caption_checkpoint, tmp_path / "v")
    )
    plain = InferenceServer(str(caption_checkpoint), "cpu")
    asked, shown = GenerationRequest(prompt="red", steps=3, images=2), []

    def progress(done: int, total: int, what: str, *images: list[Image.Image]) -> None:
        shown.extend(images)

    drawn = server.generate(asked, progress)
    assert [len(images) for images in shown] == [2, 2, 2] and shown[0][0].size == drawn[0].size
    same = plain.generate(asked, lambda done, total, what: None)
    assert [image.tobytes() for image in drawn] == [image.tobytes() for image in same]


def test_an_autoencoder_of_other_latents_is_refused(caption_checkpoint: Path, tmp_path: Path) -> None:
    server = InferenceServer(
        str(caption_checkpoint), "cpu", preview_vae=tiny(caption_checkpoint, tmp_path / "v", channels=7)
    )
    with pytest.raises(UserError, match="7 channels"):
        server.generate(GenerationRequest(prompt="red", steps=1), lambda done, total, what: None)


def test_two_first_requests_open_it_once(
    caption_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not while another image is drawn: its check lets it decode for the checkpoint's own for a moment."""
    server = InferenceServer(
        str(caption_checkpoint), "cpu", preview_vae=tiny(caption_checkpoint, tmp_path / "v")
    )
    opened = []

    def opening(*given: Any, **options: Any) -> Any:
        opened.append(server._sampling.locked())
        time.sleep(0.2)
        return open_decoder(*given, **options)

    monkeypatch.setattr(autoencoder, "open_decoder", opening)
    asked = GenerationRequest(prompt="red", steps=1)
    with ThreadPoolExecutor() as pool:
        requests = [pool.submit(server.generate, asked, lambda *given: None) for _ in range(2)]
        first, second = (request.result()[0].tobytes() for request in requests)
    assert opened == [True] and first == second


def test_the_page_shows_previews_before_the_images(caption_checkpoint: Path, tmp_path: Path) -> None:
    server = InferenceServer(
        str(caption_checkpoint), "cpu", preview_vae=tiny(caption_checkpoint, tmp_path / "v")
    )
    (tmp_path / "uploads").mkdir()
    with serving(server, tmp_path / "uploads") as client:
        event = begin(client, prompt="red", steps=100)
        lines = client.get(f"/call/v2/generate/{event}").text.splitlines()
    answers: list[tuple[str, Any]] = [
        (kind.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for kind, data in pairwise(lines)
        if kind.startswith("event: ") and data.startswith("data: ")
    ]
    captions = [
        (kind, data["images"] if isinstance(data, dict) and "images" in data else data)
        for kind, data in answers
    ]
    assert captions[-1][0] == "complete" and "seed " in json.dumps(captions[-1][1])
    assert any(kind == "generating" and '"preview"' in json.dumps(data) for kind, data in captions), lines
