"""Facts of a checkpoint, and the adapters that the page offers, from files alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentflow.errors import UserError
from latentflow.inference.opening import SHIPPED
from latentflow.web.checkpoint_facts import Card, checkpoint_name, offered_adapters, read_card

FILE = "pytorch_lora_weights.safetensors"


def test_the_name_is_that_of_the_folder_or_run(tmp_path: Path) -> None:
    (tmp_path / "cats" / "pipeline").mkdir(parents=True)
    assert checkpoint_name(str(tmp_path / "cats")) == "cats"
    assert checkpoint_name(str(tmp_path / "cats" / "pipeline")) == "cats"
    assert checkpoint_name("owner/name") == "owner/name"


def test_the_shipped_card_says_what_it_was_trained_on() -> None:
    card = read_card(SHIPPED)
    assert card.data.startswith(
        "6,231 images of Fluent Emoji, 3D (3,206) and flat (3,025) (Microsoft, MIT), 128 px on white"
    )
    assert card.prompts[0] == "3d style: red apple" and len(card.prompts) > 3


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("", Card()),
        ("# A model\n\nGenerates images.", Card()),
        (
            "---\nlicense: mit\n---\n\n```bash\nlatentflow generate 'a red cat' --checkpoint runs/cats -o a.png\n```\n"
            "## Data\n\n- data: captions from metadata.jsonl\n"
            "- data: 10 images to train on, 2 held out; condition: text\n\n## Training\n\n9 steps\n",
            Card("10 images to train on, 2 held out", ("a red cat",)),
        ),
        ("---\nwidget: [{text: cat}, {text: 3}, dog]\n---\n", Card(prompts=("cat",))),
        ("---\nwidget: cat\n---\n", Card()),
        (
            "---\n- [\n---\n## Training data\n\nOf [5 cats](http://x.example) and `dogs`\\_1.",
            Card("Of 5 cats and dogs_1"),
        ),
        ("latentflow generate 'open\n", Card()),
    ],
)
def test_a_card_is_prose_of_which_some_is_understood(text: str, card: Card, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_card(tmp_path) == card


def test_a_card_that_is_missing_or_no_text_says_nothing(tmp_path: Path) -> None:
    assert read_card(tmp_path) == Card()
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    assert read_card(tmp_path) == Card()


def test_a_long_sentence_is_cut_between_words(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"## Data\n\n1 {'word ' * 100}")
    data = read_card(tmp_path).data
    assert data.endswith(" word ...") and len(data) < 230


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_adapters_are_those_that_were_named_or_lie_in_the_checkpoint(tmp_path: Path) -> None:
    runs, base = tmp_path / "runs", tmp_path / "base"
    touch(base / "fast" / FILE, base / "glow" / FILE, base / "transformer" / "weights.safetensors")
    touch(
        runs / "hats" / "adapter" / FILE,
        runs / "boots" / FILE,
        runs / "coats" / "adapter_model.safetensors",  # as peft names it
        runs / "loose.safetensors",
        runs / "notes.txt",
    )
    touch(tmp_path / "elsewhere" / "hats" / FILE)
    assert [*offered_adapters(base)] == ["glow"]
    assert offered_adapters(None) == {}
    offered = offered_adapters(base, [f"{runs}/hats=0.8", f"{tmp_path}/elsewhere/hats"], str(runs))
    assert {name: (adapter.weight, adapter.chosen) for name, adapter in offered.items()} == {
        "hats": (0.8, True),
        "hats (2)": (1.0, True),
        "boots": (1.0, False),
        "coats": (1.0, False),
        "loose": (1.0, False),
        "glow": (1.0, False),
    }


@pytest.mark.parametrize(
    ("named", "folder", "message"),
    [
        (["nowhere/at/all"], None, "no such folder"),
        (["a:3"], None, "the weight is 3"),
        ([], "empty", "no adapter is in it"),
        ([], "nowhere", "no adapter is in it"),
    ],
)
def test_adapters_that_cannot_be_offered(named, folder, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch(Path("a", FILE), Path("empty", "notes.txt"))
    with pytest.raises(UserError, match=message):
        offered_adapters(None, named, folder)
