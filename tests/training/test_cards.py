"""Headers of model cards, as the Hugging Face hub reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, constants, metadata_load

from latentflow.cli import parse
from latentflow.config import RunConfig
from latentflow.errors import UserError
from latentflow.families.few_steps import FewSteps
from latentflow.training.report.card import CardFacts, write_card
from latentflow.training.report.origins import checkpoint_origin, data_origins
from latentflow.utils.libraries import DISTRIBUTION

from .command import ROOT

ADAPTER = "pytorch_lora_weights.safetensors"

# The tasks that the hub documents for models that make or change images (huggingface.co/tasks).
PIPELINE_TAGS = {
    "text-to-image", "image-to-image", "unconditional-image-generation", "image-text-to-image", "image-to-video",
    "image-segmentation", "mask-generation", "depth-estimation", "text-to-3d", "image-to-3d",
}  # fmt: skip
# Libraries for which the hub shows a snippet that opens other files than ours.
LIBRARIES = {
    "diffusers", "diffusion-single-file", "peft", "transformers", "adapter-transformers", "keras", "timm", "open_clip",
    "pytorch", "safetensors", "stable-baselines3", "fastai", "sentence-transformers", "mlx", "diffusionkit",
}  # fmt: skip
# Of the identifiers that the hub documents (docs/hub/repositories-licenses), those that a card here has.
LICENSES = {"apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "openrail++", "other"}
RELATIONS = {"finetune", "adapter", "merge", "quantized"}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def header_of(text: str) -> dict[str, Any]:
    """Read a card by the hub's own library; check what the hub documents of its header."""
    card = ModelCard(text, ignore_metadata_errors=False)
    header: dict[str, Any] = card.data.to_dict()
    assert ModelCard(str(card), ignore_metadata_errors=False).data.to_dict() == header
    assert header["pipeline_tag"] in PIPELINE_TAGS
    assert header["library_name"] == DISTRIBUTION not in LIBRARIES
    assert not LIBRARIES & {*header["tags"]}  # a tag of this name would make it the library
    assert "latentflow" in header["tags"]
    assert header.get("license", "other") in LICENSES
    assert ("license_name" in header) == ("license_link" in header) == (header.get("license") == "other")
    assert header.get("base_model_relation", "finetune") in RELATIONS
    assert ("base_model" in header) == ("base_model_relation" in header)
    for hub_id in [*header.get("datasets", []), *([header["base_model"]] if "base_model" in header else [])]:
        assert HUB_ID.fullmatch(hub_id)
    return header


# ---------------------------------------------------------------- headers


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library's cache, with a checkpoint and a data set that were fetched from the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cards = {
        "models--owner--cats": ("model_index.json", "license: openrail++"),
        "datasets--owner--photos": ("README.md", "license: other\nlicense_name: photos-1.0"),
        "datasets--owner--plain": ("README.md", "tags: [photos]"),
    }
    for name, (file, header) in cards.items():
        snapshot = tmp_path / "hub" / name / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot / file).write_text("{}")
        (snapshot / "README.md").write_text(f"---\n{header}\n---\n")
        (tmp_path / "hub" / name / "refs").mkdir()
        (tmp_path / "hub" / name / "refs" / "main").write_text("abc")
    return tmp_path


def card_of(folder: Path, kind: str = "text", few_steps: FewSteps | None = None, **config: Any) -> str:
    """Write the card of a run of 8 steps with these settings."""
    run = folder / "my run"
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"network": "dit", "max_train_steps": 8, **config}))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 8, "loss": 1.0}))
    facts = CardFacts(
        where="owner/mine", kind=kind, parts={}, classes=("a", "b"), few_steps=few_steps or FewSteps()
    )
    write_card(folder, run, facts)
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("kind", ["text", "class", "unconditional"])
def test_what_is_unknown_is_left_out(kind: str, fetched: Path) -> None:
    header = header_of(card_of(fetched, kind, data="photos"))
    tag = "text-to-image" if kind == "text" else "unconditional-image-generation"
    assert header == {
        "library_name": DISTRIBUTION,
        "pipeline_tag": tag,
        "tags": ["latentflow", "flow-matching"],
    }


def test_ids_are_given_of_what_came_from_the_hub(fetched: Path) -> None:
    card = card_of(fetched, data="hub:owner/photos:test", init_from="owner/cats")
    header = header_of(card)
    assert header["base_model"] == "owner/cats" and header["base_model_relation"] == "finetune"
    assert header["datasets"] == ["owner/photos"]
    link = "[owner/cats](https://huggingface.co/owner/cats)"
    assert f"Fine-tuned from {link} (licence: openrail++, as its card states)." in card
    assert "- owner/photos: licence photos-1.0, as its card states" in card


@pytest.mark.parametrize("place", ["runs/cats", "runs/cats/pipeline", "{}/runs/cats", "~/runs/cats"])
@pytest.mark.parametrize("there", [True, False])
def test_a_folder_is_no_id_of_the_hub(
    place: str, there: bool, fetched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(fetched)
    monkeypatch.setenv("HOME", str(fetched))
    if there:
        (fetched / "runs" / "cats" / "pipeline").mkdir(parents=True)
        (fetched / "runs" / "cats" / "pipeline" / "model_index.json").write_text("{}")
    place = place.format(fetched)
    card = card_of(fetched, data="runs/photos", init_from=place)
    assert not {"base_model", "datasets"} & header_of(card).keys()
    assert "Fine-tuned from cats, a local checkpoint." in card and "| init_from | cats |" in card
    assert str(fetched) not in card and "runs/cats" not in card and "~" not in card


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("hats/adapter/" + ADAPTER, "hats"),
        ("hats/" + ADAPTER, "hats"),
        ("loras/straw hats.safetensors", "straw hats"),
    ],
)
def test_an_adapter_s_file_has_the_name_of_its_run_or_its_own(file: str, name: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    assert checkpoint_origin(str(tmp_path / file)).name == name
    if (tmp_path / file).name == ADAPTER:
        assert checkpoint_origin(str((tmp_path / file).parent)).name == name


def test_a_shipped_base_is_named_with_its_licence(fetched: Path) -> None:
    settings = {"data": "photos", "network_preset": "small"}
    card = card_of(fetched, init_from="checkpoints/emoji-64", lora_rank=4, **settings)
    assert "base_model" not in header_of(card)
    assert (
        "Fine-tuned from emoji-64, which comes with latentflow (licence: apache-2.0, as its card states), by"
        in card
    )
    assert "an adapter of rank 4 that is merged into these weights." in card
    assert checkpoint_origin("emoji-64").place == "checkpoints/emoji-64"
    assert "| network" not in card  # it is the checkpoint's, whatever the settings of new ones are
    assert "| network_preset | small |" in card_of(fetched, **settings)


def test_a_student_says_from_whom_and_for_how_many_steps(fetched: Path) -> None:
    few = FewSteps(average=True, folded_guidance=4.0, step_counts=(1, 2, 4))
    card = card_of(fetched, few_steps=few, checkpoint="owner/cats", method="shortcut", data="photos")
    assert "few-step" in header_of(card)["tags"]
    assert "Distilled from [owner/cats](" in card
    assert "Made for 1 or 2 or 4 evaluations of the network, with a guidance of 4 learned in." in card


@pytest.mark.parametrize(
    ("given", "header"),
    [
        ("cc-by-4.0", {"license": "cc-by-4.0"}),
        (
            "mine-1.0=https://example.org/a=b",
            {"license": "other", "license_name": "mine-1.0", "license_link": "https://example.org/a=b"},
        ),
    ],
)
def test_the_licence_that_the_author_gives(given: str, header: dict[str, str], fetched: Path) -> None:
    config = parse(RunConfig, ["photos", "-o", "run", "--license", given], prog="x")
    card = card_of(fetched, data="photos", license=config.license)
    assert header.items() <= header_of(card).items()
    assert "# license:" not in card and "# license:" in card_of(fetched, data="photos")


@pytest.mark.parametrize("given", ["Apache 2.0", "Apache-2.0", "", "my own", "x=http:", "other"])
def test_a_licence_that_the_hub_would_refuse(given: str) -> None:
    with pytest.raises(
        UserError, match=r"--license .* does not name a licence as the hub does\n.*apache-2.0"
    ):
        parse(RunConfig, ["photos", "-o", "run", "--license", given], prog="x")


def test_sets_of_the_hub_in_a_mix(fetched: Path) -> None:
    sources = [
        {"data": data} for data in ("hub:owner/photos", "mine", "hub:owner/plain:train", "hub:owner/gone")
    ]
    (fetched / "mix.yaml").write_text(yaml.safe_dump({"sources": sources}))
    found = data_origins(str(fetched / "mix.yaml"))
    ids = ["owner/photos", "owner/plain", "owner/gone"]
    assert [(one.hub_id, one.license) for one in found] == list(zip(ids, ["photos-1.0", "", ""], strict=True))
    (fetched / "mix.yaml").write_text("a: [")
    assert data_origins(str(fetched / "mix.yaml")) == data_origins("gone.yaml") == []


@pytest.mark.parametrize("name", ["emoji-64", "emoji-64/fast", "pictograms-128", "pictograms-128/fast"])
def test_the_shipped_cards(name: str) -> None:
    file = ROOT / "checkpoints" / name / "README.md"
    text = file.read_text(encoding="utf-8")
    header = header_of(text)
    assert metadata_load(file) == yaml.safe_load(text.split("---\n")[1]) == header
    assert header["license"] == ("apache-2.0" if name.startswith("emoji") else "cc-by-4.0")
    assert ("lora" in header["tags"]) == name.endswith("fast")
