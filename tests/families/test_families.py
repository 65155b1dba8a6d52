"""The table of families: what opens, what is left out, and what other packages add."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import latentflow.families
from latentflow import FlowModel
from latentflow.errors import UserError
from latentflow.families import FAMILIES, GROUP, SIBLINGS, family_of
from latentflow.families.left_out import LEFT_OUT
from latentflow.families.siblings import text_to_image
from latentflow.families.table import table

from .tiny import CONSISTENCY, TINY, WITH_EXTRA_CHANNELS, WITH_REFERENCES, checkpoint


def pipelines() -> set[str]:
    """Return the names of all pipeline classes that diffusers exports, those of packages that are missing too."""
    found = set()
    for name in dir(diffusers):
        kind = getattr(diffusers, name)
        missing = type(kind).__name__ == "DummyObject" and "Pipeline" in name
        if missing or (inspect.isclass(kind) and issubclass(kind, diffusers.DiffusionPipeline)):
            found.add(name)
    # Another test may have registered ours
    return {name for name in found - {"DiffusionPipeline"} if not name.startswith("LatentFlow")}


@pytest.mark.skipif(
    not diffusers.__version__.startswith("0.42."), reason="the list is of the pipelines of diffusers 0.42"
)
def test_every_pipeline_of_diffusers_opens_or_has_a_reason() -> None:
    ours = {name for name in FAMILIES if not name.startswith("LatentFlow")}
    assert ours | SIBLINGS.keys() | LEFT_OUT.keys() == pipelines()
    assert not LEFT_OUT.keys() & (ours | SIBLINGS.keys()) and not SIBLINGS.keys() & ours
    assert set(SIBLINGS.values()) <= ours
    for name, reason in LEFT_OUT.items():
        assert reason.startswith(("It ", "Its ")) and reason.endswith(".") and ":" in reason, name


def test_every_family_is_tested() -> None:
    ours = {name for name in FAMILIES if not name.startswith("LatentFlow")}
    tiny = (*TINY, *CONSISTENCY, *WITH_EXTRA_CHANNELS, *WITH_REFERENCES)
    assert {name.partition("-")[0] for name in tiny} - SIBLINGS.keys() == ours


def test_the_guide_has_the_table_of_the_families() -> None:
    guide = Path(__file__).parents[2] / "docs/guide/pretrained.md"
    made = "\n".join(table())
    assert made in guide.read_text(encoding="utf-8"), "run python -m latentflow.families.table"
    listed = re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in made.splitlines()[2:]))
    assert sorted(listed) == sorted(name for name in FAMILIES if not name.startswith("LatentFlow"))


def index(folder: Path, kind: Any) -> Path:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    return folder


@pytest.mark.parametrize(
    "kind", ["WanPipeline", "StableDiffusionDepth2ImgPipeline", "StableDiffusionXLControlNetPipeline"]
)
def test_what_is_left_out_says_why(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        FlowModel.from_pretrained(index(tmp_path, kind))
    assert f"is a {kind}\n{LEFT_OUT[kind]}" in str(refused.value)


@pytest.mark.parametrize("kind", ["NewPipeline", None, ["a", "list"]])
def test_an_unknown_class_is_named(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one class and one line") as refused:
        FlowModel.from_pretrained(index(tmp_path, kind))
    assert f"is a {kind}, " in str(refused.value)


def test_another_package_adds_a_family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its code is imported where its pipeline is asked for, and not before."""
    package = tmp_path / "their_family.py"
    package.write_text(
        "from latentflow.families.flux import FluxModel\nclass TheirModel(FluxModel):\n    pass\n"
    )
    broken = EntryPoint("BrokenPipeline", "no_such_module:Model", GROUP)
    points = EntryPoints([broken, EntryPoint("TheirPipeline", "their_family:TheirModel", GROUP)])
    monkeypatch.setattr(latentflow.families, "entry_points", lambda **query: points.select(**query))
    monkeypatch.syspath_prepend(tmp_path)
    assert family_of("FluxPipeline") is FAMILIES["FluxPipeline"] and family_of("NewPipeline") is None
    assert "their_family" not in sys.modules
    family = family_of("TheirPipeline")
    assert (
        family is not None
        and family.__name__ == "TheirModel"
        and issubclass(family, FAMILIES["FluxPipeline"])
    )


@pytest.mark.parametrize("name", sorted(SIBLINGS))
def test_a_sibling_is_its_family(name: str) -> None:
    """An image-to-image or inpainting pipeline has the components of the text-to-image one, and its settings."""
    stock = checkpoint(SIBLINGS[name])
    kind = getattr(diffusers, name)
    taken = inspect.signature(kind).parameters
    sibling = kind(
        **{part: value for part, value in {**stock.config, **stock.components}.items() if part in taken}
    )
    found = family_of(name)
    assert found is FAMILIES[SIBLINGS[name]]
    made = text_to_image(sibling)
    assert type(made) is type(stock)
    assert all(part is stock.components[name] for name, part in made.components.items())
    assert text_to_image(made) is made


def test_a_sibling_s_folder_opens(tmp_path: Path) -> None:
    stock = checkpoint("StableDiffusionPipeline")
    diffusers.StableDiffusionImg2ImgPipeline(**stock.components).save_pretrained(tmp_path)
    model = FlowModel.from_pretrained(tmp_path)
    assert type(model) is FAMILIES["StableDiffusionPipeline"]
    assert type(model.pipeline) is diffusers.StableDiffusionPipeline
    weights = model.network.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in stock.unet.state_dict().items())
    alone = model.network_alone()
    assert alone.network is model.network and alone.vae is None


def test_a_latent_consistency_model_is_refused() -> None:
    stock = checkpoint("StableDiffusionPipeline")
    config = {name: value for name, value in stock.unet.config.items() if not name.startswith("_")}
    unet = diffusers.UNet2DConditionModel(**{**config, "time_cond_proj_dim": 8})
    with pytest.raises(UserError, match=r"latent consistency model\n(.|\n)*LatentConsistencyModelPipeline"):
        FAMILIES["StableDiffusionPipeline"](type(stock)(**{**stock.components, "unet": unet}))


def test_the_package_that_kolors_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"Kolors needs sentencepiece.*not installed\n *pip install"):
        FlowModel.from_pretrained(index(tmp_path, "KolorsPipeline"))


def test_the_program_names_an_unknown_class(load_program: Callable[[str], Any], tmp_path: Path) -> None:
    line = ["red apple", "--checkpoint", str(index(tmp_path, "NewPipeline")), "-o", str(tmp_path / "out.png")]
    with pytest.raises(UserError, match=r"is a NewPipeline, (.|\n)*one class and one line"):
        load_program("generate").main(line)


def test_the_refiner_of_sdxl_is_refused() -> None:
    stock = checkpoint("StableDiffusionXLPipeline")
    kind = diffusers.StableDiffusionXLImg2ImgPipeline
    with pytest.raises(UserError, match="refiner"):
        FAMILIES["StableDiffusionXLPipeline"](kind(**stock.components, requires_aesthetics_score=True))
