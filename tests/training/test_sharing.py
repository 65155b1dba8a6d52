"""What is given away: adapters and exports with their cards, and what is uploaded to the Hugging Face hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from diffusers.pipelines import pipeline_utils
from diffusers.utils import hub_utils
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError

from latentflow import LatentFlowPipeline
from latentflow.errors import RunError, UserError
from latentflow.training.report import hub
from latentflow.training.report.export import is_generated, signed
from latentflow.utils.libraries import DISTRIBUTION

from .command import ROOT, TINY, call, paste
from .test_cards import ADAPTER, header_of

# ---------------------------------------------------------------- an adapter's card, and those of exports


@pytest.fixture(scope="module")
def runs(images: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs: of a base, and of an adapter for it, on captions with a new word."""
    pytest.importorskip("peft", reason='needs peft: pip install -e ".[lora]"')
    folder = tmp_path_factory.mktemp("anna") / "runs"
    line = [*TINY, "--validation-steps", 0, "--preview-steps", 2, "--max-train-steps", 2]
    call(cache, images, "-o", folder / "base", *line)
    hats = folder.parent / "hats"
    shutil.copytree(images, hats)
    rows = [json.loads(row) for row in (hats / "metadata.jsonl").read_text().splitlines()]
    (hats / "metadata.jsonl").write_text("\n".join(json.dumps(row | {"text": "a wug hat"}) for row in rows))
    lora = ["--lora-rank", 4, "--lora-alpha", 8, "--init-from", folder / "base", "--license", "cc-by-4.0"]
    call(cache, hats, "-o", folder / "hats", *line, *lora)
    return folder


def test_an_adapter_s_card_says_what_it_is_and_how_to_load_it(
    runs: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs / "hats" / "adapter"
    card = (folder / "README.md").read_text()
    assert is_generated(card) and (folder / "sample.png").is_file()
    header = header_of(card)
    assert header["tags"] == ["latentflow", "flow-matching", "lora"] and header["license"] == "cc-by-4.0"
    for text in (
        "# hats", "An adapter (LoRA of rank 4, alpha 8) for a checkpoint of latentflow,\nwhich then generates",
        "Made for base, a local checkpoint.", "New words: w, hat, wug.", "| lora_rank | 4 |",
        "| `transformer` | 7 | 0.00 M |",
        'with `pip install -e . "peft>=', "2 steps of 4 samples", "- data: ",
    ):  # fmt: skip
        assert text in card, text
    monkeypatch.chdir(tmp_path)  # a reader's folder, with the base in it
    shutil.copytree(runs / "base" / "pipeline", tmp_path / "base")
    exec(compile(card.split("```python\n")[1].split("```")[0], "card", "exec"), {})
    made = (tmp_path / "image.png").read_bytes()
    paste(cache, card.split("```bash\n")[1].splitlines()[0], "--steps", 1)
    assert made and sorted(file.name for file in tmp_path.glob("image*.png")) == ["image-1.png", "image.png"]
    merged = (runs / "hats" / "pipeline" / "README.md").read_text()
    assert "by an adapter of rank 4 that is merged into these weights." in merged
    assert "lora" not in header_of(merged)["tags"]


def test_an_adapter_s_card_that_the_user_has_edited_stays(runs: Path, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(runs.parent, tmp_path / "anna")
    run = tmp_path / "anna" / "runs" / "hats"
    (run / "adapter" / "README.md").write_text("My own words.\n")
    (run / "adapter" / "notes.txt").write_text("mine")
    for mark in run.rglob("exported"):
        mark.unlink()
    settings = yaml.safe_load((run / "config.yaml").read_text())
    lora = [
        "--lora-rank",
        4,
        "--lora-alpha",
        8,
        "--init-from",
        settings["init_from"],
        "--license",
        "cc-by-4.0",
    ]
    line = [*TINY, "--validation-steps", 0, "--preview-steps", 2, "--max-train-steps", 2]
    call(cache, settings["data"], "-o", run, *line, *lora)
    assert (run / "adapter" / "README.md").read_text() == "My own words.\n"
    assert (run / "adapter" / "notes.txt").read_text() == "mine"
    assert is_generated((run / "adapter" / "README-step-000002.md").read_text())


def test_cards_of_exports(runs: Path, cache: Path, tmp_path: Path) -> None:
    def export(*line: object) -> tuple[str, dict[str, Any]]:
        call(cache, *line, "-o", tmp_path / "out", file="../pipelines/export")
        card = (tmp_path / "out" / "README.md").read_text()
        shutil.rmtree(tmp_path / "out")
        assert is_generated(card)
        return card, header_of(card)

    place = json.dumps(str(tmp_path / "out"))
    card, _ = export(runs / "hats", "--adapter")
    assert f"load_lora_weights({place})" in card and f"--lora {tmp_path / 'out'} " in card
    old = shutil.copytree(runs / "hats", tmp_path / "hats")  # a run of before its adapter had a card
    (old / "adapter" / "README.md").unlink()
    card, header = export(old, "--adapter")
    assert f"load_lora_weights({place})" in card and "# out" in card and "lora" in header["tags"]
    card, header = export(runs / "base", "--lora", f"{runs / 'hats'}:0.5")
    assert (
        "Made from base, a local checkpoint, with adapters merged into its weights: hats (weight 0.5; licence: "
        "cc-by-4.0, as its card states)." in card
    )
    assert f"from_pretrained({place})" in card and "base_model" not in header and "## Training" not in card
    (runs / "base" / "pipeline" / "README.md").rename(tmp_path / "card")
    card, _ = export(runs / "base", "--export-dtype", "float16")
    (tmp_path / "card").rename(runs / "base" / "pipeline" / "README.md")
    assert "A copy of base, a local checkpoint." in card and "16 x 16 pixels from captions" in card


# ---------------------------------------------------------------- pushing


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """The hub's interface, of a repository that does not exist."""
    api = Mock(**{"repo_exists.return_value": False, "file_exists.return_value": False})
    monkeypatch.setattr(hub.huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(hub.huggingface_hub, "get_token", lambda: "token")
    return api


def uploaded(api: Mock) -> dict[str, bytes]:
    """What the last commit to the hub held."""
    operations = api.create_commit.call_args.kwargs["operations"]
    assert api.create_commit.call_args.args == ("owner/cats",)
    return {
        one.path_in_repo: one.path_or_fileobj
        if isinstance(one.path_or_fileobj, bytes)
        else Path(one.path_or_fileobj).read_bytes()
        for one in operations
    }


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A folder that looks like a pipeline."""
    folder = tmp_path / "my cats"
    (folder / "vae").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "LatentFlowPipeline"}')
    (folder / "vae" / "config.json").write_text('{"_name_or_path": "/home/anna/vae", "width": 8}')
    return folder


@pytest.mark.parametrize("part", ["hats", "hats/adapter", "base"])
def test_a_run_s_result_or_adapter_is_pushed_and_nothing_of_the_author_s_disk(
    part: str, runs: Path, cache: Path, api: Mock
) -> None:
    said = call(cache, runs / part, "owner/cats", file="../pipelines/push")
    api.create_repo.assert_called_once_with("owner/cats", private=True, exist_ok=True)
    files = uploaded(api)
    assert (ADAPTER in files) == part.endswith("adapter") != ("model_index.json" in files)
    assert {"README.md", "sample.png"} <= files.keys()
    for private in (str(runs), runs.parent.name, runs.parents[1].name, r'_name_or_path[\\]*": [^n]'):
        assert not [name for name, content in files.items() if re.search(private.encode(), content)], private
    card = files["README.md"].decode()
    method = "load_lora_weights" if part.endswith("adapter") else "from_pretrained"
    assert f'{method}("owner/cats")' in card and is_generated(card)
    header_of(card)
    assert f"owner/cats: {len(files)} files, " in said and "https://huggingface.co/owner/cats" in said
    assert "owner/cats is new, and private" in said


def test_a_run_that_pushes_its_result_at_its_end(
    images: Path, cache: Path, tmp_path: Path, api: Mock
) -> None:
    line = [
        "-o",
        tmp_path / "cats",
        *TINY,
        "--validation-steps",
        0,
        "--preview-steps",
        0,
        "--max-train-steps",
        1,
    ]
    said = call(cache, images, *line, "--push-to-hub", "owner/cats")
    assert re.search(r"pushed: https://huggingface.co/owner/cats\n  owner/cats is new, and private", said)
    assert 'from_pretrained("owner/cats")' in uploaded(api)["README.md"].decode()


@pytest.mark.parametrize("by", ["push_to_hub", "save_pretrained"])
def test_diffusers_own_push_makes_a_card_with_our_library(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, str]] = []

    def upload(folder_path: str, **options: Any) -> None:
        texts = [file for file in Path(folder_path).rglob("*") if file.suffix in (".md", ".json")]
        sent.append({file.name: file.read_text() for file in texts})

    for module in (hub_utils, pipeline_utils):
        monkeypatch.setattr(module, "create_repo", lambda *_, **__: Mock(repo_id="owner/cats"), raising=False)
    monkeypatch.setattr(hub_utils, "upload_folder", upload)
    none = Mock(side_effect=EntryNotFoundError("no card"))
    monkeypatch.setattr(hub_utils, "ModelCard", Mock(wraps=ModelCard, load=none))
    pipe = LatentFlowPipeline.from_pretrained(ROOT / "checkpoints" / "emoji-64")
    if by == "push_to_hub":
        pipe.push_to_hub("owner/cats")
    else:
        pipe.save_pretrained(str(tmp_path / "cats"), push_to_hub=True, repo_id="owner/cats")
    (files,) = sent
    assert ModelCard(files["README.md"]).data.library_name == DISTRIBUTION
    assert not [name for name, text in files.items() if "_name_or_path" in text]


def test_a_dry_run_lists_the_files_and_sends_nothing(
    runs: Path, cache: Path, api: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub.huggingface_hub, "get_token", lambda: None)  # which needs no token
    folder = runs / "hats" / "adapter"
    said = call(cache, folder, "owner/cats", "--dry-run", file="../pipelines/push")
    assert said.splitlines()[0].startswith("owner/cats: 3 files, 0.") and said.splitlines()[0].endswith(
        str(folder)
    )
    assert [line.split()[0] for line in said.splitlines()[1:]] == ["README.md", ADAPTER, "sample.png"]
    assert not api.mock_calls


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "there is no folder"),
        (lambda folder: folder.mkdir(), r"(?s)holds neither a pipeline .* nor an adapter .*RUN/pipeline"),
        (lambda folder: folder.write_text(""), r"(?s)holds neither a pipeline .* nor an adapter"),
    ],
)
def test_any_other_place_is_refused(
    make: Callable[[Path], Any], message: str, tmp_path: Path, cache: Path, api: Mock
) -> None:
    make(tmp_path / "x")
    said = call(cache, tmp_path / "x", "owner/cats", file="../pipelines/push", expect=2)
    assert re.search(message, said) and not api.mock_calls


def test_hidden_files_and_drafts_stay_at_home(pipeline: Path, api: Mock) -> None:
    for name in (".env", ".cache/x.json", "vae/.DS_Store", "README-step-000002.md", "sample-step-000002.png"):
        (pipeline / name).parent.mkdir(exist_ok=True)
        (pipeline / name).write_text("private")
    (pipeline / "LICENSE").write_text("mine")
    hub.push(pipeline, "owner/cats")
    assert uploaded(api).keys() == {"LICENSE", "model_index.json", "vae/config.json"}
    assert json.loads(uploaded(api)["vae/config.json"]) == {"width": 8}
    assert (
        hub.content_lines(pipeline, "owner/cats")[-1] == "There is no README.md: the hub will show no card."
    )


def test_the_user_s_own_card_loads_from_the_repository_as_well(pipeline: Path, api: Mock) -> None:
    own = f"Mine: from_pretrained(\"{pipeline}\")\nlatentflow generate --checkpoint '{pipeline}' -o x\n"
    for text, wanted in (
        (own, own.replace(f"'{pipeline}'", "owner/cats").replace(str(pipeline), "owner/cats")),
        ('Another: from_pretrained("runs/dogs")\n', 'Another: from_pretrained("runs/dogs")\n'),
        ('Odd: from_pretrained("a" + "b")\n', 'Odd: from_pretrained("a" + "b")\n'),
    ):
        (pipeline / "README.md").write_text(text)
        hub.push(pipeline, "owner/cats")
        assert uploaded(api)["README.md"].decode() == wanted
        assert (pipeline / "README.md").read_text() == text


def test_the_card_of_an_older_run_names_our_library_unless_it_was_edited(pipeline: Path, api: Mock) -> None:
    card = "---\nlibrary_name: diffusers\n---\n"
    for written, library in ((signed(card), DISTRIBUTION), (card, "diffusers")):
        (pipeline / "README.md").write_text(written)
        sent = hub.contents(pipeline, "me/emoji")["README.md"]
        assert isinstance(sent, bytes) and f"library_name: {library}\n" in sent.decode()


def test_a_card_on_the_hub_that_was_edited_stays_and_is_named(
    pipeline: Path, tmp_path: Path, api: Mock
) -> None:
    (pipeline / "README.md").write_text(signed("new"))
    api.repo_exists.return_value = api.file_exists.return_value = True
    api.hf_hub_download.return_value = str(tmp_path / "card")
    for card, kept in (("mine", True), (signed("ours"), False)):
        (tmp_path / "card").write_text(card)
        address, lines = hub.push(pipeline, "owner/cats")
        assert address == "https://huggingface.co/owner/cats" and len(uploaded(api)) == 3 - kept
        assert lines == ["README.md of owner/cats was written or changed by hand, and stays as it is."] * kept
    assert not api.create_repo.called


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), ConnectionError(), RuntimeError("of a library")]
)
def test_a_push_that_fails_says_how_to_try_again(error: Exception, pipeline: Path, api: Mock) -> None:
    api.create_commit.side_effect = error
    message = rf"(?s){error or 'ConnectionError'}.*latentflow push '.*my cats' owner/cats"
    with pytest.raises(UserError, match=message):
        hub.push(pipeline, "owner/cats")


def test_a_hub_that_cannot_be_reached_is_no_defect(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library, whose errors of the network are no OSError."""
    real = hub.huggingface_hub.HfApi
    monkeypatch.setattr(hub.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.huggingface_hub, "HfApi", lambda: real(endpoint="http://127.0.0.1:9"))
    monkeypatch.setattr(hub.huggingface_hub, "get_token", lambda: "token")
    with pytest.raises(RunError, match="was not pushed"):
        hub.push(pipeline, "owner/cats")


def test_what_cannot_be_pushed_is_known_before_the_run(api: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.check_push("owner/cats")
    for name in ("cats", "a/b/c", "owner/ca ts"):
        with pytest.raises(UserError, match="owner/name"):
            hub.check_push(name)
    monkeypatch.setattr(hub.huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="HF_TOKEN"):
        hub.check_push("owner/cats")
    assert not api.mock_calls
