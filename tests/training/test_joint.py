"""An autoencoder and a flow that learn together: the optimum, collapse, gradients, runs, what is refused."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from latentflow.autoencoder import build_autoencoder, decode, encode, load_autoencoder
from latentflow.config import AlignmentConfig, AutoencoderConfig, FlowConfig, JointConfig
from latentflow.errors import UserError
from latentflow.models import DiT
from latentflow.training.losses import flow_loss, joint
from latentflow.training.losses.alignment import make_alignment
from latentflow.training.losses.joint import JointAutoencoderLoss, JointFlowLoss
from latentflow.training.unfinished import keep_initial, unfinished_pipeline

from ..models.tiny import perturb, save_dinov2
from .command import TINY, call, losses, opened, same_state, sampled, shapes_folder

pytestmark = pytest.mark.usefixtures("no_memorisation")

# ---------------------------------------------------------------- linear and Gaussian, in 8 dimensions

DIM, BATCH, ERROR = 8, 256, 0.1  # ERROR: variance of the decoder's likelihood
VARIANCES = torch.logspace(math.log10(4.0), math.log10(0.05), DIM, dtype=torch.float64)  # two are below ERROR


class LinearAutoencoder(nn.Module):
    """Images (B, 8, 1, 1) to latents and back, linear; with a posterior of its own deviations, if asked for."""

    def __init__(self, has_posterior: bool) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.log_gain = nn.Parameter(
            torch.zeros(())
        )  # a decoder of convolutions and norms rescales as easily
        nn.init.zeros_(self.encoder.bias)
        with torch.no_grad():
            self.encoder.weight.copy_(0.4 * torch.linalg.qr(torch.randn(DIM, DIM))[0])
        self.log_std = nn.Parameter(torch.full((DIM,), -2.0)) if has_posterior else None
        self.config = {"latents_mean": [0.0] * DIM, "latents_std": [1.0] * DIM, "latent_channels": DIM}

    def encode(self, images: Tensor) -> Any:
        latent = self.encoder(images.flatten(1))[:, :, None, None]
        if self.log_std is None:
            return SimpleNamespace(latent=latent)
        std = self.log_std.exp().view(1, -1, 1, 1).expand_as(latent)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=latent, std=std))

    def decode(self, latents: Tensor) -> Any:
        return SimpleNamespace(
            sample=self.decoder(self.log_gain.exp() * latents.flatten(1))[:, :, None, None]
        )


class GaussianVelocity(nn.Module):
    """The velocity of data N(mean, L L'), whose mean and L learn."""

    def __init__(self) -> None:
        super().__init__()
        self.root, self.mean = nn.Parameter(0.5 * torch.eye(DIM)), nn.Parameter(torch.zeros(DIM, 1))

    def forward(self, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        t, eye, covariance = t.float().view(-1, 1, 1), torch.eye(DIM), self.root @ self.root.T
        noisy = t**2 * covariance + (1 - t) ** 2 * eye
        centred = torch.linalg.solve(noisy, x.flatten(2) - t * self.mean)
        return ((t * covariance - (1 - t) * eye) @ centred + self.mean)[..., None]


class GaussianLoss(JointAutoencoderLoss):
    """With the negative log-likelihood of a Gaussian decoder, in nats for each value, as the error."""

    def distance(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        squares = (reconstructions - images).square() / (2 * ERROR)
        return (squares + 0.5 * math.log(2 * math.pi * ERROR)).flatten(1).mean(1)


class PlainLoss(JointAutoencoderLoss):
    """The negative control: an autoencoder whose encoder the plain flow loss reaches, its latents without noise."""

    _noise = 0.0

    def distance(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        return (reconstructions - images).square().flatten(1).mean(1)

    def shaping(self, latents: Tensor, std: Any, batch: Any, random: Any) -> Any:
        flow = self._flow[0]
        t, x0 = random.uniform(), random.normal(latents.shape[1:])
        sample = flow.path.sample(x0, latents, t.float())
        return (flow.network(sample.xt, sample.t, None) - sample.velocity).square().mean(), {}


def learnt(
    mode: Any, steps: int, kind: type[JointAutoencoderLoss] = GaussianLoss, seed: int = 0
) -> tuple[Any, JointFlowLoss]:
    torch.manual_seed(seed)
    vae, network = LinearAutoencoder(mode == "lsgm"), GaussianVelocity()
    flow = flow_loss(network, FlowConfig(), seed, kind=JointFlowLoss)
    assert isinstance(flow, JointFlowLoss)
    joint = JointConfig(joint=mode, joint_weight=1.0)
    loss = kind(vae, AutoencoderConfig(autoencoder_batch_size=BATCH), joint, flow, seed)
    optimizer = torch.optim.Adam([*loss.parameters(), *flow.parameters()], lr=0.02, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        images = torch.randn(BATCH, DIM, 1, 1) * VARIANCES.sqrt().float().view(-1, 1, 1)
        batch = {"images": images, "sample_ids": list(range(step * BATCH, (step + 1) * BATCH))}
        total = DIM * loss(batch)["loss"] + flow(batch)["loss"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
    return loss, flow


@torch.no_grad()
def objective(loss: Any, flow: JointFlowLoss) -> tuple[float, float]:
    """The expected loss of the weights as they are, in nats for each image, and that of the latents with the entropy of
    a posterior: no sample is drawn."""
    vae, network = loss.vae, cast(GaussianVelocity, flow.network)
    data, eye = torch.diag(VARIANCES), torch.eye(DIM, dtype=torch.float64)
    encoder, decoder = vae.encoder.weight.double(), vae.decoder.weight.double() * vae.log_gain.double().exp()
    noise = loss._noise**2 * eye
    own = noise if vae.log_std is None else noise + torch.diag((2 * vae.log_std).exp().double())
    latent = encoder @ data @ encoder.T + own
    shift = decoder @ vae.encoder.bias.double() + vae.decoder.bias.double()
    errors = (
        data - 2 * decoder @ encoder @ data + decoder @ latent @ decoder.T
    ).trace() + shift.square().sum()
    reconstruction = errors / (2 * ERROR) + DIM / 2 * math.log(2 * math.pi * ERROR)
    information = 0.5 * (torch.logdet(latent) - torch.logdet(own))
    # Beyond it the KL divergence of all latents from the distribution that the network has learnt.
    spread = float(loss.norm.spread)  # the network's velocity is that of latents over it
    root = spread * network.root.double()
    apart = spread * network.mean[:, 0].double() + loss.norm.running_mean - vae.encoder.bias
    prior = root @ root.T + noise
    inverse = torch.linalg.inv(prior)
    beyond = (
        (inverse @ latent).trace()
        - DIM
        + apart @ inverse @ apart
        + torch.logdet(prior)
        - torch.logdet(latent)
    )
    entropy = 0.5 * (torch.logdet(own) - torch.logdet(noise))
    return float(reconstruction + information + 0.5 * beyond), float(information + 0.5 * beyond + entropy)


def optimum() -> float:
    """Reverse water-filling (Cover & Thomas, theorem 10.3.3): each direction's error is ERROR, or its variance."""
    left = VARIANCES.clamp(max=ERROR)
    rate = 0.5 * (VARIANCES / left).log()
    return float((left / (2 * ERROR) + rate).sum() + DIM / 2 * math.log(2 * math.pi * ERROR))


@pytest.mark.parametrize("mode", ["unified", "lsgm"])
def test_the_loss_as_it_is_drawn_is_that_of_the_closed_form(mode: str) -> None:
    loss, flow = learnt(mode, 0)
    with torch.no_grad():
        loss.vae.decoder.weight.copy_(2 * loss.vae.encoder.weight.T)
        images = torch.randn(200_000, DIM, 1, 1) * VARIANCES.sqrt().float().view(-1, 1, 1)
        batch = {"images": images, "sample_ids": list(range(len(images)))}
        drawn, of_network = DIM * loss(batch)["loss"], DIM * flow(batch)["loss"]
    whole, cross_entropy = objective(loss, flow)
    assert float(drawn) == pytest.approx(whole, abs=0.1)
    # LSGM's network, which is far from its optimum here, learns by the cross entropy itself.
    assert (abs(float(of_network) - cross_entropy) < 0.1) == (mode == "lsgm")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["unified", "lsgm"])
def test_linear_and_gaussian_the_optimum_is_reached_and_nothing_collapses(mode: str) -> None:
    loss, flow = learnt(mode, 1000)
    assert -1e-9 < objective(loss, flow)[0] - optimum() < 1e-2
    assert loss.spread > 0.5 * loss.first_spread and not loss.collapsed


def test_with_the_plain_loss_in_the_encoder_latents_collapse() -> None:
    loss, _ = learnt("unified", 500, PlainLoss)
    assert loss.spread < 0.05 and loss.collapsed
    with pytest.raises(UserError, match=r"has collapsed.*it is not exported"):
        loss.refuse_collapse()


@pytest.mark.parametrize("mode", ["unified", "lsgm"])
def test_a_common_factor_of_latents_and_noise_changes_nothing(mode: str) -> None:
    """The network sees them at a spread of one, and each loss is the same."""
    found, images = [], torch.randn(BATCH, DIM, 1, 1) * VARIANCES.sqrt().float().view(-1, 1, 1) + 1
    for factor in (1.0, 4.0):
        loss, flow = learnt(mode, 0)
        loss.joint = replace(loss.joint, joint_log_snr=loss.joint.log_snr - 2 * math.log(factor))
        with torch.no_grad():
            loss.vae.encoder.weight.mul_(factor)
            loss.vae.decoder.weight.div_(factor)
            if loss.vae.log_std is not None:
                loss.vae.log_std.add_(math.log(factor))
        batch = {"images": images, "sample_ids": list(range(BATCH))}
        of_images, of_latents = loss(batch), flow(batch)
        assert float(loss._latents.square().mean()) == pytest.approx(1.0, abs=0.03)
        found.append([of_images["loss"], of_images["rate"], of_latents["loss"]])
    torch.testing.assert_close(found[0], found[1], rtol=2e-3, atol=1e-4)


# ---------------------------------------------------------------- gradients


def pair(
    mode: Any, encoder: Path | None = None, weight: float = 1.0
) -> tuple[JointAutoencoderLoss, JointFlowLoss]:
    torch.manual_seed(0)
    kind = "kl" if mode == "lsgm" else "dc"
    config = AutoencoderConfig(
        autoencoder_class=kind, autoencoder_widths=(8, 16), encoder_layers=(0, 1), decoder_layers=(0, 1),
        latent_channels=4, autoencoder_batch_size=6,
    )  # fmt: skip
    vae = build_autoencoder(config, 16)
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    network = DiT(in_channels=4, width=16, depth=2, heads=2, sample_size=8)
    perturb(network)
    alignment = None
    if encoder:
        alignment = make_alignment(
            AlignmentConfig(alignment="encoder", alignment_encoder=str(encoder)), network
        )
    flow = flow_loss(network, FlowConfig(), 0, alignment=alignment, kind=JointFlowLoss)
    assert isinstance(flow, JointFlowLoss)
    return JointAutoencoderLoss(vae, config, JointConfig(joint=mode, joint_weight=weight), flow, 0), flow


@pytest.mark.parametrize("mode", ["unified", "lsgm", "alignment"])
def test_each_loss_reaches_its_own_weights_alone(mode: str, tmp_path: Path) -> None:
    encoder = save_dinov2(tmp_path, layers=1) if mode == "alignment" else None
    generator = torch.Generator().manual_seed(1)
    batch = {"images": torch.rand(6, 3, 16, 16, generator=generator) * 2 - 1, "sample_ids": list(range(6))}
    gradients = []
    for weight in (1.0, 2.0):
        loss, flow = pair(mode, encoder, weight)
        result = loss(batch)
        result["loss"].backward()
        name = "encoder_alignment" if mode == "alignment" else "rate"
        assert {"l1", name, "latent_std"} < result.keys()
        assert all(each.grad is None and each.requires_grad for each in flow.parameters())
        assert all(each.grad is not None for each in loss.vae.parameters() if each.requires_grad)
        gradients.append({key: each.grad.clone() for key, each in loss.vae.named_parameters()})
        loss.zero_grad()
        if mode == "alignment":  # the vision model looks once at the images of a step
            flow.alignment._encoder = None
        of_flow = flow(batch)
        of_flow["loss"].backward()
        assert "flow" in of_flow and ("alignment" in of_flow) == (mode == "alignment")
        assert all(each.grad is not None for each in flow.network.parameters())
        assert not any(each.grad is not None and each.grad.any() for each in loss.parameters())
    first, second = gradients
    assert all(torch.equal(first[key], second[key]) for key in first if key.startswith("decoder"))
    assert any(not torch.equal(first[key], second[key]) for key in first if key.startswith("encoder"))


@pytest.mark.parametrize("mode", ["unified", "lsgm", "alignment"])
def test_the_weights_of_images_are_factors_on_both_losses(mode: str, tmp_path: Path) -> None:
    loss, flow = pair(mode, save_dinov2(tmp_path, layers=1) if mode == "alignment" else None)
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    batch = {"images": images, "sample_ids": [*range(6)]}
    found = []
    for weights in ({}, {"weights": torch.full((6,), 0.25)}):
        found.append([each(batch | weights)["loss"] for each in (loss, flow)])
    (of_images, of_latents), (less, lesser) = found
    torch.testing.assert_close(less, 0.25 * of_images)
    torch.testing.assert_close(lesser, 0.25 * of_latents)


def test_the_statistics_of_the_batch_norm_become_those_of_the_latents(tmp_path: Path) -> None:
    loss, _ = pair("alignment", save_dinov2(tmp_path, layers=1))
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        for step in range(60):
            loss({"images": images, "sample_ids": list(range(16 * step, 16 * step + 16))})
        made = loss._latents
    loss.eval().keep_statistics()
    latents = encode(loss.vae, images)
    torch.testing.assert_close(latents, made, atol=2e-2, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=2e-2, rtol=0)


# ---------------------------------------------------------------- runs by the real command

UNIFIED = ("--joint", "unified")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes_folder(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and one that is stopped half way; one of each other mode."""
    root = tmp_path_factory.mktemp("runs")
    line = [
        folder,
        *TINY,
        "--random-flip",
        "--checkpointing-steps",
        2,
        "--preview-steps",
        4,
        "--validation-steps",
        2,
    ]
    call(root / "cache", *line, *UNIFIED, "--max-train-steps", 4, "-o", root / "whole")
    call(root / "cache", *line, *UNIFIED, "--max-train-steps", 2, "-o", root / "stopped")
    shutil.rmtree(root / "stopped" / "pipeline")
    call(root / "cache", *line, *UNIFIED, "--max-train-steps", 4, "-o", root / "stopped", "--allow-changes")
    lsgm = [
        "--joint",
        "lsgm",
        "--autoencoder-class",
        "kl",
        "--adversarial-weight",
        0.1,
        "--adversarial-start",
        1,
    ]
    call(root / "cache", *line, *lsgm, "--max-train-steps", 2, "-o", root / "lsgm")
    encoder = save_dinov2(root / "dinov2", layers=1)
    aligned = ["--joint", "alignment", "--alignment", "encoder", "--alignment-encoder", encoder]
    call(root / "cache", *line, *aligned, "--max-train-steps", 2, "-o", root / "alignment")
    return root


def test_a_resumed_run_equals_one_that_never_stopped(runs: Path) -> None:
    assert same_state(runs / "stopped", runs / "whole")
    assert np.isfinite(losses(runs / "whole")).all()


@pytest.mark.parametrize("mode", ["whole", "lsgm", "alignment"])
def test_the_result_is_a_pipeline_and_an_autoencoder(runs: Path, mode: str) -> None:
    pipe = opened(runs / mode / "pipeline")
    assert sampled(pipe, prompt=["a red circle"]).shape == (1, 4, 8, 8)
    vae = load_autoencoder(runs / mode / "pipeline")
    assert len(vae.config["latents_mean"]) == len(vae.config["latents_std"]) == 4
    assert (len({*vae.config["latents_std"]}) == 1) == (mode != "alignment")
    assert decode(vae, encode(vae, torch.zeros(1, 3, 16, 16))).shape == (1, 3, 16, 16)
    logged = (runs / mode / "metrics.jsonl").read_text()
    named = ["l1", "flow", "latent_std", "val_loss", "val_psnr"]
    named += {"alignment": ["alignment", "encoder_alignment"]}.get(mode, ["rate"])
    named += ["adversarial", "discriminator"] if mode == "lsgm" else []
    assert all(f'"{name}"' in logged for name in named)


def test_its_autoencoder_trains_another_generator(runs: Path, folder: Path) -> None:
    line = [folder, *TINY, "--vae", runs / "whole" / "pipeline", "--max-train-steps", 1, "-o", runs / "other"]
    call(runs / "cache", *line)
    expected = load_autoencoder(runs / "whole" / "pipeline").config["latents_std"]
    assert opened(runs / "other" / "pipeline").vae.config["latents_std"] == expected


def test_an_unfinished_run_opens_with_its_autoencoder(runs: Path) -> None:
    copy = runs / "unfinished"
    shutil.copytree(runs / "whole", copy)
    keep_initial(copy, opened(copy / "pipeline"))
    with torch.no_grad():
        initial = copy / "checkpoints" / "initial" / "vae"
        vae = load_autoencoder(initial)
        for parameter in vae.parameters():
            parameter.zero_()
        vae.save_pretrained(initial)
    pipe, _ = unfinished_pipeline(copy)
    expected = load_autoencoder(copy / "pipeline").state_dict()
    for name, value in pipe.vae.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_a_collapsed_encoder_is_said_and_not_exported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint, "_CHECK_EVERY", 2)
    monkeypatch.setattr(joint, "COLLAPSED", 2.0)  # of an encoder that has hardly changed
    line = [folder, *TINY, *UNIFIED, "--max-train-steps", 3, "-o", tmp_path / "run"]
    said = call(tmp_path, *line, expect=2)
    assert "WARNING: step 2: the encoder has collapsed" in said and "it is not exported" in said
    assert "a lower --joint-weight, such as 0.002" in said
    assert not (tmp_path / "run" / "pipeline").exists() and list(
        (tmp_path / "run" / "checkpoints").glob("step-*")
    )
    with pytest.raises(UserError, match="run: the encoder has collapsed"):  # nor by the way round
        unfinished_pipeline(tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--joint-weight 1", "--joint-weight without --joint"),
        ("--joint unified --joint-weight 0", "--joint-weight is 0.0"),
        ("--joint unified --joint-log-snr 30", "--joint-log-snr is 30.0"),
        ("--joint alignment --joint-log-snr 5", "whose latents have no noise"),
        ("--joint alignment", "Add --alignment encoder"),
        ("--joint lsgm", "Add --autoencoder-class kl"),
        ("--joint lsgm --autoencoder-class kl --kl-weight 1", "--kl-weight with --joint lsgm"),
        ("--joint unified --autoencoder-class vq", "Add --autoencoder-class dc"),
        ("--joint unified --inpainting", "--inpainting with --joint"),
        ("--joint unified --outside-mask 0.5", "--outside-mask is for pretrained models"),
        ("--joint unified --early-stop 3", "--early-stop with --joint"),
        ("--joint unified --path variance-preserving", "its log-SNR is"),
        ("--joint unified --objective mean-flow", "--objective mean-flow with --joint"),
        ("--joint unified --coupling ot", "--coupling ot with --joint unified"),
        ("--joint lsgm --autoencoder-class kl --time-density uniform", "learns by the likelihood itself"),
    ],
)
def test_bad_input_is_refused(folder: Path, tmp_path: Path, flags: str, message: str) -> None:
    said = call(tmp_path, folder, *TINY, *flags.split(), "-o", tmp_path / "run", expect=2)
    assert message in " ".join(said.split())


def test_masks_of_the_data_are_not_dropped_unsaid(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    shutil.copy(data / "00.png", data / "00-mask.png")
    line = [data, *TINY, *UNIFIED, "--dry-run", "-o", tmp_path / "run"]
    said = " ".join(call(tmp_path, *line, expect=2).split())
    assert "whose images have masks: it learns no inpainting" in said and "Add --masks none" in said
    assert "not used (--masks none)" in call(tmp_path, *line, "--masks", "none")


def test_an_autoencoder_of_another_kind_is_refused(runs: Path, folder: Path, tmp_path: Path) -> None:
    line = [folder, *TINY, "--vae", runs / "lsgm" / "pipeline", "--dry-run", "-o", tmp_path / "run"]
    said = " ".join(call(tmp_path, *line, *UNIFIED, expect=2).split())
    assert "of class AutoencoderKL" in said and "needs AutoencoderDC" in said
    assert "joint training (lsgm)" in call(tmp_path, *line, "--joint", "lsgm")
    assert not (tmp_path / "run").exists()
