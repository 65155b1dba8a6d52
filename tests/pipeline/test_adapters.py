"""Adapters on pipelines: loaded, weighed, fused and unloaded as diffusers' users do it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentflow import LatentFlowEditPipeline, LatentFlowImg2ImgPipeline, LatentFlowInpaintPipeline
from latentflow.errors import UserError
from latentflow.pipeline import LatentFlowPipeline
from latentflow.pipeline import adapter_files as pipeline_adapter_files
from latentflow.pipeline import adapters as pipeline_adapters
from latentflow.training.fine_tune.adapters import Adapter

pytest.importorskip("peft", reason='needs peft: pip install -e ".[lora]"')
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict

from .adapters import make_adapter
from .conftest import close, quiet

FILE = "pytorch_lora_weights.safetensors"
KINDS: list[dict[str, Any]] = [
    {},
    {"lora_dora": True},
    {"lora_alpha": 6.0, "lora_layers": ("all",)},
    {"lora_text_encoder": True},
]


def opened(folder: Path, kind: Any = LatentFlowPipeline, **options: Any) -> Any:
    return quiet(kind.from_pretrained(folder, **options))


def drawn(pipe: Any, **condition: Any) -> Tensor:
    condition = condition or {"prompt": ["a red apple"]}
    generator = torch.Generator().manual_seed(0)
    images: Tensor = pipe(
        **condition, generator=generator, output_type="latent", num_inference_steps=2
    ).images
    return images


def pipeline_of(adapter: Adapter, *, merged: bool = False) -> Any:
    """What is trained, as it is or with the adapter merged."""
    pipe = adapter.model.pipeline
    return quiet(pipe.from_pipe(pipe, **(adapter.merged() if merged else {})))


def test_an_adapter_before_its_first_step_changes_nothing(dit_folder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(dit_folder, tmp_path, size=0.0, lora_text_encoder=True)
    pipe = opened(dit_folder)
    before = drawn(pipe)
    assert torch.equal(drawn(pipeline_of(adapter)), before)
    pipe.load_lora_weights(tmp_path, adapter_name="fresh")
    assert torch.equal(drawn(pipe), before)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_trained_merged_loaded_and_fused_are_the_same(
    dit_folder: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    adapter = make_adapter(dit_folder, tmp_path, words=["zebra"], **config)
    pipe = opened(dit_folder)
    asked = {"prompt": ["a red zebra"]}
    base = drawn(pipe, **asked)
    trained = drawn(pipeline_of(adapter), **asked)
    assert (trained - base).abs().max() > 0.1
    close(drawn(pipeline_of(adapter, merged=True), **asked), trained)
    pipe.load_lora_weights(tmp_path / FILE, adapter_name="one")
    assert pipe.get_active_adapters() == ["one"]
    close(drawn(pipe, **asked), trained)
    pipe.fuse_lora()
    close(drawn(pipe, **asked), trained)
    pipe.unfuse_lora()
    close(drawn(pipe, **asked), trained)


def test_after_unloading_the_base_is_what_it_was(dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path, words=["zebra"], lora_text_encoder=True)
    pipe = opened(dit_folder)
    vocabulary, weights = pipe.tokenizer.get_vocab(), pipe.text_encoder.state_dict()
    before = [drawn(pipe), drawn(pipe, prompt=["a zebra"])]
    pipe.load_lora_weights(tmp_path, adapter_name="one")
    assert not torch.equal(drawn(pipe), before[0])
    pipe.unload_lora_weights()
    assert torch.equal(drawn(pipe), before[0]) and torch.equal(drawn(pipe, prompt=["a zebra"]), before[1])
    assert pipe.tokenizer.get_vocab() == vocabulary
    after = pipe.text_encoder.state_dict()
    assert weights.keys() == after.keys() and all(torch.equal(weights[name], after[name]) for name in weights)


def test_two_at_once_are_the_weighted_sum(dit_folder: Path, tmp_path: Path) -> None:
    weights = {"left": 0.75, "right": -0.5}
    pipe = opened(dit_folder)
    by_hand = opened(dit_folder)
    with torch.no_grad():
        layers = dict(by_hand.transformer.named_modules())
        for seed, (name, weight) in enumerate(weights.items()):
            make_adapter(dit_folder, tmp_path / name, seed=seed, lora_alpha=3.0)
            pipe.load_lora_weights(tmp_path / name, adapter_name=name)
            state = load_file(tmp_path / name / FILE)
            for key, down in state.items():
                if key.endswith("lora_A.weight"):
                    layer = layers[key.removeprefix("transformer.").removesuffix(".lora_A.weight")]
                    layer.weight += weight * 3.0 / 2 * state[key.replace("lora_A", "lora_B")] @ down
    pipe.set_adapters(list(weights), list(weights.values()))
    assert sorted(pipe.get_active_adapters()) == ["left", "right"]
    close(drawn(pipe), drawn(by_hand))
    pipe.fuse_lora()
    close(drawn(pipe), drawn(by_hand))


def test_the_last_that_is_loaded_is_active_alone(dit_folder: Path, tmp_path: Path) -> None:
    """Also where it has no layers and the first one has: in the text encoder, in the feed-forward."""
    make_adapter(dit_folder, tmp_path / "wide", lora_text_encoder=True)
    make_adapter(dit_folder, tmp_path / "narrow", seed=1, lora_layers=("attention",))
    pipe = opened(dit_folder)
    pipe.load_lora_weights(tmp_path / "narrow", adapter_name="narrow")
    alone = drawn(pipe)
    pipe = opened(dit_folder)
    pipe.load_lora_weights(tmp_path / "wide", adapter_name="wide")
    pipe.load_lora_weights(tmp_path / "narrow", adapter_name="narrow")
    assert pipe.get_active_adapters() == ["narrow"]
    assert torch.equal(drawn(pipe), alone)


def test_weights_are_numbers_of_any_kind(dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path, words=["zebra"])
    pipe = opened(dit_folder)
    pipe.load_lora_weights(tmp_path, adapter_name="one")
    images = []
    for weight in (0.5, np.float32(0.5), torch.tensor(0.5)):
        pipe.set_adapters(["one"], [weight])
        images.append(drawn(pipe, prompt=["a zebra"]))
    torch.testing.assert_close(images[1], images[0])
    torch.testing.assert_close(images[2], images[0])


def test_the_scale_of_fusing_is_a_weight_and_goes_with_it(dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path, words=["zebra"], lora_text_encoder=True)
    pipe = opened(dit_folder)
    asked = {"prompt": ["a red zebra"]}
    pipe.load_lora_weights(tmp_path, adapter_name="one")
    whole = drawn(pipe, **asked)
    pipe.set_adapters("one", 0.5)
    half = drawn(pipe, **asked)
    pipe.set_adapters("one")
    pipe.fuse_lora(lora_scale=0.5)
    close(drawn(pipe, **asked), half)
    pipe.unfuse_lora()
    close(drawn(pipe, **asked), whole)


def test_fused_one_after_the_other_or_at_once(dit_folder: Path, tmp_path: Path) -> None:
    pipe, by_turns = opened(dit_folder), opened(dit_folder)
    for seed, name in enumerate(("left", "right")):
        words = ["zebra", name]
        make_adapter(dit_folder, tmp_path / name, seed=seed, words=words, lora_text_encoder=True)
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
        by_turns.load_lora_weights(tmp_path / name, adapter_name=name)
        by_turns.fuse_lora()
        by_turns.unload_lora_weights()
    pipe.set_adapters(["left", "right"])
    for prompt in ("a red zebra", "left right"):
        close(drawn(by_turns, prompt=[prompt]), drawn(pipe, prompt=[prompt]))


def test_unloading_keeps_what_is_fused_and_no_more(dit_folder: Path, tmp_path: Path) -> None:
    for seed, word in enumerate(("zebra", "lynx")):
        make_adapter(dit_folder, tmp_path / word, seed=seed, words=[word])
    pipe = opened(dit_folder)
    pipe.load_lora_weights(tmp_path / "zebra")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    asked = {"prompt": ["a zebra, a lynx"]}
    fused = drawn(pipe, **asked)
    pipe.load_lora_weights(tmp_path / "lynx")
    assert not torch.equal(drawn(pipe, **asked), fused)
    pipe.unload_lora_weights()
    assert torch.equal(drawn(pipe, **asked), fused)
    assert "zebra" in pipe.tokenizer.get_vocab() and "lynx" not in pipe.tokenizer.get_vocab()


def test_without_the_last_one_the_base_is_saved(dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path / "one", words=["zebra"], lora_text_encoder=True)
    pipe = opened(dit_folder)
    before = drawn(pipe)
    pipe.load_lora_weights(tmp_path / "one", adapter_name="one")
    pipe.delete_adapters("one")
    assert not pipe.get_list_adapters() and torch.equal(drawn(pipe), before)
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(drawn(opened(tmp_path / "saved")), before)


def test_disabled_adapters_do_nothing_until_they_are_enabled(dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path, words=["zebra"], lora_text_encoder=True)
    pipe = opened(dit_folder)
    before = drawn(pipe)
    mean = pipe.text_encoder.get_input_embeddings().weight.mean(0)
    pipe.load_lora_weights(tmp_path, adapter_name="one")
    with_it = drawn(pipe, prompt=["a zebra"])
    pipe.disable_lora()
    assert torch.equal(drawn(pipe), before)
    zebra = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.get_vocab()["zebra"]]
    torch.testing.assert_close(zebra, mean)
    pipe.enable_lora()
    assert torch.equal(drawn(pipe, prompt=["a zebra"]), with_it)


def test_hotswap_replaces_layers_of_the_transformer_only(dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path / "text", lora_text_encoder=True)
    for seed, name in enumerate("ab"):
        make_adapter(dit_folder, tmp_path / name, seed=seed, words=["zebra"])
    pipe, other = opened(dit_folder), opened(dit_folder)
    other.load_lora_weights(tmp_path / "b")
    pipe.load_lora_weights(tmp_path / "a", adapter_name="one")
    pipe.load_lora_weights(tmp_path / "b", adapter_name="one", hotswap=True)
    asked = {"prompt": ["a zebra"]}
    assert torch.equal(drawn(pipe, **asked), drawn(other, **asked))
    with pytest.raises(UserError, match="hotswap"):
        pipe.load_lora_weights(tmp_path / "text", adapter_name="one", hotswap=True)
    pipe = opened(dit_folder)
    pipe.load_lora_weights(tmp_path / "text", adapter_name="one")
    with pytest.raises(UserError, match="hotswap"):
        pipe.load_lora_weights(tmp_path / "b", adapter_name="one", hotswap=True)


def test_a_word_that_two_bring_is_their_weighted_sum(dit_folder: Path, tmp_path: Path) -> None:
    rows = {}
    pipe = opened(dit_folder)
    for seed, words in enumerate((["zebra", "lynx"], ["emu", "zebra"])):
        make_adapter(dit_folder, tmp_path / str(seed), seed=seed, words=words)
        pipe.load_lora_weights(tmp_path / str(seed), adapter_name=f"one{seed}")
        state = load_file(tmp_path / str(seed) / FILE)["added.words"]
        rows |= {(seed, word): state[place] for place, word in enumerate(words)}
    mean = LatentFlowPipeline.from_pretrained(dit_folder).text_encoder.get_input_embeddings().weight.mean(0)
    pipe.set_adapters(["one0", "one1"], [0.5, 0.25])
    table, vocabulary = pipe.text_encoder.get_input_embeddings().weight, pipe.tokenizer.get_vocab()
    expected = {"lynx": 0.5 * rows[0, "lynx"], "emu": 0.25 * rows[1, "emu"]}
    expected["zebra"] = 0.5 * rows[0, "zebra"] + 0.25 * rows[1, "zebra"]
    for word, distance in expected.items():
        torch.testing.assert_close(table[vocabulary[word]], mean + distance)
    pipe.delete_adapters("one0")
    assert "lynx" not in pipe.tokenizer.get_vocab() and "emu" in pipe.tokenizer.get_vocab()


def test_new_classes_join_those_of_the_base(class_folder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(class_folder, tmp_path, classes=["boat", "car"])
    names = {0: "boat", 1: "car", 2: "apple", 3: "hat", 4: "tree"}
    trained = pipeline_of(adapter, merged=True)
    pipe = opened(class_folder)
    before = drawn(pipe, class_labels=["hat"])
    pipe.load_lora_weights(tmp_path, adapter_name="vehicles")
    assert pipe.labels == {"apple": 0, "hat": 1, "tree": 2, "boat": 3, "car": 4}
    for name in names.values():
        close(drawn(pipe, class_labels=[name]), drawn(trained, class_labels=[name]))
    pipe.unload_lora_weights()
    assert torch.equal(drawn(pipe, class_labels=["hat"]), before)
    with pytest.raises(UserError, match="unknown class 'boat'"):
        drawn(pipe, class_labels=["boat"])


@pytest.mark.parametrize(
    "kind", [LatentFlowImg2ImgPipeline, LatentFlowInpaintPipeline, LatentFlowEditPipeline]
)
def test_every_pipeline_takes_them(kind: Any, dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path)
    pipe = opened(dit_folder, kind)
    pipe.load_lora_weights(tmp_path, adapter_name="one")
    assert pipe.get_list_adapters() == {"transformer": ["one"]}
    assert drawn(opened(dit_folder)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_base_is_known_in_half_precision(dtype: torch.dtype, dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path)
    pipe = opened(dit_folder, dtype=dtype)
    pipe.load_lora_weights(tmp_path)
    assert pipe.get_active_adapters() == ["default_0"]


def test_another_base_is_refused_unless_forced(
    dit_folder: Path, tmp_path: Path, assemble: Callable[[Any], Any]
) -> None:
    make_adapter(dit_folder, tmp_path)
    pipe = opened(dit_folder)
    with torch.no_grad():
        pipe.transformer.blocks[0].attn.proj.weight[0, 0] += 0.01
    with pytest.raises(UserError, match=r"other weights .*\n.*any_base=True"):
        pipe.load_lora_weights(tmp_path, adapter_name="one")
    assert not pipe.get_list_adapters()
    pipe.load_lora_weights(tmp_path, adapter_name="one", any_base=True)
    assert pipe.get_active_adapters() == ["one"]


def test_another_architecture_is_refused(dit_folder: Path, class_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path / "text")
    with pytest.raises(
        UserError, match=r"another architecture: .* layers fit, .*cross_attn\S+ is not in this network"
    ):
        opened(class_folder).load_lora_weights(tmp_path / "text")
    state = load_file(tmp_path / "text" / FILE)
    wider = {key: torch.cat([one, one], -1) if "lora_A" in key else one for key, one in state.items()}
    save_file(wider, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match=r"another architecture.*: .* has 32 inputs there, 16 here"):
        opened(dit_folder).load_lora_weights(tmp_path / "wide.safetensors")
    # Of other models, in diffusers' and in kohya's spelling: diffusers itself loads nothing of them, and warns.
    for layer in ("unet.down_blocks.0.to_q.lora_A.weight", "lora_unet_down_blocks_0_to_q.lora_down.weight"):
        save_file({layer: torch.zeros(2, 16)}, tmp_path / "unet.safetensors")
        with pytest.raises(UserError, match=r"another architecture: .*its layer .*unet.down_blocks"):
            opened(dit_folder).load_lora_weights(tmp_path / "unet.safetensors")


def test_words_that_do_not_fit_are_refused_before_anything_is_loaded(
    dit_folder: Path, tmp_path: Path
) -> None:
    make_adapter(dit_folder, tmp_path / "one", words=["zebra"])
    pipe = opened(dit_folder)
    state = load_file(tmp_path / "one" / FILE)
    with pytest.raises(UserError, match=r"1 rows of added.words and 0 names"):
        pipe.load_lora_weights(state)  # which tensors alone do not have
    rewritten(tmp_path / "one" / FILE, tmp_path / "wide.safetensors", {"added.words": torch.zeros(1, 7)})
    with pytest.raises(UserError, match=r"added.words has 7 columns there, 16 here"):
        pipe.load_lora_weights(tmp_path / "wide.safetensors")
    assert not pipe.get_list_adapters()
    pipe.load_lora_weights(pipe.lora_state_dict(tmp_path / "one"))
    assert pipe.get_list_adapters() == {"transformer": ["default_0"]}


def test_settings_that_say_nothing_of_the_tensors_are_not_read(dit_folder: Path, tmp_path: Path) -> None:
    """Those of later versions of peft, and those by which it would import a module."""
    make_adapter(dit_folder, tmp_path, lora_alpha=6.0)
    others = {"transformer.of_the_future": 1, "transformer.megatron_core": "antigravity"}
    rewritten(tmp_path / FILE, tmp_path / "new.safetensors", {}, others)
    pipe, other = opened(dit_folder), opened(dit_folder)
    pipe.load_lora_weights(tmp_path / FILE)
    other.load_lora_weights(tmp_path / "new.safetensors")
    assert torch.equal(drawn(other), drawn(pipe))
    assert other.transformer.peft_config["default_0"].megatron_core == "megatron.core"  # peft's default


def rewritten(
    file: Path, to: Path, tensors: dict[str, Tensor], settings: dict[str, Any] | None = None
) -> None:
    """A copy of an adapter's file with other tensors or settings."""
    with safe_open(file, "pt") as opened_file:
        metadata = dict(opened_file.metadata())
    key = "lora_adapter_metadata"
    metadata[key] = json.dumps({**json.loads(metadata[key]), **(settings or {})})
    save_file({**load_file(file), **tensors}, to, metadata=metadata)


def test_the_file_of_a_folder(dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path / "run" / "adapter")
    pipe = opened(dit_folder)
    pipe.load_lora_weights(tmp_path / "run", subfolder="adapter", adapter_name="inside")
    odd = tmp_path / "odd"
    odd.mkdir()
    shutil.copy(tmp_path / "run" / "adapter" / FILE, odd / "checkpoint-500.safetensors")
    pipe.load_lora_weights(odd, adapter_name="only")
    shutil.copy(tmp_path / "run" / "adapter" / FILE, odd / "checkpoint-900.safetensors")
    with pytest.raises(UserError, match=r"several adapters: checkpoint-500.*, checkpoint-900"):
        pipe.load_lora_weights(odd)
    pipe.load_lora_weights(odd, weight_name="checkpoint-900.safetensors", adapter_name="named")
    shutil.copy(tmp_path / "run" / "adapter" / FILE, odd / FILE)
    pipe.load_lora_weights(odd, adapter_name="usual")
    assert pipe.get_list_adapters() == {"transformer": ["inside", "only", "named", "usual"]}


def test_only_safetensors_are_read_and_written(dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path)
    state = load_file(tmp_path / FILE)
    torch.save(state, tmp_path / "other.bin")
    pipe = opened(dit_folder)
    with pytest.raises(UserError, match=r"other\.bin is a pickle"):
        pipe.load_lora_weights(tmp_path, weight_name="other.bin")
    with pytest.raises(UserError, match="is a pickle"):
        pipe.load_lora_weights(tmp_path / "other.bin")
    with pytest.raises(UserError, match="safetensors only"):
        pipe.save_lora_weights(tmp_path / "saved", state, safe_serialization=False)
    assert not (tmp_path / "saved").exists() and not pipe.get_list_adapters()


def test_what_is_neither_here_nor_on_the_hub(dit_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise pipeline_adapter_files.HTTPError("Name or service not known")

    monkeypatch.setattr(pipeline_adapter_files, "_fetch_state_dict", no_network)
    with pytest.raises(UserError, match="runs/hat is no file or folder here"):
        opened(dit_folder).load_lora_weights("runs/hat")


def test_files_that_are_no_adapters_are_refused(dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path / "whole")
    pipe = opened(dit_folder)
    (tmp_path / "half").mkdir()
    whole = (tmp_path / "whole" / FILE).read_bytes()
    (tmp_path / "half" / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="could not be read"):
        pipe.load_lora_weights(tmp_path / "half")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.safetensors"):
        pipe.load_lora_weights(tmp_path / "empty")
    with pytest.raises(UserError, match="is no LoRA adapter: it holds the weights of a checkpoint"):
        pipe.load_lora_weights(dit_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    rewritten_facts = tmp_path / "facts.safetensors"
    save_file(load_file(tmp_path / "whole" / FILE), rewritten_facts, metadata={"latentflow": '{"base": "1"}'})
    with pytest.raises(UserError, match=r"its metadata 'latentflow': base is .1."):
        pipe.load_lora_weights(rewritten_facts)
    assert not pipe.get_list_adapters()


def test_what_others_made_loads_without_our_facts(dit_folder: Path, tmp_path: Path) -> None:
    """A file in diffusers' format alone, from tensors that `save_lora_weights` got."""
    make_adapter(dit_folder, tmp_path / "ours")
    pipe = opened(dit_folder)
    pipe.load_lora_weights(tmp_path / "ours", adapter_name="one")
    expected = drawn(pipe)
    state = load_file(tmp_path / "ours" / FILE)
    bare = {key.removeprefix("transformer."): one for key, one in state.items()}
    LatentFlowPipeline.save_lora_weights(tmp_path / "bare", transformer_lora_layers=bare)
    again = opened(dit_folder)
    again.load_lora_weights(tmp_path / "bare", adapter_name="one")
    close(drawn(again), expected, 1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"exclude_modules": ["blocks.0.attn.qkv"]},
        {"layers_to_transform": [0], "layers_pattern": "blocks"},
        {"target_modules": ["x_embedder.proj", "qkv"]},
    ],
    ids=str,
)
def test_what_peft_makes_with_its_own_settings_loads_and_merges(
    settings: dict[str, Any], dit_folder: Path, tmp_path: Path
) -> None:
    network = opened(dit_folder).transformer
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["qkv", "mlp.0"], "init_lora_weights": False}
    torch.manual_seed(0)
    network.add_adapter(LoraConfig(**{**config, **settings}))
    with torch.no_grad():
        for name, one in network.named_parameters():
            if "lora_" in name:
                one.normal_(std=0.3)
    LatentFlowPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(network),
        **_collate_lora_metadata({"transformer": network}),
    )
    own = opened(dit_folder, transformer=network)
    expected = drawn(own)
    assert (expected - drawn(opened(dit_folder))).abs().max() > 1e-3
    for load in ("load_lora_weights", "merge_lora_weights"):
        pipe = opened(dit_folder)
        getattr(pipe, load)(tmp_path)
        close(drawn(pipe), expected)


def test_a_pipeline_without_its_text_encoder_takes_the_rest(dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path, lora_text_encoder=True)
    embeds = {"prompt_embeds": torch.ones(1, 3, 16)}
    merged, loaded = (opened(dit_folder, text_encoder=None, tokenizer=None) for _ in range(2))
    merged.merge_lora_weights(tmp_path)
    loaded.load_lora_weights(tmp_path)
    close(drawn(merged, **embeds), drawn(loaded, **embeds))


def test_more_than_plain_layers_are_not_merged_without_peft(dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path / "dora", lora_dora=True)
    make_adapter(dit_folder, tmp_path / "words", words=["zebra"])
    for name in ("dora", "words"):
        with pytest.raises(UserError, match=r"is more than plain LoRA\npip install"):
            opened(dit_folder).merge_lora_weights(tmp_path / name)
    with pytest.raises(ValueError, match="pass transformer_lora_layers or"):
        LatentFlowPipeline.save_lora_weights(tmp_path)


def test_a_pipeline_with_loaded_adapters_is_not_saved_in_halves(dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path / "one")
    pipe = opened(dit_folder)
    pipe.load_lora_weights(tmp_path / "one")
    expected = drawn(pipe)
    with pytest.raises(UserError, match="while adapters are loaded"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "saved")
    close(drawn(opened(tmp_path / "saved")), expected)


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_nor_with_one_that_peft_put_there_itself(part: str, dit_folder: Path, tmp_path: Path) -> None:
    pipe = opened(dit_folder)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q"]), getattr(pipe, part))
    with pytest.raises(UserError, match="while adapters are loaded"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_without_peft_the_line_that_installs_it(
    dit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_adapters, "USE_PEFT_BACKEND", False)
    with pytest.raises(UserError, match='pip install "peft>='):
        opened(dit_folder).load_lora_weights(tmp_path)
