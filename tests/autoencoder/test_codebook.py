"""Codes in training: their averages by hand, dead ones, a collapse, and that only the samples of a step matter."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import VQModel
from torch import Tensor, nn

from latentflow.autoencoder import build_autoencoder, codebook, load_autoencoder
from latentflow.autoencoder.build import grid
from latentflow.config import AutoencoderConfig
from latentflow.training.losses.autoencoder import AutoencoderLoss
from latentflow.training.losses.codebook import DEAD, CodebookLoss
from latentflow.training.report.folder import read_metrics

from ..training.command import TINY, call, save_images
from ..training.forking import run_ranks

SMALL = AutoencoderConfig(
    autoencoder_class="vq", latent_channels=4, codebook_size=16, codebook_width=3, autoencoder_widths=(8, 16),
    encoder_layers=(0, 1), decoder_layers=(1, 1), autoencoder_batch_size=8,
)  # fmt: skip
GO, SKIP = torch.tensor(False), torch.tensor(True)


def learner(codes: Tensor, *, fixed: bool = False) -> tuple[CodebookLoss, nn.Embedding]:
    """A codebook whose codes were all used alike before, four times in each step."""
    embedding = nn.Embedding(*codes.shape)
    embedding.weight.data.copy_(codes)
    loss = CodebookLoss(embedding, fixed=fixed, seed=0)
    loss.uses.fill_(4.0)
    loss.counts.fill_(4.0)
    loss.steps.fill_(10**6)  # the decay has risen
    if not fixed:
        loss.sums.copy_(4.0 * codes)
    return loss, embedding


def state(loss: CodebookLoss, embedding: nn.Embedding) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in loss.state_dict().items()} | {
        "codes": embedding.weight.detach().clone()
    }


def test_codes_are_moving_averages_of_the_latents_that_take_them() -> None:
    torch.manual_seed(0)
    codes = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    loss, embedding = learner(codes)
    counts, sums, now = torch.full((3,), 4.0).double(), 4.0 * codes.double(), codes.double()
    for step in range(3):
        near = codes[[0, 0, 1, 2, 0, 1]] + 0.5 * torch.randn(6, 2)
        loss(near.view(2, 3, 2).mT[..., None], [2 * step, 2 * step + 1])
        loss.finish_step(GO, step)
        taken = torch.cdist(near.double(), now).argmin(1)
        for code in range(3):
            counts[code] = 0.99 * counts[code] + 0.01 * (taken == code).sum()
            sums[code] = 0.99 * sums[code] + 0.01 * near[taken == code].double().sum(0)
        now = sums / counts[:, None]
        torch.testing.assert_close(embedding.weight.detach().double(), now, rtol=1e-5, atol=1e-6)
        for average in (loss.counts, loss.uses):
            torch.testing.assert_close(average.double(), counts, rtol=1e-5, atol=1e-6)
    assert int(loss.steps) == 10**6 + 3


def test_a_skipped_step_changes_nothing_whatever_its_latents_are() -> None:
    loss, embedding = learner(torch.randn(5, 2))
    before = state(loss, embedding)
    loss(torch.full((2, 2, 3, 3), torch.nan), [0, 1])
    loss.finish_step(SKIP, 0)
    after = state(loss, embedding)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_dead_codes_start_again_from_latents_of_the_batch_each_from_another() -> None:
    torch.manual_seed(0)
    loss, embedding = learner(torch.cat([torch.zeros(1, 2), 100 + torch.rand(7, 2)]))
    loss.counts[1:] = loss.uses[1:] = DEAD / 2
    latents = torch.randn(2, 2, 4, 4)
    _, before = loss(latents, [0, 1])
    loss.finish_step(GO, 0)
    rows, revived = latents.flatten(2).mT.flatten(0, 1), embedding.weight.detach()[1:]
    at = torch.cdist(revived, rows).argmin(1)
    torch.testing.assert_close(revived, rows[at], rtol=1e-5, atol=1e-6)
    assert at.unique().numel() == 7
    assert loss.counts[1:].min() > 0.1 > loss.uses[1:].max()  # alive, but not used yet
    for step in range(1, 20):
        _, after = loss(latents, [2 * step, 2 * step + 1])
        loss.finish_step(GO, step)
    assert float(before["codebook_used"]) == 1 / 8 and float(after["codebook_used"]) == 1.0
    assert float(after["perplexity"]) > 2 > 1.2 > float(before["perplexity"])


def test_a_new_codebook_starts_from_the_data_and_codes_that_find_no_latent_wait() -> None:
    embedding = nn.Embedding(40, 2)
    loss = CodebookLoss(embedding, fixed=False, seed=0)
    for step, started in ((0, 16), (1, 32), (2, 40)):
        loss(5 + torch.randn(1, 2, 4, 4), [step])
        loss.finish_step(GO, step)
        assert int((loss.counts > 0).sum()) in range(started - 2 * (step + 1), started + 3)
    assert embedding.weight.isfinite().all() and (embedding.weight.mean(1) > 2).sum() >= 38


def test_a_step_is_the_same_in_parts_and_at_a_second_try() -> None:
    latents, codes = (
        torch.randn(4, 3, 5, 5),
        torch.randn(200, 3),
    )  # more codes than are used: some start again
    states = []
    for parts in ([[0, 1, 2, 3]], [[2, 3], [0, 1]], [[0, 1, 2, 3], [0, 1], [2], [3]]):
        loss, embedding = learner(codes)
        loss.counts[100:] = 0.01
        for part in parts:
            loss(latents[part], [10 + row for row in part])
        loss.finish_step(GO, 3)
        loss.finish_step(GO, 4)  # without latents: nothing
        states.append(state(loss, embedding))
    assert all(torch.equal(states[0][name], other[name]) for other in states[1:] for name in other)
    assert not torch.equal(states[0]["codes"], codes)


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    latents, codes = torch.randn(4, 3, 5, 5), torch.randn(200, 3)

    def learn(rows: list[int], file: str) -> None:
        loss, embedding = learner(codes)
        loss.counts[100:] = 0.01
        loss(latents[rows], rows)
        loss.finish_step(GO, 0)
        torch.save(state(loss, embedding), tmp_path / file)

    learn([0, 1, 2, 3], "one")
    run_ranks(2, lambda rank: learn([rank, rank + 2], f"rank{rank}"))
    one, *two = (torch.load(tmp_path / file) for file in ("one", "rank0", "rank1"))
    assert all(torch.equal(one[name], other[name]) for other in two for name in one)


def test_gradients_pass_straight_through_and_the_commitment_is_theirs_alone() -> None:
    codes = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    loss, embedding = learner(codes)
    latents = (
        torch.tensor([[0.1, 0.2], [0.8, 0.6]]).mT.view(1, 2, 2, 1).requires_grad_()
    )  # near 0, and near 1
    quantised, values = loss(latents, [0])
    torch.testing.assert_close(quantised[0, :, :, 0].mT, codes)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 2, 2, 1)
    [through] = torch.autograd.grad((quantised * weight).sum(), latents, retain_graph=True)
    assert torch.equal(through, weight)
    [pull] = torch.autograd.grad(values["commitment"], latents)
    torch.testing.assert_close(pull, 2 * (latents.detach() - quantised.detach()) / 4)
    assert not embedding.weight.requires_grad


@pytest.mark.parametrize(("fixed", "advice"), [(False, "--codebook-size 32"), (True, "--fsq-levels")])
def test_a_collapsed_codebook_is_said_once_with_what_to_do(
    fixed: bool, advice: str, caplog: pytest.LogCaptureFixture
) -> None:
    codes = grid((8, 4, 4))
    embedding = nn.Embedding.from_pretrained(codes.clone())
    loss = CodebookLoss(embedding, fixed=fixed, seed=0)
    for step in range(400):
        loss(torch.ones(1, 3, 2, 2), [step])
        loss.finish_step(GO, step)
    [said] = [record.getMessage() for record in caplog.records]
    assert "collapsed: at step 200 1 of its 128 codes are used (perplexity 1.0)" in said and advice in said
    assert torch.equal(embedding.weight, codes) == fixed


def test_a_codebook_in_use_is_not_said_to_have_collapsed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    loss, _ = learner(torch.randn(32, 3))
    for step in range(200):
        loss(torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(step)), [step])
        loss.finish_step(GO, step)
    assert not caplog.records


@pytest.mark.parametrize("kind", ["vq", "fsq"])
def test_the_loss_is_l1_of_the_decoded_codes_and_the_commitment(kind: Any) -> None:
    fixed = {"autoencoder_class": "fsq", "fsq_levels": (4, 3), "codebook_size": 1024, "codebook_width": 8}
    config = dataclasses.replace(SMALL, commitment_weight=0.7, **(fixed if kind == "fsq" else {}))
    torch.manual_seed(0)
    vae = build_autoencoder(config, 16)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    stage = AutoencoderLoss(vae, config, 0)
    codes = vae.quantize.embedding.weight.clone()
    values = stage({"images": images, "sample_ids": [0, 1, 2]})
    latents = vae.encode(images).latents
    decoded = vae.decode(latents).sample
    commitment = (latents - vae.quantize(latents)[0]).square().mean()
    torch.testing.assert_close(values["l1"], (decoded - images).abs().mean().detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values["commitment"], commitment.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values["loss"], values["l1"] + 0.7 * values["commitment"], check_stride=False)
    stage.finish_step(GO)
    assert torch.equal(codes, vae.quantize.embedding.weight) == (kind == "fsq")
    stage.eval()({"images": images, "sample_ids": [3, 4, 5]})
    assert stage.codes is not None
    uses = stage.codes.uses.clone()
    stage.finish_step(GO)  # nothing is learnt from a validation
    assert torch.equal(uses, stage.codes.uses) and uses.any()


def test_settings_of_codebooks_leave_other_runs_as_they_were() -> None:
    new = {"codebook_size", "codebook_width", "fsq_levels", "commitment_weight"}
    assert not new & AutoencoderConfig().describe().keys()
    assert SMALL.describe()["codebook_size"] == 16


@pytest.mark.parametrize("kind", ["vq", "fsq"])
def test_the_command_trains_a_tokenizer_and_reports_its_codes(kind: str, tmp_path: Path) -> None:
    data = save_images(tmp_path / "images", *(f"{number}.png" for number in range(8)))
    own = TINY[: TINY.index("--network-preset")]
    codes = ["--fsq-levels", 5, 2, 2] if kind == "fsq" else ["--codebook-size", 20, "--codebook-width", 3]
    line = [data, "-o", tmp_path / "run", "--autoencoder-class", kind, *codes, *own]
    call(tmp_path / "cache", *line, "--validation-steps", 1, "--log-steps", 1, file="autoencoder")
    vae = load_autoencoder(tmp_path / "run" / "autoencoder")
    assert isinstance(vae, VQModel) and codebook(vae).shape == (20, 3)
    rows = read_metrics(tmp_path / "run")
    for name in ("codebook_used", "perplexity", "commitment"):
        assert any(name in row for row in rows)
    use = [(row["val_codebook_used"], row["val_perplexity"]) for row in rows if "val_perplexity" in row]
    assert use and all(0 < used <= 1 <= perplexity <= 20 for used, perplexity in use)
    assert json.loads((tmp_path / "run" / "autoencoder" / "config.json").read_text())["latents_mean"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["vq", "--codebook-size", 1], "codebook of 1 codes"),
        (["fsq", "--fsq-levels", 8, 1], "--fsq-levels 8 1"),
        (["fsq", "--fsq-levels", *[16] * 6], "product at most 262,144"),
        (["vq", "--commitment-weight", -1], "--commitment-weight is -1.0"),
        (["vq", "--fsq-levels", 5, 5], "--fsq-levels with --autoencoder-class vq"),
        (["fsq", "--codebook-size", 64], "--codebook-size with --autoencoder-class fsq"),
        (["kl", "--commitment-weight", 1], "it is of vq and fsq"),
        (["fsq", "--latent-noise", 0.5], "--latent-noise 0.5 with --autoencoder-class fsq"),
    ],
    ids=lambda value: str(value[:2]) if isinstance(value, list) else "",
)
def test_settings_that_do_not_fit_are_refused(flags: list[object], message: str, tmp_path: Path) -> None:
    data = save_images(tmp_path / "images", *(f"{number}.png" for number in range(5)))
    line = [data, "-o", tmp_path / "run", "--autoencoder-class", *flags]
    said = call(tmp_path, *line, file="autoencoder", expect=2)
    assert message in said and "Traceback" not in said
