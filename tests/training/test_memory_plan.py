"""The memory that a plan promises, against direct counts, libraries that quantise, and what real steps allocate."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from latentflow.errors import UserError
from latentflow.families import FlowModel, Rows
from latentflow.families.from_configs import model_from_configs
from latentflow.families.stored_weights import parameter_count, quantised_layers, stored_bytes
from latentflow.training.fine_tune import memory_plan, step_memory
from latentflow.training.fine_tune.memory_plan import GIB, FineTuning, MemoryPlanner
from latentflow.training.fine_tune.step_memory import encoding_images, encoding_prompts, training_step

from ..families.tiny import checkpoint

CONFIGS = Path(__file__).parent / "configs"
MODELS = ("flux2-klein-4b", "sd35-medium", "qwen-image")
#: billions of parameters of network and text encoders, as their authors round them
PARAMETERS = {"flux2-klein-4b": (3.9, 4.0), "sd35-medium": (2.2, 5.6), "qwen-image": (20.4, 8.3)}
LORA = FineTuning(lora_rank=4, lora_layers=("attention",))


def configs(name: str) -> dict[str, Any]:
    files: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    assert {file.partition("/")[0] for file in files} >= {*files.pop("sources")}
    return files


@pytest.fixture(params=MODELS)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Folder with the configs of a published model, and nothing else."""
    return unpacked(request.param, tmp_path)


def unpacked(name: str, folder: Path) -> Path:
    for file, content in configs(name).items():
        (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / file).write_text(json.dumps(content))
    return folder / name


def direct(name: str, part: str) -> nn.Module:
    """Build a component by hand."""
    files = configs(name)
    library, kind = files["model_index.json"][part]
    config = files[f"{part}/config.json"]
    with torch.device("meta"):
        if library == "diffusers":
            made: nn.Module = getattr(diffusers, kind).from_config(config)
            return made
        made_of = getattr(transformers, kind)
        return made_of(made_of.config_class(**config))  # type: ignore[no-any-return]


def by_hand(module: nn.Module, stored: str, kept: str = "lm_head") -> float:
    """Count the bytes of weights, tensor by tensor."""
    linear = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    linear = {name for name in linear if f".{kept}." not in f".{name}."}
    total = 0.0
    for name, weight in module.named_parameters():
        n = weight.numel()
        if stored == "float32":
            total += 4 * n
        elif stored == "bfloat16" or name not in linear:
            total += 2 * n
        elif stored == "nf4":  # a byte for each 64 weights, a float32 for each 256 of these bytes
            total += 0.5 * n + n / 64 + 4 * n / 64 / 256
        else:
            total += n + 4 * weight.shape[0]
    return total


# ---------------------------------------------------------------- weights


def test_weights_of_published_models(published: Path) -> None:
    planner, name = MemoryPlanner(model_from_configs(published)), published.name
    network, index = direct(name, "transformer"), configs(name)["model_index.json"]
    encoders = [direct(name, part) for part in index if part.startswith("text_encoder")]
    assert parameter_count(network) / 1e9 == pytest.approx(PARAMETERS[name][0], abs=0.06)
    assert sum(map(parameter_count, encoders)) / 1e9 == pytest.approx(PARAMETERS[name][1], abs=0.06)
    images = by_hand(direct(name, "vae"), "float32")
    for stored in ("float32", "bfloat16", "int8", "float8", "nf4"):
        found = planner.weights(FineTuning(base=stored, encoders=stored))
        assert found.base == pytest.approx(by_hand(network, stored), rel=1e-3), stored
        expected = 0.0
        for encoder in encoders:
            clip = type(encoder).__name__.startswith("CLIP") and stored != "float32"
            kept = "wo" if isinstance(encoder, transformers.T5EncoderModel) and stored == "nf4" else "lm_head"
            expected += by_hand(encoder, "bfloat16" if clip else stored, kept)
        assert found.prompts == pytest.approx(expected, rel=1e-3), stored
        assert found.images == pytest.approx(images, rel=1e-3)


def test_what_learns(published: Path) -> None:
    """An adapter of rank r has r (inputs + outputs) weights in each layer; Adam two moments of each."""
    planner = MemoryPlanner(model_from_configs(published))
    network = direct(published.name, "transformer")
    layers = [
        part for name, part in network.named_modules() if isinstance(part, nn.Linear) and ".attn." in name
    ]
    adapter = sum(8 * (layer.in_features + layer.out_features) for layer in layers)
    found = planner.weights(FineTuning(lora_rank=8, lora_layers=("attn",), averages=2))
    assert found.adapter == found.gradients == 4 * adapter
    assert found.optimizer == found.averages == 8 * adapter
    every = parameter_count(network)
    full = planner.weights(FineTuning(lora_rank=0, optimizer="adamw-8bit", base="float32"))
    assert (full.base, full.adapter, full.gradients, full.averages) == (4 * every, 0, 4 * every, 4 * every)
    assert full.optimizer == pytest.approx(2 * every * (1 + 4 / 256), rel=1e-3)
    with pytest.raises(UserError, match="all weights are to learn, which those in nf4 cannot"):
        planner.plan(FineTuning(lora_rank=0, base="nf4"))


def held(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


@pytest.mark.parametrize("double", [False, True])
def test_nf4_as_bitsandbytes_stores_it(double: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = nn.Linear(1024, 768, bias=False)
    expected = stored_bytes(layer, "nf4", double=double)
    made = bitsandbytes.nn.Linear4bit(1024, 768, bias=False, quant_type="nf4", compress_statistics=double)
    made.load_state_dict(layer.state_dict())
    state = made.to("cpu").weight.quant_state
    stored = held(made.weight) + held(state.absmax) + (held(state.state2.absmax) if double else 0)
    assert stored == expected
    made.requires_grad_(False)
    x = torch.ones(2, 1024, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda value: pytest.fail("kept"), lambda value: value):
        made(x)


@pytest.mark.parametrize(("stored", "config"), [("int8", "Int8WeightOnly"), ("float8", "Float8WeightOnly")])
def test_eight_bits_as_torchao_stores_and_differentiates_them(stored: str, config: str) -> None:
    """torchao leaves the dequantised weight to autograd: without gradient checkpointing it stays for each layer."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    layer = nn.Linear(1024, 768, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    expected = stored_bytes(layer, stored)
    quantization.quantize_(layer, getattr(quantization, f"{config}Config")())
    parts = [part for part in vars(layer.weight).values() if isinstance(part, Tensor)]
    assert sum(map(held, parts)) == expected
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: kept.append(value) or value, lambda value: value
    ):
        layer(torch.ones(2, 1024, dtype=torch.bfloat16, requires_grad=True))
    assert any(value.dtype == torch.bfloat16 and value.numel() == 1024 * 768 for value in kept)


@pytest.mark.parametrize("stored", ["int8", "nf4"])
def test_layers_that_are_quantised(stored: str, tmp_path: Path) -> None:
    """bitsandbytes leaves out a part of T5, torchao does not."""
    settings = {"vocab_size": 32, "d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 1, "num_heads": 2}
    encoder = transformers.T5EncoderModel(transformers.T5Config(**settings))
    encoder.save_pretrained(tmp_path)
    config: Any
    if stored == "int8":
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        config = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    loaded = transformers.T5EncoderModel.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    kinds = ("Int8Tensor", "Params4bit")
    found = {
        name.removesuffix(".weight")
        for name, weight in loaded.named_parameters()
        if type(weight).__name__ in kinds
    }
    assert found == {*quantised_layers(encoder, stored)}


# ---------------------------------------------------------------- what computations hold


def allocated(compute: Callable[[], Any]) -> int:
    """Return the most bytes that a computation holds at once, as torch's profiler sees its allocations on the CPU."""
    compute()  # caches of libraries are filled
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = compute()
    del result
    now = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[[str], tuple[FlowModel, Any]]:
    """A tiny checkpoint, and the model that its configs alone make."""

    def opened(name: str) -> tuple[FlowModel, Any]:
        folder = tmp_path / name
        checkpoint(name).save_pretrained(folder)
        model = FlowModel.from_pretrained(folder)
        for weights in folder.rglob("*.safetensors"):
            weights.unlink()
        return model, model_from_configs(folder)

    return opened


def lora(network: nn.Module) -> None:
    memory_plan._learn(network, LORA)


def real_step(
    model: Any, shape: tuple[int, ...], length: int, checkpointing: bool, autocast: bool
) -> tuple[int, int]:
    """Return the bytes that autograd keeps of a real step, beside weights, and those of the peak."""
    network = deepcopy(model.network)
    lora(network)
    if autocast:
        for weight in network.parameters():
            if not weight.requires_grad:
                weight.data = weight.data.bfloat16()
    network.train()
    if checkpointing:
        network.enable_gradient_checkpointing()
    for weight in network.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    own = {weight.untyped_storage().data_ptr() for weight in [*network.parameters(), *network.buffers()]}
    alone = step_memory._with_network(model, network)
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    def step() -> None:
        kept.clear()
        x, t = torch.zeros(shape), torch.full((shape[0],), 0.5)
        rows: Rows = step_memory._rows(alone, shape[0], length)
        condition = alone.prepare(rows)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
        ):
            output = alone.predict(x.to(network.dtype), t, condition, None, alone.usual_guidance)
            loss = (output.float() - x).square().mean()
        del output
        loss.backward()

    with step_memory._cuda_precision():
        peak = allocated(step)
    return sum(kept.values()), peak


@pytest.mark.parametrize(
    ("checkpointing", "autocast"),
    [
        (False, False),
        (True, True),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "Flux2KleinPipeline", "QwenImagePipeline"])
def test_a_step_holds_what_a_real_one_does(
    name: str, checkpointing: bool, autocast: bool, tiny: Callable[[str], tuple[FlowModel, Any]]
) -> None:
    model, shapes = tiny(name)
    _, latent = encoding_images(shapes.vae, "float32", (64, 64))
    found = training_step(
        shapes, lora, stored="bfloat16" if autocast else "float32", batch_size=2, latent_shape=latent,
        text_length=24, checkpointing=checkpointing, autocast=autocast,
    )  # fmt: skip
    kept, peak = real_step(model, (2, *latent), 24, checkpointing, autocast)
    if name == "QwenImagePipeline":  # which copies its tables of positions to the device of the images
        peak += model.network.pos_embed.pos_freqs.nbytes + model.network.pos_embed.neg_freqs.nbytes
    assert found.kept == pytest.approx(kept, rel=0.005)
    assert found.peak == pytest.approx(peak, rel=0.1)


def test_a_step_that_asks_for_values_of_its_times(tiny: Callable[[str], tuple[FlowModel, Any]]) -> None:
    """Diffusion models look their times up in a table; the peak is not compared, since convolutions have buffers."""
    model, shapes = tiny("StableDiffusionPipeline")
    found = training_step(
        shapes, lora, stored="float32", batch_size=2, latent_shape=(4, 32, 32), text_length=24,
        checkpointing=False, autocast=False,
    )  # fmt: skip
    assert found.kept == pytest.approx(real_step(model, (2, 4, 32, 32), 24, False, False)[0], rel=0.05)


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "Flux2KleinPipeline", "QwenImagePipeline"])
def test_encoding_holds_what_it_does(name: str, tiny: Callable[[str], tuple[FlowModel, Any]]) -> None:
    model, shapes = tiny(name)
    images = torch.zeros(1, 3, 64, 64)
    if name == "QwenImagePipeline":
        images = images.unsqueeze(2)
    found, latent = encoding_images(shapes.vae, "float32", (64, 64))
    assert latent == model.latent_shape(64, 64)
    with torch.no_grad():
        # The kernels of convolutions take memory for themselves, which the profiler would see.
        with step_memory.LiveBytes(model.vae.parameters()) as live:
            model.vae.encode(images.clone())
        assert found == pytest.approx(live.peak, rel=0.01)
        for part, encoder in model.pipeline.components.items():
            if part.startswith("text_encoder"):
                tokens = torch.ones(1, 24, dtype=torch.long)
                real = allocated(
                    lambda encoder=encoder, tokens=tokens: encoder(tokens, output_hidden_states=True)
                )
                same = getattr(shapes.pipeline, part)
                assert encoding_prompts(same, "float32", 24) == pytest.approx(real, rel=0.1, abs=4096)


def test_quantised_weights_on_their_way(tiny: Callable[[str], tuple[FlowModel, Any]]) -> None:
    """8 bits leave the weight in bfloat16 for the backward pass of all layers behind an adapter; nf4 leaves none."""
    _, shapes = tiny("Flux2KleinPipeline")
    steps = {
        (stored, checkpointing): training_step(
            shapes, lora, stored=stored, batch_size=1, latent_shape=(16, 2, 2), text_length=4,
            checkpointing=checkpointing,
        )
        for stored in ("bfloat16", "int8", "float8", "nf4")
        for checkpointing in (False, True)
    }  # fmt: skip
    layers = quantised_layers(shapes.network, "int8").values()
    weights = 2 * sum(layer.weight.numel() for layer in layers)
    more = steps["int8", False].kept - steps["bfloat16", False].kept
    assert 0.5 * weights < more <= weights
    assert steps["int8", False] == steps["float8", False]
    assert abs(steps["nf4", False].kept - steps["bfloat16", False].kept) < 0.02 * weights
    assert steps["int8", True].kept - steps["bfloat16", True].kept < 0.2 * weights


def test_norms_are_float32_as_on_a_gpu() -> None:
    x, weight = torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)
    usual = F.layer_norm
    with step_memory._cuda_precision():
        assert F.layer_norm(x, (4,), weight).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert F.layer_norm(x, (4,), weight).dtype == torch.float32
            assert F.rms_norm(x, (4,), weight).dtype == torch.float32
    assert F.layer_norm is usual


# ---------------------------------------------------------------- plans and their lines


def test_a_plan_adds_up(klein: MemoryPlanner) -> None:
    usual = klein.plan(FineTuning())
    assert usual.training == pytest.approx(
        usual.base + usual.adapter + usual.gradients + usual.optimizer + usual.averages + usual.activations
    )
    assert usual.kept == 0 and usual.peak == max(usual.prompts, usual.images, usual.training)
    fills = klein.plan(FineTuning(inpainting=True))  # each step encodes its image with a hole
    assert fills.training >= usual.training + fills.autoencoder and fills.images == usual.images
    assert fills.activations >= fills.images - fills.autoencoder > 0
    large = klein.plan(FineTuning(batch_size=2))
    assert large.activations == pytest.approx(2 * usual.activations, rel=0.05)
    plain = klein.plan(FineTuning(gradient_checkpointing=False))
    assert plain.activations > 5 * usual.activations


def test_lines_of_a_published_model(klein: MemoryPlanner) -> None:
    lines = klein.lines(FineTuning(gradient_checkpointing=False))
    cards = {line.partition(" GB: ")[0]: line.partition(" GB: ")[2] for line in lines if " GB: " in line}
    assert list(cards) == ["12", "16", "24", "48", "80"]
    assert cards["12"].startswith("fits with --gradient-checkpointing (9.") and cards["48"] == "fits"


@pytest.mark.parametrize(
    ("gib", "settings", "flags"),
    [
        (80, FineTuning(), []),
        (12, FineTuning(), []),
        (8, FineTuning(), ["--quantize nf4"]),
        pytest.param(4.5, FineTuning(), ["--quantize nf4", "--resolution 768"], marks=pytest.mark.slow),
        (2, FineTuning(), None),
        (80, FineTuning(lora_rank=0), ["--optimizer adamw-8bit"]),
        (24, FineTuning(lora_rank=0), ["--lora-rank 16"]),
        (8, FineTuning(lora_rank=0), ["--lora-rank 16", "--quantize nf4"]),
    ],
)
def test_flags_with_which_a_run_fits(
    gib: float, settings: FineTuning, flags: list[str] | None, klein: MemoryPlanner
) -> None:
    found = klein.fitting(settings, gib)
    if flags is None:
        assert found is None
    else:
        assert found is not None and found[0] == flags
        assert found[1].peak <= (gib - memory_plan.RESERVED) * GIB


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> MemoryPlanner:
    return MemoryPlanner(model_from_configs(unpacked("flux2-klein-4b", tmp_path_factory.mktemp("klein"))))


@pytest.mark.slow
def test_lines_of_a_model_of_20b(tmp_path: Path) -> None:
    planner = MemoryPlanner(model_from_configs(unpacked("qwen-image", tmp_path)))
    lines = planner.lines(FineTuning())
    cards = {line.partition(" GB: ")[0]: line.partition(" GB: ")[2] for line in lines if " GB: " in line}
    assert cards["12"] == "does not fit"
    assert cards["24"].startswith("fits with --quantize nf4 (1")
    assert cards["48"] == cards["80"] == "fits"


def test_a_model_whose_steps_cannot_be_simulated(tiny: Callable[[str], tuple[FlowModel, Any]]) -> None:
    _, shapes = tiny("HiDreamImagePipeline")
    planner = MemoryPlanner(shapes)
    plan = planner.plan(replace(LORA, resolution=64))
    assert plan.activations is None and plan.base > 0 and math.isfinite(plan.peak)
    lines = planner.lines(replace(LORA, resolution=64))
    assert lines[-2] == "80 GB: 79.00 GiB are left for activations, which cannot be counted for this model"
    assert any(line.split() == ["activations", "unknown"] for line in lines)


def test_models_without_configs_of_diffusers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        model_from_configs(tmp_path / "absent")
    (tmp_path / "model_index.json").write_text('{"_class_name": "LatentFlowPipeline"}')
    with pytest.raises(UserError, match="no pretrained model of diffusers"):
        model_from_configs(tmp_path)
