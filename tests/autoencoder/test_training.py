"""Training our own: what is built, each loss against its formula, and a run that learns."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.io import read_image

from latentflow.autoencoder import build_autoencoder, decode, encode, has_statistics, load_autoencoder
from latentflow.autoencoder.losses import PatchDiscriminator, adaptive_weight, hinge_loss
from latentflow.config import AutoencoderConfig, DataConfig, LoopConfig
from latentflow.data import pixels_to_images
from latentflow.data.sources.shapes import train_source
from latentflow.errors import UserError
from latentflow.training.loop.data_order import SampleUse
from latentflow.training.loop.random_numbers import CounterRandom
from latentflow.training.losses.autoencoder import AutoencoderLoss, DiscriminatorLoss
from latentflow.training.losses.latent_data import PixelData, is_flipped
from latentflow.training.report.folder import read_metrics
from latentflow.training.train_autoencoder import train_autoencoder

from ..training.command import TINY, call, save_images
from ..training.forking import fork_ranks
from ..training.pretrained import photos

SMALL = AutoencoderConfig(
    latent_channels=4, autoencoder_widths=(8, 16), encoder_layers=(0, 1), decoder_layers=(1, 1), autoencoder_steps=60,
    autoencoder_batch_size=8,
)  # fmt: skip
DATA = DataConfig(data="", resolution=16, random_flip=True)


@pytest.mark.parametrize(
    ("kind", "widths"),
    [("dc", (8, 16)), ("kl", (8, 16)), ("kl", (12, 20))],  # GroupNorm wants groups that divide every width
)
def test_the_size_is_as_configured(kind: Any, widths: tuple[int, ...]) -> None:
    config = dataclasses.replace(SMALL, autoencoder_class=kind, autoencoder_widths=widths)
    vae = build_autoencoder(config, 16)
    encoded = vae.encode(torch.zeros(1, 3, 16, 16))
    latent = encoded.latent if kind == "dc" else encoded.latent_dist.mean
    assert latent.shape == (1, 4, 8, 8)
    assert vae.decode(latent).sample.shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("changes", "resolution", "message"),
    [
        (
            {"autoencoder_widths": (8, 8, 16), "encoder_layers": (0, 1, 1), "decoder_layers": (0, 1, 1)},
            21, "--resolution 20",
        ),
        ({"encoder_layers": (1,)}, 16, "one entry for each resolution"),
        ({"latent_channels": 3}, 16, "multiple"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], resolution: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_autoencoder(dataclasses.replace(SMALL, **changes), resolution)


def with_widths(widths: tuple[int, ...], full_size: tuple[int, int] = (0, 1)) -> AutoencoderConfig:
    """An AutoencoderDC of these widths; how many blocks its encoder and decoder have at full size."""
    encoder, decoder = ((blocks, *(1,) * (len(widths) - 1)) for blocks in full_size)
    return AutoencoderConfig(
        latent_channels=4, autoencoder_widths=widths, encoder_layers=encoder, decoder_layers=decoder
    )


def size_of_reconstruction(config: AutoencoderConfig) -> torch.Size:
    vae = build_autoencoder(config, 8)
    size: torch.Size = vae.decode(vae.encode(torch.zeros(1, 3, 8, 8)).latent).sample.shape
    return size


@pytest.mark.parametrize("widths", [(24, 48, 96, 128), (16, 64), (64, 16), (6, 12, 16), (8, 4)])
def test_widths_between_which_there_are_shortcuts_work(widths: tuple[int, ...]) -> None:
    for full_size in ((1, 1), (0, 1), (0, 0)):
        assert size_of_reconstruction(with_widths(widths, full_size)) == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("widths", "pairs", "nearest"),
    [
        ((16, 48, 96, 160), "16 48 nor 96 160", "12 48 96 192"),
        ((24, 64, 128, 256), "24 64", "32 64 128 256"),
        ((8, 64), "8 64", ""),
        ((16, 96, 20), "16 96 nor 96 20", ""),
        ((7, 14, 28), "7 14", ""),
    ],
)
def test_other_widths_are_refused_with_the_nearest_that_work(
    widths: tuple[int, ...], pairs: str, nearest: str
) -> None:
    with pytest.raises(UserError, match=f"cannot join {pairs};") as error:
        build_autoencoder(with_widths(widths), 8)
    assert error.value.fix.endswith(f"--autoencoder-widths {nearest}" if nearest else "")
    proposed = tuple(map(int, re.findall(r"\d+", error.value.fix)))
    assert len(proposed) == len(widths)
    assert size_of_reconstruction(with_widths(proposed)) == (1, 3, 8, 8)


def test_nothing_is_asked_of_a_width_that_is_not_used_nor_of_the_other_class() -> None:
    assert size_of_reconstruction(with_widths((16, 96, 96), (0, 0))) == (1, 3, 8, 8)
    with pytest.raises(UserError, match="16 18"):
        build_autoencoder(with_widths((16, 18, 36), (0, 0)), 8)
    build_autoencoder(dataclasses.replace(with_widths((16, 48, 160)), autoencoder_class="kl"), 8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--autoencoder-widths", 16, 96, "--decoder-layers", 1, 1], "cannot join 16 96; "),
        (["--equivariance", 1.5], "--equivariance is 1.5"),
        (["--latent-noise", -1], "--latent-noise is -1.0"),
        (["--learning-rate", 1e-4], "The autoencoder's is --autoencoder-learning-rate"),
        (["--lr-decay-share=1"], "the autoencoder has no such setting"),
        (["--no-shard"], "--shard is a setting of generators"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_mistakes_are_one_screen_without_a_traceback(
    flags: list[object], message: str, tmp_path: Path
) -> None:
    data = save_images(tmp_path / "images", *(f"{number}.png" for number in range(5)))
    own = TINY[: TINY.index("--network-preset")]
    said = call(tmp_path, data, "-o", tmp_path / "run", *own, *flags, file="autoencoder", expect=2)
    assert message in said and "Traceback" not in said and len(said.splitlines()) < 20


def test_hinge_loss_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    assert float(hinge_loss(real, fake)) == pytest.approx(0.5 * (0.25 + 0.75))


def test_adaptive_weight_equalises_the_gradients_at_the_last_layer() -> None:
    layer = nn.Parameter(torch.tensor([1.0, 2.0]))
    reconstruction, adversarial = (
        (layer * torch.tensor([3.0, 4.0])).sum(),
        0.1 * (layer * torch.tensor([3.0, 4.0])).sum(),
    )
    assert float(adaptive_weight(reconstruction, adversarial, layer)) == pytest.approx(10.0, rel=1e-4)


def test_the_kl_term_is_the_closed_form() -> None:
    config = dataclasses.replace(SMALL, autoencoder_class="kl", kl_weight=0.5)
    torch.manual_seed(0)
    vae = build_autoencoder(config, 16)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    values = AutoencoderLoss(vae, config, 0)({"images": images, "sample_ids": [0, 1, 2]})
    posterior = vae.encode(images).latent_dist
    closed = (
        0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.var.log()).flatten(1).sum(1).mean()
    )
    assert float(values["kl"]) == pytest.approx(float(closed.detach()) / images[0].numel(), rel=1e-4)
    assert float(values["loss"].detach()) == pytest.approx(float(values["l1"] + 0.5 * values["kl"]), rel=1e-5)


def test_the_decoder_learns_from_samples_of_the_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with the noise of its own running number."""
    config = dataclasses.replace(SMALL, autoencoder_class="kl")
    torch.manual_seed(0)
    vae = build_autoencoder(config, 16)
    images, seen = torch.rand(3, 3, 16, 16) * 2 - 1, list[torch.Tensor]()
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda latents: (seen.append(latents), decode(latents))[1])
    AutoencoderLoss(vae, config, 5)({"images": images, "sample_ids": [7, 8, 9]})
    posterior = vae.encode(images).latent_dist
    noise = CounterRandom(5, [7, 8, 9]).normal(posterior.mean.shape[1:])
    torch.testing.assert_close((seen[0] - posterior.mean) / posterior.std, noise, rtol=1e-3, atol=1e-3)


def test_both_sides_of_the_adversarial_loss_are_their_formulas() -> None:
    config = dataclasses.replace(SMALL, adversarial_weight=0.3, adversarial_start=0)
    torch.manual_seed(0)
    vae, discriminator = build_autoencoder(config, 16), PatchDiscriminator(8)
    stage = AutoencoderLoss(vae, config, 0, discriminator)
    images = torch.rand(8, 3, 16, 16) * 2 - 1
    values = stage({"images": images, "sample_ids": list(range(8))})
    made = vae.decode(vae.encode(images).latent).sample
    l1, adversarial = (made - images).abs().mean(), -discriminator(made).mean()  # scored as real, it is low
    torch.testing.assert_close(values["adversarial"], adversarial.detach(), rtol=1e-4, atol=1e-6)
    last = [one for one in vae.decoder.modules() if isinstance(one, nn.Conv2d)][-1].weight
    factor = adaptive_weight(l1, adversarial, last)
    torch.testing.assert_close(values["loss"], l1 + 0.3 * factor * adversarial, rtol=1e-3, atol=1e-5)
    result = DiscriminatorLoss(discriminator, stage)({})
    real, fake = discriminator(images), discriminator(made.detach())
    expected = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
    torch.testing.assert_close(result["loss"], expected, rtol=1e-4, atol=1e-6)
    assert not values["adversarial"].requires_grad and real.mean() != fake.mean()
    stage.eval()  # a validation is of what is drawn
    assert "adversarial" not in stage({"images": images, "sample_ids": list(range(8))})


def test_half_of_the_images_are_mirrored_each_use_by_its_number() -> None:
    source = train_source().subset([0, 1])
    pixels = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    draws = [SampleUse(number % 2, number) for number in range(2000)]
    plain, flipped = (
        PixelData(source, pixels, flips=flips).__getitems__(draws)["images"] for flips in (False, True)
    )
    torch.testing.assert_close(plain[:2], pixels.float() / 127.5 - 1)
    mirrored = torch.tensor([is_flipped(draw.sample_id) for draw in draws])
    assert torch.equal(flipped[mirrored], plain[mirrored].flip(-1))
    assert torch.equal(flipped[~mirrored], plain[~mirrored])
    for image in (0, 1):
        assert 0.4 < mirrored[image::2].float().mean() < 0.6


def test_the_adversarial_term_starts_when_told_and_never_moves_the_discriminator() -> None:
    config = dataclasses.replace(SMALL, adversarial_weight=0.1, adversarial_start=2)
    torch.manual_seed(0)
    vae, discriminator = build_autoencoder(config, 16), PatchDiscriminator(8)
    stage = AutoencoderLoss(vae, config, 0, discriminator)
    other = DiscriminatorLoss(discriminator, stage)
    images = torch.rand(8, 3, 16, 16) * 2 - 1
    early = {"images": images, "sample_ids": list(range(8))}
    assert "adversarial" not in stage(early) and other(early) == {}
    late = {"images": images, "sample_ids": list(range(16, 24))}
    values = stage(late)
    values["loss"].backward()
    assert "adversarial" in values
    assert all(one.grad is None for one in discriminator.parameters())
    assert not [name for name, _ in stage.named_parameters() if "discriminator" in name]
    vae.zero_grad()
    other(late)["loss"].backward()
    assert all(one.grad is not None for one in discriminator.parameters())
    assert all(one.grad is None for one in vae.parameters())


def test_the_adversarial_term_starts_at_the_same_step_in_all_numbers_of_processes(tmp_path: Path) -> None:
    """Two processes have twice the samples of a step: counted in samples it would start earlier, and in one of them."""
    source = train_source().subset(list(range(0, 400, 20)))
    loop = LoopConfig(
        validation_steps=0, preview_steps=0, lr_warmup_steps=2, mixed_precision="no", log_steps=1
    )
    config = dataclasses.replace(
        SMALL, autoencoder_steps=7, adversarial_weight=0.1, adversarial_start=3, equivariance=0.5
    )

    def train(folder: Path, batch: int) -> None:
        one = dataclasses.replace(config, autoencoder_batch_size=batch)
        assert train_autoencoder(source, source.subset([]), one, loop, folder, DATA) is not None

    def told(folder: Path) -> list[int]:
        rows = read_metrics(folder)
        assert [row["step"] for row in rows] == list(range(1, 8))
        assert all(("discriminator" in row) == ("adversarial" in row) for row in rows)
        return [int(row["step"]) for row in rows if "adversarial" in row]

    train(tmp_path / "one", 8)
    ranks = fork_ranks(2, lambda rank: train(tmp_path / "two", 4))
    assert [os.waitpid(one, 0)[1] for one in ranks] == [0, 0]
    assert (
        told(tmp_path / "one") == told(tmp_path / "two") == [4, 5, 6, 7]
    )  # from the fourth: three have none
    # Before it starts, and in what is turned alike, two processes learn what one learns.
    first, second = ([row["loss"] for row in read_metrics(tmp_path / name)] for name in ("one", "two"))
    assert first[:3] == pytest.approx(second[:3], rel=1e-3)


@pytest.mark.parametrize(("kind", "adversarial"), [("dc", 0.0), ("kl", 0.1)])
def test_a_short_run_learns_reports_held_out_psnr_and_stores_statistics(
    kind: Any, adversarial: float, tmp_path: Path
) -> None:
    source = train_source()
    train, validation = source.subset(list(range(0, 400, 4))), source.subset(list(range(1, 60, 4)))
    config = dataclasses.replace(
        SMALL, autoencoder_class=kind, adversarial_weight=adversarial, adversarial_start=40
    )
    loop = LoopConfig(
        validation_steps=30, preview_steps=60, lr_warmup_steps=5, ema_decay=0.9, mixed_precision="no"
    )
    vae = train_autoencoder(train, validation, config, loop, tmp_path, DATA)
    assert vae is not None and has_statistics(vae)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    psnrs = [row["val_psnr"] for row in rows if "val_psnr" in row]
    assert len(psnrs) == 2 and psnrs[1] > psnrs[0] and psnrs[1] > 12
    assert all("val_ssim" in row for row in rows if "val_psnr" in row)
    assert (tmp_path / "samples" / "step-000060.png").is_file()
    if adversarial:
        assert any("discriminator" in row for row in rows)


# ---- from an autoencoder ----


def start(folder: Path, kind: Any = "dc", *, statistics: bool = True) -> Path:
    torch.manual_seed(0)
    vae = build_autoencoder(dataclasses.replace(SMALL, autoencoder_class=kind), 16)
    if statistics:
        vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[0.5, 0.6, 0.7, 0.8])
    vae.save_pretrained(folder)
    return folder


ON = (
    "--autoencoder-batch-size",
    8,
    "--mixed-precision",
    "no",
    "--validation-steps",
    100,
    "--lr-warmup-steps",
    2,
)


@pytest.mark.parametrize("kind", ["dc", "kl"])
def test_training_only_the_decoder_keeps_the_latents_bit_for_bit(kind: Any, tmp_path: Path) -> None:
    data, before = photos(tmp_path / "data", 16, 24, captions=False), start(tmp_path / "start", kind)
    line = [data, "--resolution", 16, *ON, "--autoencoder-steps", 30, "--init-from", before, "--decoder-only"]
    said = call(tmp_path, *line, "--latent-noise", 0.3, "-o", tmp_path / "run", file="autoencoder")
    assert "latentflow generate --checkpoint CHECKPOINT --vae" in said
    old, new = load_autoencoder(before), load_autoencoder(tmp_path / "run" / "autoencoder")
    assert {key: new.config[key] for key in ("latents_mean", "latents_std")} == {
        key: old.config[key] for key in ("latents_mean", "latents_std")
    }
    weights = new.state_dict()
    same = {name for name, value in old.state_dict().items() if torch.equal(value, weights[name])}
    trained = {name for name in weights if name.startswith(("decoder.", "post_quant_conv."))}
    assert same == weights.keys() - trained and trained

    images = pixels_to_images(torch.stack([read_image(str(file)) for file in sorted(data.glob("*.png"))[:8]]))
    latents = encode(old, images)
    assert torch.equal(latents, encode(new, images))
    noisy = latents + 0.2 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    for decoded in (latents, noisy):
        errors = [float((decode(vae, decoded) - images).abs().mean()) for vae in (old, new)]
        assert errors[1] < 0.9 * errors[0]


def test_an_autoencoder_is_trained_on_whole_and_measured_anew(tmp_path: Path) -> None:
    data, before = photos(tmp_path / "data", 16, 24, captions=False), start(tmp_path / "start")
    line = [data, "--resolution", 16, *ON, "--init-from", before, "-o", tmp_path / "run"]
    call(tmp_path, *line, "--autoencoder-steps", 4, file="autoencoder")
    old, new = load_autoencoder(before), load_autoencoder(tmp_path / "run" / "autoencoder")
    assert new.config.latents_mean != old.config.latents_mean
    changed = [not torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)
    moved = [*line[:-3], before.rename(tmp_path / "moved"), *line[-2:]]
    call(tmp_path, *moved, "--autoencoder-steps", 6, file="autoencoder")  # goes on
    assert [row["step"] for row in read_metrics(tmp_path / "run")][-1] == 6
    with torch.no_grad():
        next(old.parameters()).add_(0.1)
    old.save_pretrained(tmp_path / "moved")
    said = call(tmp_path, *moved, "--autoencoder-steps", 8, file="autoencoder", expect=2)
    assert "init_from" in said and "--allow-changes" in said
    begun = [*line[:-4], *line[-2:], "--decoder-only"]  # without --init-from, where a run is already
    assert "--init-from AUTOENCODER" in call(tmp_path, *begun, file="autoencoder", expect=2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--decoder-only",), "--init-from AUTOENCODER"),
        (("--init-from", "START", "--latent-channels", 8), "--latent-channels with --init-from"),
        (("--init-from", "START", "--autoencoder-widths", 8, 16), "--autoencoder-widths with --init-from"),
        (
            ("--init-from", "START", "--decoder-only", "--equivariance", 0.5),
            "--equivariance shapes the latents",
        ),
        (("--init-from", "START", "--resolution", 15), "Use --resolution 16"),
        (("--init-from", "NONE"), "there is no such folder"),
        (("--init-from", "VQ"), "a VQModel cannot be trained on"),
        (("--init-from", "OWN"), "this run's own result"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(flags: tuple[Any, ...], words: str, tmp_path: Path) -> None:
    data = photos(tmp_path / "data", 16, 24, captions=False)
    places = {
        "START": lambda: start(tmp_path / "start"),
        "VQ": lambda: start(tmp_path / "vq", "vq", statistics=False),
        "OWN": lambda: start(tmp_path / "run" / "autoencoder"),
        "NONE": lambda: tmp_path / "none",
    }
    line = [places[flag]() if flag in places else flag for flag in flags]
    said = call(
        tmp_path, data, "--resolution", 16, *line, "-o", tmp_path / "run", file="autoencoder", expect=2
    )
    assert words in said
