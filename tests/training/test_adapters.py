"""`latentflow train --lora-rank`: what learns, what is written, what is refused; by the real command line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentflow.config import AdapterConfig
from latentflow.errors import UserError
from latentflow.models import Condition, DiT, UNet, small_text_encoder, train_tokenizer
from latentflow.pipeline import LatentFlowPipeline
from latentflow.training.fine_tune.adapters import Adapter, chosen_layers

from .command import TINY, call, call_on_two, opened, same_state, sampled

pytest.importorskip("peft", reason='needs peft: pip install -e ".[lora]"')

FILE = "adapter/pytorch_lora_weights.safetensors"
LORA = ["--lora-rank", "4", "--preview-steps", "0", "--validation-steps", "0"]


@pytest.fixture(scope="module")
def base(images: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that a run made."""
    run = tmp_path_factory.mktemp("base")
    call(cache, images, "-o", run, *TINY, "--max-train-steps", 3, "--preview-steps", 0)
    return run / "pipeline"


@pytest.fixture(scope="module")
def others(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images under captions with two words that the base does not know."""
    folder = tmp_path_factory.mktemp("others")
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        (folder / row["file_name"]).write_bytes((images / row["file_name"]).read_bytes())
        row["text"] = "a glimmering wug"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def run(others: Path, cache: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run with an adapter, and what it said."""
    folder = tmp_path_factory.mktemp("lora")
    line = [others, "-o", folder, *TINY, *LORA, "--init-from", base, "--learning-rate", "0.05"]
    return folder, call(cache, *line, "--max-train-steps", 4, "--checkpointing-steps", 2)


def test_the_plan_says_what_is_trained(run) -> None:
    # One block of width 16: qkv, proj, q, kv, proj, fc1 (16 -> 2 x 64), fc2 (64 -> 16), each 4 (in + out).
    count = 4 * (64 + 32 + 32 + 48 + 32 + 144 + 80)
    assert "adapter: LoRA of rank 4 in 7 layers, " in run[1]
    words = int(run[1].split("7 layers, ")[1].split(" new words")[0])
    assert f": {count + 16 * words:,} trained parameters" in run[1]


def test_every_file_has_the_permissions_of_a_new_file(run, base, cache, tmp_path) -> None:
    """Also the weights: on a shared disk a checkpoint is for others as well."""
    (tmp_path / "new").touch()
    usual = (tmp_path / "new").stat().st_mode
    files = [file for folder in (run[0], base, cache) for file in folder.rglob("*") if file.is_file()]
    assert any(file.suffix == ".safetensors" for file in files)
    assert {str(file): oct(file.stat().st_mode) for file in files if file.stat().st_mode != usual} == {}


def test_the_result_is_the_base_with_the_adapter(run, base) -> None:
    result, pipe = opened(run[0] / "pipeline"), opened(base)
    before = sampled(pipe, prompt="a glimmering wug")
    pipe.load_lora_weights(run[0] / "adapter", adapter_name="one")
    for prompt in ("a glimmering wug", "a red circle"):
        pair = (sampled(each, prompt=prompt) for each in (pipe, result))
        torch.testing.assert_close(*pair, atol=1e-4, rtol=0)
    assert not torch.allclose(sampled(pipe, prompt="a glimmering wug"), before, atol=1e-3)


def test_only_the_adapter_learns(run, base) -> None:
    average = load_file(run[0] / "checkpoints" / "step-000004" / "flow-average.safetensors")
    assert average and all("lora_" in name or "trainable_tokens" in name for name in average)
    weights = load_file(run[0] / "checkpoints" / "step-000004" / "flow-weights.safetensors")
    old = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, value in old.items():
        layer, _, leaf = name.rpartition(".")
        kept = [f"flow-weights/network.{one}" for one in (name, f"{layer}.base_layer.{leaf}")]
        assert any(one in weights and torch.equal(weights[one], value) for one in kept), name
    state = load_file(run[0] / FILE)
    # Four steps at this rate moved everything: the words as well.
    assert all(one.abs().max() > 0 for name, one in state.items() if "lora_B" in name or "added" in name)


def test_a_stopped_run_goes_on_bit_by_bit(others, cache, base, tmp_path) -> None:
    line = [others, *TINY, *LORA, "--init-from", base, "--learning-rate", "0.05"]
    line += ["--checkpointing-steps", 2, "--lr-scheduler", "constant", "--max-train-steps"]
    part = ["-o", tmp_path / "part"]
    call(cache, *line, 4, "-o", tmp_path / "whole")
    call(cache, *line, 2, *part)
    call(cache, *line, 4, *part)
    assert same_state(tmp_path / "whole", tmp_path / "part")
    files = [load_file(tmp_path / name / FILE) for name in ("whole", "part")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    said = call(cache, *line, 6, *part, "--lora-alpha", 8, expect=2)
    assert "adapter.lora_alpha: None -> 8.0" in said


def test_a_run_does_not_go_on_beside_another_base(others, cache, base, tmp_path) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    line = [others, "-o", tmp_path / "run", *TINY, *LORA, "--init-from", copy, "--prior-samples", 0]
    call(cache, *line, "--max-train-steps", 1)
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.01 * one for name, one in load_file(file).items()}, file)
    assert "adapter.base" in call(cache, *line, "--max-train-steps", 2, expect=2)


@pytest.mark.parametrize(
    "sharded", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["replicated", "sharded"]
)
def test_two_processes_learn_what_one_learns(sharded, others, cache, base, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    line = [others, *TINY, *LORA, "--init-from", base, "--lora-text-encoder", "--mixed-precision", "no"]
    line += ["--lora-dora"] * (not sharded) + ["--max-train-steps", 4]
    call(cache, *line, "-o", tmp_path / "one")
    call_on_two(cache, *line, "-o", tmp_path / "two", "--train-batch-size", 2, *(["--shard"] * sharded))
    one, two = (load_file(tmp_path / name / FILE) for name in ("one", "two"))
    assert one.keys() == two.keys() and any(key.startswith("text_encoder.") for key in one)
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=0)


@pytest.mark.slow  # compiling takes a minute
def test_a_compiled_adapter_learns_the_same(others, cache, base, tmp_path) -> None:
    line = [others, *TINY, *LORA, "--init-from", base, "--mixed-precision", "no", "--max-train-steps", 2]
    call(cache, *line, "-o", tmp_path / "plain")
    call(cache, *line, "-o", tmp_path / "compiled", "--compile")
    plain, compiled = (load_file(tmp_path / name / FILE) for name in ("plain", "compiled"))
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lora-rank 8", "--lora-rank without --init-from"),
        ("--lora-dora", "--lora-dora without --lora-rank"),
        ("--lora-layers all", "--lora-layers without --lora-rank"),
        ("--lora-rank 4 --lora-layers", "--lora-layers names none"),
        ("--lora-rank -1", "--lora-rank is -1"),
        ("--lora-rank 4 --lora-alpha 0", "--lora-alpha is 0"),
        ("--lora-dropout 0.1", "--lora-dropout without --lora-rank"),
        ("--lora-rank 4 --lora-dropout 1", "--lora-dropout is 1"),
        ("--lora-rank 4 --lora-dropout -0.1", "--lora-dropout is -0.1"),
        ("--lora-rank 4 --lora-dropout nan", "--lora-dropout is nan"),
        ("--lora-rank 4 --lora-alpha nan", "--lora-alpha is nan"),
        ("BASE --lora-rank 17", "--lora-rank 17 is above what the layer blocks.0.attn.qkv (16 to 48) can"),
        ("BASE --lora-rank 4 --lora-layers atention", "--lora-layers atention: DiT has no such layers"),
        ("BASE --lora-rank 4 --optimizer muon", "--optimizer muon with an adapter"),
        ("BASE --lora-rank 4 --inpainting", "lacks the inputs for --inpainting"),
        ("--init-from EMPTY --lora-rank 4", "is not a pipeline folder: it holds no model_index.json"),
    ],
)
def test_what_cannot_be_had_is_said(flags, words, images, cache, base, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    given = flags.replace("BASE", f"--init-from {base}").replace("EMPTY", str(tmp_path / "empty")).split()
    said = call(cache, images, "-o", tmp_path / "run", *TINY, *given, "--max-train-steps", 1, expect=2)
    assert words in said and "Traceback" not in said


def test_without_peft_the_line_that_installs_it(images, cache, base, tmp_path, monkeypatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find_spec(name, *rest)
    )
    line = [images, "-o", tmp_path / "run", *TINY, *LORA, "--init-from", base]
    assert 'pip install "peft>=' in call(cache, *line, expect=2)


# ---------------------------------------------------------------- layers


def networks() -> dict[str, torch.nn.Module]:
    text = {"in_channels": 2, "text_dim": 16, "num_classes": 3, "sample_size": 4}
    return {
        "dit": DiT(width=16, depth=2, heads=2, **text),
        "unet": UNet(channels=(16, 16), head_dim=8, layers_per_block=1, **text),
        "text": small_text_encoder(train_tokenizer(["a red apple"]), width=16, depth=1, heads=2),
    }


def test_groups_name_the_layers_of_every_network() -> None:
    for kind, network in networks().items():
        attention, feed = (set(chosen_layers(network, [group])) for group in ("attention", "feed-forward"))
        everything = set(chosen_layers(network, ["all"]))
        assert attention and feed and not attention & feed, kind
        assert (attention | feed) < everything or kind == "text", kind
    block = "attn.qkv attn.proj cross_attn.q cross_attn.kv cross_attn.proj mlp.fc1 mlp.fc2 adaLN_modulation.1"
    assert set(chosen_layers(networks()["dit"], ["blocks.1", "attn"])) == {
        *(f"blocks.1.{layer}" for layer in block.split()), "blocks.0.attn.qkv", "blocks.0.attn.proj",
    }  # fmt: skip


def test_another_resolution_is_no_missing_input(tmp_path) -> None:
    """SiT's table of positions, which is computed, is of one size."""
    arguments = {"in_channels": 2, "width": 16, "depth": 1, "heads": 2, "position": "sincos"}
    LatentFlowPipeline(None, DiT(**arguments, sample_size=4)).save_pretrained(tmp_path)
    Adapter(
        LatentFlowPipeline(None, DiT(**arguments, sample_size=8)).model,
        AdapterConfig(lora_rank=2),
        str(tmp_path),
    )
    with pytest.raises(
        UserError, match="lacks the inputs for --inpainting, --size-conditioning or --control"
    ):
        wider = LatentFlowPipeline(None, DiT(**arguments, sample_size=8, condition_channels=3))
        Adapter(wider.model, AdapterConfig(lora_rank=2), str(tmp_path))


@pytest.mark.parametrize("dora", [False, True])
def test_every_parameter_of_an_adapter_gets_a_gradient(dora, tmp_path) -> None:
    """A layer whose weights are read past its `forward` would never learn."""
    condition = Condition(
        text=torch.randn(2, 3, 16),
        text_mask=torch.ones(2, 3, dtype=torch.bool),
        class_labels=torch.tensor([0, 1]),
    )
    for kind in ("dit", "unet"):
        network = networks()[kind]
        with torch.no_grad():
            for one in network.parameters():
                one.copy_(0.2 * torch.randn(one.shape))
        pipeline = LatentFlowPipeline(None, network)
        pipeline.save_pretrained(tmp_path / kind)
        config = AdapterConfig(lora_rank=2, lora_layers=("all",), lora_dora=dora)
        Adapter(pipeline.model, config, str(tmp_path / kind))
        with torch.no_grad():
            for name, one in network.named_parameters():
                if "lora_B" in name:
                    one.normal_()
        network(torch.randn(2, 2, 4, 4), torch.tensor([0.3, 0.6]), condition).square().sum().backward()
        for name, one in network.named_parameters():
            assert one.requires_grad == ("lora_" in name), name
            assert not one.requires_grad or (one.grad is not None and one.grad.abs().sum() > 0), name
