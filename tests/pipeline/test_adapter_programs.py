"""Adapters in the programs: several files, each with its weight."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentflow.config import AdapterChoice
from latentflow.errors import UserError
from latentflow.inference.opening import add_adapters, split_adapter

from .adapters import make_adapter
from .conftest import close
from .test_adapters import FILE, drawn, opened

pytest.importorskip("peft", reason='needs peft: pip install -e ".[lora]"')

Program = Callable[..., Any]


@pytest.fixture
def export(load_program: Callable[[str], Any]) -> Program:
    return lambda *arguments: load_program("export").main([str(argument) for argument in arguments])


def test_generate_draws_with_adapters(program: Program, dit_folder: Path, tmp_path: Path) -> None:
    from PIL import Image, ImageChops

    for seed, name in enumerate("ab"):
        make_adapter(dit_folder, tmp_path / name / "adapter", seed=seed, words=["zebra"])
    pipe = opened(dit_folder)
    pipe.load_lora_weights("a/adapter", adapter_name="one")
    pipe.load_lora_weights("b/adapter", adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.5, 1.0])
    [expected] = pipe("a zebra", generator=torch.Generator().manual_seed(3), num_inference_steps=2).images
    plain = ["generate", "a zebra", "--seed", 3]
    program(*plain, "-o", "base.png")
    program(*plain, "--lora", "a=0.5", "--lora", "b/adapter", "-o", "both.png")
    with Image.open("both.png") as both, Image.open("base.png") as base:
        assert max(high for _, high in ImageChops.difference(both, expected).getextrema()) <= 1
        assert max(high for _, high in ImageChops.difference(both, base).getextrema()) > 8
    with pytest.raises(UserError, match="--lora nowhere/at/all: no such folder"):
        program(*plain, "--lora", "nowhere/at/all:0.5")
    with pytest.raises(UserError, match="--lora a:nan: the weight is 'nan'"):
        program(*plain, "--lora", "a:nan")


def test_where_the_path_ends_and_the_weight_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("hats", "hats:2", "lr=1e-3"):
        (tmp_path / run / "adapter").mkdir(parents=True)
    Path("C:").mkdir()
    for file in ("C:\\runs\\hats.safetensors", "C:/hats.safetensors"):  # as Windows has them
        Path(file).touch()
    expected = {
        "hats": ("hats/adapter", 1.0),
        "hats:0.5": ("hats/adapter", 0.5),
        "hats=0.5": ("hats/adapter", 0.5),
        "hats:2": ("hats:2/adapter", 1.0),
        "hats:2:-1": ("hats:2/adapter", -1.0),
        "lr=1e-3": ("lr=1e-3/adapter", 1.0),
        "lr=1e-3=.5": ("lr=1e-3/adapter", 0.5),
        "C:\\runs\\hats.safetensors": ("C:\\runs\\hats.safetensors", 1.0),
        "C:\\runs\\hats.safetensors=2": ("C:\\runs\\hats.safetensors", 2.0),
        "C:/hats.safetensors:2": ("C:/hats.safetensors", 2.0),
        "user/name=3": ("user/name", 3.0),
        "user/name": ("user/name", 1.0),
    }
    pipe = Mock()
    add_adapters(pipe, AdapterChoice(lora=tuple(expected)), ".")
    sources = [call.args[0] for call in pipe.load_lora_weights.call_args_list]
    assert [*zip(sources, pipe.set_adapters.call_args.args[1], strict=True)] == [*expected.values()]
    names = [call.kwargs["adapter_name"] for call in pipe.load_lora_weights.call_args_list]
    assert len({*names}) == len(names)
    for text, what in {
        "hats=": "the weight is ''",
        "hats=0,8": "the weight is '0,8'",
        "hats=inf": "the weight is 'inf'",
        "hat=0.5": "--lora hat: no such folder or file",
        "C:\\runs\\hat": r"--lora C:\\runs\\hat: no such folder or file",
        "lr=2e-3x": "--lora lr=2e-3x: no such",
    }.items():
        with pytest.raises(UserError, match=what):
            split_adapter(text)


def test_generate_takes_an_adapter_of_another_base_on_request(
    program: Program, dit_folder: Path, tmp_path: Path
) -> None:
    make_adapter(dit_folder, tmp_path / "other" / "adapter")
    other = opened(dit_folder)
    with torch.no_grad():
        other.transformer.blocks[0].attn.proj.weight[0, 0] += 0.01
    other.save_pretrained("base")
    line = ["generate", "a", "--checkpoint", "base", "-o", "a.png", "--lora", "other"]
    with pytest.raises(UserError, match="--lora-any-base"):
        program(*line)
    assert not Path("a.png").exists()
    assert program(*line, "--lora-any-base") == [Path("a.png")]


def test_export_merges(export: Program, dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path / "run" / "adapter", words=["zebra"], lora_text_encoder=True)
    pipe = opened(dit_folder)
    pipe.load_lora_weights(tmp_path / "run" / "adapter", adapter_name="one")
    pipe.set_adapters("one", 0.5)
    merged = tmp_path / "merged"
    export(dit_folder, "--lora", f"{tmp_path / 'run'}:0.5", "-o", merged)
    for asked in ({"prompt": ["a zebra"]}, {"prompt": ["a red apple"]}):
        close(drawn(opened(merged), **asked), drawn(pipe, **asked))


def test_export_writes_the_adapter_of_a_run(export: Program, dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path / "run" / "adapter")
    export(tmp_path / "run", "--adapter", "-o", tmp_path / "alone")
    opened(dit_folder).load_lora_weights(tmp_path / "alone")
    with pytest.raises(UserError, match="holds no adapter"):
        export(dit_folder, "--adapter", "-o", tmp_path / "other")
    with pytest.raises(UserError, match="--export-dtype has no effect"):
        export(tmp_path / "run", "--adapter", "--export-dtype", "float16", "-o", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_export_writes_the_adapter_in_other_layouts(
    export: Program, dit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that kept its pipeline, and of one that says in its settings what it began from."""
    for run in ("kept", "named"):
        make_adapter(dit_folder, tmp_path / run / "adapter", lora_alpha=5.0)
    shutil.copytree(dit_folder, tmp_path / "kept" / "pipeline")
    (tmp_path / "kept" / "config.yaml").write_text("lora_rank: 2\n")
    (tmp_path / "named" / "config.yaml").write_text(f"init_from: {dit_folder}\n")
    pipe = opened(dit_folder)
    pipe.load_lora_weights(tmp_path / "kept" / "adapter")
    expected = drawn(pipe)
    for run, layout in (("kept", "kohya"), ("named", "comfyui"), ("named", "diffusers")):
        export(tmp_path / run, "--adapter", "--layout", layout, "-o", to := tmp_path / layout)
        pipe = opened(dit_folder)
        pipe.load_lora_weights(to)
        close(drawn(pipe), expected)
    assert all(name.startswith("lora_unet_") for name in load_file(tmp_path / "kohya" / FILE))
    to = tmp_path / "other"
    with pytest.raises(UserError, match="--layout kohya is for adapters alone\nAdd --adapter"):
        export(dit_folder, "--layout", "kohya", "-o", to)
    (tmp_path / "named" / "config.yaml").write_text("init_from: nowhere/at/all\n")
    with pytest.raises(UserError, match="nowhere/at/all"):
        export(tmp_path / "named", "--adapter", "--layout", "kohya", "-o", to)
    (tmp_path / "named" / "config.yaml").unlink()
    with pytest.raises(UserError, match="is not a run folder"):
        export(tmp_path / "named", "--adapter", "--layout", "kohya", "-o", to)
    capsys.readouterr()
    with pytest.raises((SystemExit, UserError)) as caught:
        export(tmp_path / "kept", "--adapter", "--layout", "comfy", "-o", to)
    assert "comfyui" in str(caught.value) + "".join(capsys.readouterr())
    assert not to.exists()


def test_export_overwrites_nothing(export: Program, dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path / "run" / "adapter")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "model_index.json").write_text("mine")
    with pytest.raises(UserError, match="nothing is overwritten"):
        export(tmp_path / "run", "--adapter", "-o", mine)
    assert (mine / "model_index.json").read_text() == "mine"
    shutil.rmtree(mine)
    with pytest.raises(UserError, match="is not a pipeline folder"):  # and no run that has a pipeline
        export(tmp_path / "run", "-o", mine)


def kohya_file(base: Path, file: Path, seed: int) -> Path:
    """An adapter in kohya's layout, with an alpha that is not its rank."""
    make_adapter(base, file.parent / "ours", seed=seed)
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(file.parent / "ours" / FILE).items():
        layer, _, end = name.removeprefix("transformer.").rpartition(".lora_")
        flat = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{flat}.lora_{'down' if end.startswith('A') else 'up'}.weight"] = value
        tensors[f"{flat}.alpha"] = torch.tensor(3.0)
    save_file(tensors, file)
    return file


def test_several_files_of_one_name_are_the_weighted_sum(
    export: Program, dit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = opened(dit_folder)
    for seed, (folder, name) in enumerate({"lr=1": "left", "lr=2": "right"}.items()):
        pipe.load_lora_weights(
            kohya_file(dit_folder, Path(folder, "lora.safetensors"), seed), adapter_name=name
        )
    pipe.set_adapters(["left", "right"], [0.75, -0.5])
    expected = drawn(pipe)
    export(
        dit_folder,
        "--lora=lr=1/lora.safetensors=0.75",
        "--lora",
        "lr=2/lora.safetensors=-0.5",
        "-o",
        "merged",
    )
    close(drawn(opened(Path("merged"))), expected)
    Path("flags.yaml").write_text("lora: [lr=1/lora.safetensors=0.75, lr=2/lora.safetensors=-0.5]")
    export(dit_folder, "--config", "flags.yaml", "-o", "again")
    close(drawn(opened(Path("again"))), expected)


@pytest.mark.parametrize("name", ["generate", "inpaint", "edit", "interpolate", "evaluate", "export", "app"])
def test_every_program_that_opens_a_checkpoint_takes_adapters(
    name: str, load_program: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        load_program(name).main(["--help-all"])
    assert "--lora FILE[=WEIGHT]" in capsys.readouterr().out


def test_files_that_cannot_be_added_are_one_sentence_of_the_program(
    program: Program, dit_folder: Path, tmp_path: Path
) -> None:
    save_file(
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 4)}, "flux.safetensors"
    )
    Path("hats.pt").write_bytes(b"pickle")
    for file, what in {"flux.safetensors": "made for FLUX", "hats.pt": "is a pickle"}.items():
        with pytest.raises(UserError, match=f"{file}.*{what}"):
            program("generate", "a", "-o", "a.png", "--lora", f"{file}=0.5")
    assert not Path("a.png").exists()
