"""Adapters as users of diffusers and peft take them for granted: names, weights, one network alone, stock pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from latentflow.errors import UserError

from .adapters import make_adapter
from .conftest import close
from .test_adapters import FILE, drawn, opened

pytest.importorskip("peft", reason='needs peft: pip install -e ".[lora]"')
from peft.utils import get_peft_model_state_dict


def test_names_are_free_ones_and_taken_ones_are_refused(dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path, lora_text_encoder=True)
    text = {
        key: value for key, value in load_file(tmp_path / FILE).items() if key.startswith("text_encoder.")
    }
    pipe = opened(dit_folder)
    pipe.load_lora_weights(text)
    pipe.load_lora_weights(tmp_path)
    assert pipe.get_list_adapters() == {
        "transformer": ["default_1"],
        "text_encoder": ["default_0", "default_1"],
    }
    pipe.delete_adapters("default_0")
    pipe.load_lora_weights(tmp_path)
    assert pipe.get_list_adapters()["transformer"] == ["default_1", "default_2"]
    with pytest.raises(ValueError, match="adapter_name default_2 is taken"):
        pipe.load_lora_weights(text, adapter_name="default_2")
    with pytest.raises(UserError, match=r"adapter_name hats\.v2 has a dot"):
        pipe.load_lora_weights(tmp_path, adapter_name="hats.v2")


def test_an_adapter_of_the_text_encoder_alone_is_active_alone(dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path, lora_text_encoder=True)
    text = {
        key: value for key, value in load_file(tmp_path / FILE).items() if key.startswith("text_encoder.")
    }
    pipe, other = opened(dit_folder), opened(dit_folder)
    other.load_lora_weights(text)
    pipe.load_lora_weights(tmp_path, adapter_name="both")
    pipe.load_lora_weights(text, adapter_name="text")
    assert pipe.get_active_adapters() == ["text"]
    assert torch.equal(drawn(pipe), drawn(other))


@pytest.mark.parametrize(
    "weight", ["0.5x", float("nan"), float("inf"), [0.5], {"transformer": "much"}], ids=str
)
def test_weights_that_are_no_numbers_are_refused(weight: Any, dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path)
    pipe = opened(dit_folder)
    pipe.load_lora_weights(tmp_path, adapter_name="one")
    expected = drawn(pipe)
    with pytest.raises(UserError, match=r"the weight of an adapter is .*\nIt must be a number such as 0.8."):
        pipe.set_adapters(["one"], [weight])
    with pytest.raises(UserError, match="needs the name"):
        pipe.set_adapters([])
    with pytest.raises(ValueError, match="not in the list of present adapters"):
        pipe.set_adapters("two")
    assert torch.equal(drawn(pipe), expected)


def test_layers_of_one_network_are_written_and_read_by_it_or_by_the_pipeline(
    dit_folder: Path, tmp_path: Path
) -> None:
    """`load_lora_adapter` and `save_lora_adapter` of the network; its file has no part of a pipeline in its names."""
    make_adapter(dit_folder, tmp_path, lora_alpha=6.0)
    pipe, other = opened(dit_folder), opened(dit_folder)
    pipe.load_lora_weights(tmp_path)
    other.transformer.load_lora_adapter(tmp_path, weight_name=FILE, adapter_name="one")
    assert torch.equal(drawn(other), drawn(pipe)) and other.get_active_adapters() == ["one"]
    other.transformer.save_lora_adapter(tmp_path / "alone", adapter_name="one")
    again = opened(dit_folder)
    again.load_lora_weights(tmp_path / "alone")
    close(drawn(again), drawn(pipe), 1e-5)
    again.set_lora_device(["default_0"], "cpu")
    again.transformer.delete_adapters("default_0")
    assert not again.get_list_adapters()


def test_our_files_open_in_a_pipeline_of_diffusers(dit_folder: Path, tmp_path: Path) -> None:
    """A pipeline that is none of ours, with our network and diffusers' own loader; and what it writes opens here."""
    from diffusers import DiffusionPipeline
    from diffusers.loaders import FluxLoraLoaderMixin

    class Stock(DiffusionPipeline, FluxLoraLoaderMixin):  # type: ignore[misc]
        text_encoder = None

        def __init__(self, transformer: Any) -> None:
            super().__init__()
            self.register_modules(transformer=transformer)

    make_adapter(dit_folder, tmp_path / "ours", lora_alpha=6.0)
    pipe, host = opened(dit_folder), opened(dit_folder)
    pipe.load_lora_weights(tmp_path / "ours")
    stock = Stock(host.transformer)
    stock.load_lora_weights(tmp_path / "ours", adapter_name="one")
    assert torch.equal(drawn(host), drawn(pipe))
    network = stock.transformer
    Stock.save_lora_weights(
        tmp_path / "theirs",
        get_peft_model_state_dict(network, adapter_name="one"),
        transformer_lora_adapter_metadata=network.peft_config["one"].to_dict(),
    )
    again = opened(dit_folder)
    again.load_lora_weights(tmp_path / "theirs")
    assert torch.equal(drawn(again), drawn(pipe))


def test_what_diffusers_converts_for_kohya_opens(dit_folder: Path, tmp_path: Path) -> None:
    from diffusers.utils import convert_state_dict_to_kohya

    make_adapter(dit_folder, tmp_path)
    pipe, other = opened(dit_folder), opened(dit_folder)
    pipe.load_lora_weights(tmp_path)
    other.load_lora_weights(convert_state_dict_to_kohya(load_file(tmp_path / FILE)))
    close(drawn(other), drawn(pipe), 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 0.1)])
def test_files_in_half_precision_are_used_in_that_of_the_network(
    dtype: torch.dtype, tolerance: float, dit_folder: Path, tmp_path: Path
) -> None:
    make_adapter(dit_folder, tmp_path)
    half = {name: value.to(dtype) for name, value in load_file(tmp_path / FILE).items()}
    pipe, other = opened(dit_folder), opened(dit_folder)
    pipe.load_lora_weights(tmp_path)
    other.load_lora_weights(half)
    assert {value.dtype for value in other.transformer.parameters()} == {torch.float32}
    close(drawn(other), drawn(pipe), tolerance)
