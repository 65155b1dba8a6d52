"""Tables are keyed by content and by what made them, survive damage, and stay out of the data."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from threading import get_ident

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.data import (
    Source,
    cached_latents,
    cached_pixels,
    cached_text,
    find_source,
    fingerprint,
    pixels_to_images,
)
from latentflow.data.cache import tensors as module
from latentflow.errors import UserError

from .images import noise, save_all


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATENTFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_all(tmp_path / "data", ["a.png", "b.png", "c.png"])
    return tmp_path / "data"


def pixels(source: Source, resolution: int = 8, background: str = "white") -> torch.Tensor:
    return cached_pixels(source, resolution, background)[:]


def tables(cache: Path) -> set[Path]:
    return set(cache.rglob("*.safetensors"))


def test_pixels_are_those_of_the_files_in_the_order_of_the_source(folder: Path, cache: Path) -> None:
    source = find_source(str(folder))
    for _ in range(2):  # made, then loaded
        table = pixels(source)
        assert table.dtype == torch.uint8 and table.shape == (3, 3, 8, 8)
        for row, name in zip(table, "abc", strict=True):
            assert np.array_equal(row.permute(1, 2, 0), np.asarray(Image.open(folder / f"{name}.png")))
    assert len(tables(cache)) == 1 and not list(cache.rglob("*.tmp"))
    assert torch.equal(pixels(source.subset([2, 0])), table[[2, 0]])
    (folder / "b.png").rename(folder / "z.png")
    assert torch.equal(pixels(find_source(str(folder))), table[[0, 2, 1]])
    assert len(tables(cache)) == 1  # under another name, too


def test_an_edit_in_place_is_seen(folder: Path, cache: Path) -> None:
    source = find_source(str(folder))
    before, fingerprint_before = pixels(source), source.fingerprint()
    noise(77).save(folder / "b.png")
    after = pixels(source)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert np.array_equal(after[1].permute(1, 2, 0), np.asarray(noise(77)))
    assert source.fingerprint() != fingerprint_before


def test_another_transform_is_another_table(folder: Path, cache: Path) -> None:
    source = find_source(str(folder))
    assert pixels(source, 8).shape != pixels(source, 4).shape
    pixels(source, 8, "black")
    pixels(source, 8, "#000000")  # the same colour
    assert len(tables(cache)) == 3


def test_never_inside_the_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTFLOW_CACHE", str(folder / "cache"))
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=r"lies inside the data .*\n.*set LATENTFLOW_CACHE"):
        pixels(find_source(str(folder)))
    assert sorted(folder.rglob("*")) == before


def test_a_cache_that_cannot_be_written_is_done_without(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert pixels(find_source(str(folder))).shape == (3, 3, 8, 8)
    assert "could not be cached" in caplog.text


def test_an_unreadable_image_is_named(folder: Path, cache: Path) -> None:
    (folder / "b.png").write_text("no image")
    with pytest.raises(UserError, match=r"cannot read b.png"):
        pixels(find_source(str(folder)))


# --- latents ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae() -> torch.nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        latents_mean=[0.5, -1.0, 0.0, 2.0],
        latents_std=[2.0, 0.5, 1.0, 4.0],
        scaling_factor=1.0,
    ).eval()


def test_latents_with_and_without_their_mirror_images(
    folder: Path, cache: Path, vae: torch.nn.Module
) -> None:
    source = find_source(str(folder))
    images = pixels_to_images(pixels(source))
    mean, std = torch.tensor([[0.5, -1.0, 0.0, 2.0], [2.0, 0.5, 1.0, 4.0]])[:, :, None, None]
    for _ in range(2):
        table = cached_latents(source, vae, 8, batch_size=2, progress=False)
        assert table.std is not None and table.mean.shape == table.std.shape == (3, 2, 4, 8, 8)
        for view, batch in enumerate((images, images.flip(-1))):
            with torch.no_grad():
                wanted = vae.encode(batch).latent_dist
            torch.testing.assert_close(table.mean[:, view], (wanted.mean - mean) / std, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(table.std[:, view], wanted.std / std, rtol=1e-4, atol=1e-5)
    assert len(tables(cache / "latents")) == 1
    without = cached_latents(source.subset([1]), vae, 8, flips=False, progress=False)
    torch.testing.assert_close(without.mean[:], table.mean[1:2, :1], rtol=1e-4, atol=1e-5)


def test_an_edited_image_is_encoded_again_and_only_it(
    folder: Path, cache: Path, vae: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, posteriors = [], module._posteriors

    def counting(vae: object, pixels: torch.Tensor, *rest: object) -> object:
        encoded.append(len(pixels))
        return posteriors(vae, pixels, *rest)

    monkeypatch.setattr(module, "_posteriors", counting)
    source = find_source(str(folder))
    before = cached_latents(source, vae, 8, progress=False).mean[:]
    assert encoded == [3]
    noise(99).save(folder / "b.png")
    (folder / "d.png").write_bytes((folder / "a.png").read_bytes())
    after = cached_latents(find_source(str(folder)), vae, 8, progress=False).mean[:]
    assert encoded == [3, 1] and torch.equal(after[[0, 2, 3]], before[[0, 2, 0]])
    assert not torch.equal(after[1], before[1])
    cached_latents(source.subset([2, 0]), vae, 8, progress=False)
    assert encoded == [3, 1]  # another set of the same images
    cached_latents(source, vae, 4, progress=False)
    assert encoded == [3, 1, 3]


def test_an_image_that_changes_while_it_is_read_is_not_stored(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = module._pixels

    def edit(example: object, **settings: object) -> torch.Tensor:
        read = prepare(example, **settings)
        new = folder.parent / f"new-{get_ident()}.png"  # each of the threads that read has its own
        noise(98).save(new)
        new.replace(folder / "c.png")  # at once: no thread sees half an image
        return read

    monkeypatch.setattr(module, "_pixels", edit)
    with pytest.raises(UserError, match="changed while it was read"):
        pixels(find_source(str(folder)))
    assert not tables(cache)


def test_latents_know_the_weights_and_the_statistics(vae: torch.nn.Module) -> None:
    before, vae = fingerprint(vae), copy.deepcopy(vae)
    assert fingerprint(vae) == before
    vae.register_to_config(latents_mean=[0.0] * 4)
    assert fingerprint(vae) != before
    vae.register_to_config(latents_mean=[0.5, -1.0, 0.0, 2.0])
    assert fingerprint(vae) == before
    with torch.no_grad():
        vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-6
    assert fingerprint(vae) != before


# --- text ---------------------------------------------------------------------------------------------


def test_text(cache: Path) -> None:
    from latentflow.models.text import encode_text, small_text_encoder, train_tokenizer

    captions = ["a red circle", "a dot", "a red circle", "a very large blue square on the left"]
    tokenizer = train_tokenizer(captions)
    torch.manual_seed(0)
    encoder = small_text_encoder(tokenizer, width=16, depth=1, heads=2).eval()
    for _ in range(2):
        table = cached_text(captions, tokenizer, encoder, batch_size=1)
        assert len(table) == 4
        embeds, mask = table.batch(torch.arange(4))
        for row, text in enumerate(captions):
            with torch.no_grad():
                alone, tokens = encode_text(tokenizer, encoder, [text])
            assert mask[row].sum() == tokens.sum() and mask.shape[1] == mask.sum(1).max()
            torch.testing.assert_close(embeds[row][mask[row]], alone[0][tokens[0]], rtol=1e-4, atol=1e-5)
            assert (embeds[row][~mask[row]] == 0).all()
    assert len(tables(cache)) == 1
    some = cached_text([captions[3], "a small dot"], tokenizer, encoder)
    assert torch.equal(some.batch([0])[0], embeds[3:])
    assert len(tables(cache)) == 2  # only the new one was encoded
