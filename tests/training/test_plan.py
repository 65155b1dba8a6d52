"""What `--dry-run` says a run will cost."""

from __future__ import annotations

import re
import resource

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from latentflow.autoencoder import build_autoencoder
from latentflow.config import AutoencoderConfig, LoopConfig
from latentflow.models import DIT_PRESETS, Condition, DiT, UNet, dit_config
from latentflow.training import estimate as plan
from latentflow.training.estimate import encoding_flops, network_cost, state_bytes, text_encoder_cost
from latentflow.training.loop.optimizers import make_optimizers
from latentflow.training.loop.trained_module import WeightAverage

from .command import ROOT, TINY, call, save_images


def sit(depth: int = 2, **changes: object) -> DiT:
    with torch.device("meta"):
        return DiT(**dit_config("S", depth=depth, **changes))


def closed_form(width: int, depth: int, tokens: int) -> float:
    """FLOPs of a SiT with patches of 2 on 4 channels, forward and backward, after the sizes of its products."""
    linear = depth * (12 * tokens * width**2 + 6 * width**2) + 2 * width**2 + width**2 + tokens * width * 32
    first = 256 * width + tokens * width * 16  # whose inputs need no gradient
    attention = depth * 2 * tokens**2 * width  # its backward computes the scores again
    return 2 * (3 * linear + 2 * first + 3.5 * attention)


@pytest.mark.parametrize(("depth", "size"), [(1, 32), (3, 32), (2, 16)])
def test_the_count_is_that_of_the_closed_form(depth, size) -> None:
    expected = closed_form(384, depth, size**2 // 4)
    assert network_cost(sit(depth), size, 0).flops == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("preset", "parameters", "multiply_adds"), [("B", 130e6, 23.01e9), ("XL", 675e6, 118.64e9)]
)
def test_networks_have_the_sizes_and_cost_of_the_paper(preset, parameters, multiply_adds) -> None:
    """DiT (arXiv:2212.09748), table 4, whose 'Gflops' are multiply-adds of a forward pass; SiT has the same."""
    with torch.device("meta"):
        network = DiT(**DIT_PRESETS[preset])
        label = Condition(class_labels=torch.empty(1, dtype=torch.long))
        with torch.no_grad(), FlopCounterMode(display=False) as forward:
            network(torch.empty(1, 4, 32, 32), torch.empty(1), label)
    assert sum(one.numel() for one in network.parameters()) == pytest.approx(parameters, rel=0.005)
    assert forward.get_total_flops() / 2 == pytest.approx(multiply_adds, rel=0.005)
    assert network_cost(network, 32, 0).flops == pytest.approx(2 * 3 * multiply_adds, rel=0.02)


def test_activations_grow_with_depth_and_shrink_by_checkpointing_which_computes_the_blocks_twice() -> None:
    one, three = network_cost(sit(1), 32, 0), network_cost(sit(3), 32, 0)
    network = sit(3)
    network.enable_gradient_checkpointing()
    less = network_cost(network, 32, 0)
    block = (three.flops - one.flops) / 2
    assert three.activations > 2 * one.activations
    assert less.activations < three.activations / 3
    # A forward pass is a third and less.
    assert less.flops == pytest.approx(three.flops + 3 * block / 3.1, rel=0.02)


def test_activations_are_what_autograd_keeps_of_a_real_pass() -> None:
    torch.manual_seed(0)
    network = DiT(in_channels=4, width=64, depth=2, heads=2, sample_size=20)
    planned = network_cost(network, 20, 0)
    weights = {one.untyped_storage().data_ptr() for one in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.randn(2, 4, 20, 20), torch.rand(2))
    real = sum(one.untyped_storage().nbytes() for one in kept.values())
    # A CPU keeps a tensor of queries and keys less in each block than is planned, which is what a GPU keeps.
    assert real <= 2 * planned.activations <= 1.08 * real


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (DiT, {"width": 64, "depth": 1, "heads": 2, "text_dim": 24}),
        (DiT, {"width": 64, "depth": 1, "heads": 2, "num_classes": 3, "condition_channels": 5}),
        (UNet, {"num_classes": 3}),
    ],
    ids=["text", "masked", "unet"],
)
def test_every_kind_of_network_can_be_counted_and_stays_as_it_is(kind, more) -> None:
    network = kind(in_channels=4, sample_size=8, **more)
    cost = network_cost(network, 8, 7)
    assert cost.flops > 1e6 and cost.activations > 1e4
    assert all(weight.grad is None and not weight.is_meta for weight in network.parameters())
    # Its tables are no meta tensors.
    assert torch.isfinite(network(torch.randn(1, 4, 8, 8), torch.rand(1))).all()


@pytest.mark.parametrize("family", ["T5", "CLIP", "BERT"])
def test_attention_of_a_text_encoder_is_counted_whatever_kernel_computes_it(family) -> None:
    """Twice the tokens cost twice as much, and four times in attention: 2 products, 2.5 as many backwards (4 or 5)."""
    width, depth, length = 32, 2, 16
    sizes = {"vocab_size": 9, "hidden_size": width, "intermediate_size": 8}
    heads = {"num_hidden_layers": depth, "num_attention_heads": 2}
    t5 = {"vocab_size": 9, "d_model": width, "d_kv": 16, "num_heads": 2, "d_ff": 8, "num_layers": depth}
    encoder: nn.Module = {
        "T5": lambda: T5EncoderModel(T5Config(**t5, use_cache=False)),
        "CLIP": lambda: CLIPTextModel(CLIPTextConfig(**sizes, **heads)),
        "BERT": lambda: BertModel(BertConfig(**sizes, **heads)),
    }[family]()
    once, twice = (
        text_encoder_cost(encoder, torch.ones(1, tokens, dtype=torch.long)).flops
        for tokens in (length, 2 * length)
    )
    product = 2 * depth * width * length**2
    # Once a caption, whatever its length; the loss does not see it.
    pooled = 2 * width**2 if family == "BERT" else 0
    assert 2 * 6 * product <= twice - 2 * once + pooled <= 2 * 7 * product
    assert not any(one.is_meta or one.grad is not None for one in encoder.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_is_what_one_step_allocates(optimizer) -> None:
    network = DiT(in_channels=4, width=64, depth=2, heads=2)
    loop = LoopConfig(optimizer=optimizer)  # type: ignore[arg-type]
    planned = state_bytes(network, loop, torch.float32)
    average = WeightAverage(network, 0.9)
    optimizers = make_optimizers(network, loop)
    network(torch.randn(1, 4, 8, 8), torch.rand(1)).square().mean().backward()
    held = [tensor for weight in network.parameters() for tensor in (weight, weight.grad)]
    held += average.averages.values()
    for optimizer in optimizers:
        optimizer.step()
        held += [value for state in optimizer.state.values() for value in state.values()]
    held = [tensor for tensor in held if isinstance(tensor, Tensor)]
    assert planned == pytest.approx(sum(one.nbytes for one in held), rel=0.01)
    assert state_bytes(network, loop, torch.bfloat16) > planned


def test_encoding_is_counted_for_one_image() -> None:
    vae = tiny_autoencoder(4)
    once = encoding_flops(vae, 32)
    assert encoding_flops(vae, 64) == pytest.approx(4 * once, rel=0.05)
    assert not any(one.is_meta for one in vae.parameters())


def tiny_autoencoder(channels: int) -> nn.Module:
    config = AutoencoderConfig(
        autoencoder_class="kl", latent_channels=channels, autoencoder_widths=(8, 8, 8, 8),
        encoder_layers=(1, 1, 1, 1), decoder_layers=(1, 1, 1, 1),
    )  # fmt: skip
    return build_autoencoder(config, 64)


@pytest.mark.parametrize(
    ("recipe", "channels", "said"),
    [
        ("imagenet-256-dit-b2", 4, "129.7 M parameters; 400000 steps of 256 samples; 139 GFLOPs a sample"),
        (
            "imagenet-256-dit-xl2",
            4,
            "674.0 M parameters; 716 GFLOPs a sample; 1.28 ZFLOPs in all; do not fit",
        ),
        ("text-to-image-512", 16, "300000 steps of 256 samples; latents 16 x 64 x 64; text encoder:"),
    ],
)
def test_recipes_are_planned_without_their_weights(
    recipe, channels, said, images, tmp_path, monkeypatch
) -> None:
    data = images
    if channels == 4:  # class by class
        names = [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(3)]
        data = save_images(tmp_path / "data", *names, size=(20, 20))
    tiny_autoencoder(channels).save_pretrained(tmp_path / "vae")
    monkeypatch.setattr(plan, "_TIMED_SECONDS", 0.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = call(
        tmp_path, data, "-o", tmp_path / "run", "--config", ROOT / "train" / "recipes" / f"{recipe}.yaml",
        "--vae", tmp_path / "vae", "--mixed-precision", "no", "--dry-run",
    )  # fmt: skip
    for text in [*said.split("; "), "NVIDIA H100", "by the", "40% of their peak"]:
        assert text in out, (text, out)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1.5 * 2**20  # KiB
    assert not (tmp_path / "run").exists()


def test_a_small_network_is_timed_on_this_machine(images, tmp_path) -> None:
    def planned(*flags: object) -> str:
        return call(tmp_path, images, "-o", tmp_path / "run", *TINY, *flags, "--dry-run")

    def encoding(said: str) -> float:
        return int(re.search(r"encoding: (\d+) images before training", said)[1])

    out = planned("--inpainting")
    for words in ("s a step", "measured on this cpu;", "parameters", "memory:", "epochs"):
        assert words in out
    assert encoding(out) == 12
    assert encoding(planned("--random-flip", "--crops", 3)) == 2 * (
        3 * 10 + 2
    )  # held-out images have one crop
    assert not (tmp_path / "run").exists()


def test_only_work_that_will_be_done_is_planned(images, tmp_path) -> None:
    """Of a run that has begun: the steps that are left, and no image that is encoded already."""

    def said(*flags: object) -> str:
        return call(tmp_path / "cache", images, "-o", tmp_path / "run", *TINY, *flags)

    new = said("--dry-run")
    assert (
        "not counted: the encoding, the optimiser, validations, previews, checkpoints, the autoencoder's"
        in new
    )
    assert "WARNING: no GPU" not in new  # it would send to --dry-run
    said("--max-train-steps", 2)
    begun = said("--max-train-steps", 302, "--dry-run", "--preview-steps", 0)
    assert "the run is at step 2: what follows is for the 300 steps that are left" in begun
    assert "not counted: the optimiser, validations, checkpoints\n" in begun and "encoding" not in begun
    none = said("--max-train-steps", 302, "--dry-run", "--preview-steps", 0, "--validation-steps", 0)
    assert "not counted: the optimiser, checkpoints\n" in none


def test_a_gpu_needs_some_time_for_the_smallest_step(images, tmp_path) -> None:
    """It is started by Python, operation by operation: 800 steps do not take a millisecond."""
    out = call(tmp_path, images, "-o", tmp_path / "run", *TINY, "--max-train-steps", 800, "--dry-run")
    operations = int(re.search(r"to start ([\d,]+) operations", out)[1].replace(",", ""))
    assert 100 < operations < 1000  # a network of one block
    milliseconds = float(re.search(r"H100 SXM: about .* in bfloat16, ([\d.]+) ms a step", out)[1])
    assert milliseconds == pytest.approx(
        operations * 0.01 + 4 / 3, rel=0.1
    )  # 10 us each; 3,000 latents a second
    seconds = int(re.search(r"H100 SXM: about (\d+) s in", out)[1])
    assert seconds == pytest.approx(0.8 * milliseconds, rel=0.2)


def test_the_operations_of_a_network_grow_with_its_blocks_and_not_with_the_batch() -> None:
    network_cost(sit(3), 8, 0)  # the first one also fills torch's caches
    three, four, five = (network_cost(sit(depth), 8, 0).operations for depth in (3, 4, 5))
    assert five - four == four - three > 20
    assert network_cost(sit(3), 32, 0).operations == three
