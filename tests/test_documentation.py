"""Holds the documentation to the code: links, code, commands and flags, and the map of every table's entries."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

from latentflow import LatentFlowPipeline, cli, flow
from latentflow.autoencoder import build_autoencoder
from latentflow.config import AutoencoderConfig
from latentflow.data.masks import MASK_SHAPES, OWN
from latentflow.flow import discrete
from latentflow.metrics.features import FEATURES
from latentflow.training.distill import METHODS
from latentflow.training.losses.alignment import ALIGNMENTS
from latentflow.utils.flags import flags_of

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("checkpoints/**/README.md")])
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)#\s]+)(?:#[^)]*)?\)")
TABLES = "COUPLINGS PATHS PREDICTIONS TIME_DENSITIES TIME_GRIDS WEIGHTINGS SOLVERS DIFFUSIONS"
DISCRETE_TABLES = "PATHS KAPPAS SOURCES SAMPLERS CORRECTORS OBJECTIVES WEIGHTINGS"


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_hold_what_they_name(page) -> None:
    for text, target in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"https?:|mailto:", target):
            continue
        file = page.parent / target
        assert file.exists(), f"{page.name}: {target}"
        if file.suffix == ".py":
            for name in re.findall(r"`(\w+)[`(]", text):
                defined = rf"\b(def|class) {name}\b|^{name}\b"
                assert re.search(defined, file.read_text(), re.MULTILINE), (text, target)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_pages_lead_to_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s:]*#[^)\s]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        assert anchor in anchors(there), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """Names of a page's headings in links, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_image_and_page_of_the_documentation_is_linked_to() -> None:
    linked = {
        (page.parent / target).resolve()
        for page in PAGES
        for _, target in LINK.findall(page.read_text(encoding="utf-8"))
    }
    files = {*ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/**/*.png")}
    assert files <= linked, sorted(map(str, files - linked))


# --- commands ----------------------------------------------------------------------------------------------

# The changelog also names what has gone since.
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]
# Flags that the command line itself takes, before those of a program's settings.
COMMON = {"--help", "--help-all", "--debug", "--config"}
# Ways to start a program of `train/` or `pipelines/` other than `latentflow <command>`.
FILE = re.compile(r"(?:train|pipelines)/(\w+)\.py")


@cache
def settings_of_command(command: str) -> tuple[type, bool]:
    """The settings class with which a command's program calls the parser, and whether it has presets."""
    file = cli.programs()[command]
    spec = importlib.util.spec_from_file_location(f"documented_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the types of its config are looked up
    spec.loader.exec_module(module)

    class CapturedError(Exception):
        pass

    def capture(config_class: type, *_: Any, presets: Any = None, **__: Any) -> None:
        raise CapturedError(config_class, bool(presets))

    module.parse = capture  # type: ignore[attr-defined]
    with pytest.raises(CapturedError) as caught:
        module.main([])
    config_class, has_presets = caught.value.args
    return config_class, has_presets


@cache
def flags_of_command(command: str) -> frozenset[str]:
    """The flags of a command."""
    config_class, has_presets = settings_of_command(command)
    names = {name for flag in flags_of(config_class) for value in (False, True) for name in flag.names(value)}
    return frozenset(names | COMMON | ({"--preset"} if has_presets else set()))


#: flag, or command and flag -> the table that its values are of, and further ones
TABLES_OF_FLAGS: dict[str, list[str]] = {
    "path": [*flow.PATHS],
    "prediction": [*flow.PREDICTIONS, "codes"],
    "coupling": [*flow.COUPLINGS],
    "weighting": [*flow.WEIGHTINGS],
    "time-density": [*flow.TIME_DENSITIES],
    "mask-shapes": [*MASK_SHAPES, OWN],
    "alignment": [*ALIGNMENTS],
    "kappa": [*discrete.KAPPAS],
    "token-objective": [*discrete.OBJECTIVES],
    "token-weighting": [*discrete.WEIGHTINGS],
    "solver": [*flow.SOLVERS, *discrete.SAMPLERS, "tuned", "scheduler"],
    "features": [*FEATURES],
    "distill method": [*METHODS],
    "inpaint method": [*flow.INPAINTING, "trained"],
}


@cache
def choices_of_command(command: str) -> dict[str, tuple[list[str], str]]:
    """Flag -> its values, where they are of a table or of a Literal, and its help."""
    found = {}
    for flag in flags_of(settings_of_command(command)[0]):
        name = flag.key.replace("_", "-")
        table = TABLES_OF_FLAGS.get(f"{command} {name}", TABLES_OF_FLAGS.get(name, []))
        if values := literals(flag.hint) or table:
            found[f"--{name}"] = values, flag.help
    return found


def literals(hint: Any) -> list[str]:
    """The values of the Literals in a type."""
    if get_origin(hint) is Literal:
        return [*get_args(hint)]
    return [value for part in get_args(hint) for value in literals(part)]


def test_the_help_of_a_flag_names_all_of_its_values() -> None:
    """Or it names the command whose help does."""
    for command in cli.programs():
        for flag, (values, text) in choices_of_command(command).items():
            of_a_table = flag[2:] in TABLES_OF_FLAGS or f"{command} {flag[2:]}" in TABLES_OF_FLAGS
            if of_a_table and "`latentflow " not in text:
                missing = [
                    name for name in values if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)
                ]
                assert not missing, (command, flag)


def test_the_page_of_flags_has_every_command_and_group() -> None:
    text = (ROOT / "docs" / "reference" / "flags.md").read_text(encoding="utf-8")
    assert {*re.findall(r"^\| `([a-z-]+) [A-Z`]", text, re.MULTILINE)} >= {*cli.programs()} - {"app"}
    groups = {flag.section.name for flag in flags_of(settings_of_command("train")[0])} - {""}
    listed = re.search(r"one group: ([^.]*)\.", text)
    assert listed is not None and {*re.findall(r"[a-z-]+", listed[1])} - {"or"} == groups


def commands(text: str) -> list[list[str]]:
    """The words of every shell command in the bash blocks of a page that starts a program of ours."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if set(word) <= set("&|;"):
                    found += [words] if words else []
                    words = []
                else:
                    words.append(word)
    return [program for words in found if (program := our_program(words))]


def our_program(words: list[str]) -> list[str]:
    """Command and arguments of `latentflow ...`, `accelerate launch train/flow.py ...` and the like; or nothing."""
    for place, word in enumerate(words):
        if word == "latentflow" and words[place - 1 : place] not in (["cd"], ["import"]):
            return words[place + 1 :]
        if match := FILE.fullmatch(word):
            names = {file.stem: name for name, file in cli.programs().items()}
            return [names.get(match[1], match[1]), *words[place + 1 :]]
    return []


def mistakes(words: list[str]) -> list[str]:
    """What a command line names that does not exist."""
    command, *arguments = words
    if command.startswith("-"):
        return [] if command in ("--help", "--version") else [command]
    if command not in cli.programs():
        return [command]
    flags = [word.partition("=")[0] for word in arguments if re.match(r"--?[a-zA-Z]", word)]
    wrong = [f"{command} {flag}" for flag in flags if flag not in flags_of_command(command)]
    choices = choices_of_command(command)
    for place, word in enumerate(arguments, start=1):
        flag, equals, value = word.partition("=")
        value = value if equals else "".join(arguments[place : place + 1])
        is_a_name = value and not value.startswith("-") and "/" not in value and not value.isupper()
        if flag in choices and is_a_name and value not in choices[flag][0]:
            wrong.append(f"{command} {flag} {value}")
    return wrong


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_flags_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    inline = [f"```bash\n{code}\n```" for code in re.findall(r"`(latentflow [a-z][^`<]*)`", text)]
    wrong = [mistake for words in commands("\n".join([text, *inline])) for mistake in mistakes(words)]
    assert not wrong


# Flags of other programs that the pages name: pytest, torchrun, accelerate, pip, the benchmarks, the recipes.
FOREIGN = re.compile(
    r"--(run-(slow|gpu|network|data)|cpu|use_fsdp|fsdp_offload_params|num_processes|node-rank|machine_rank|index-url"
    r"|entries|seeds|only|size|seconds|rounds|threads|logdir|sit|dependency|script|skip|tiny|data|mix)"
)


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_within_sentences_are_those_of_some_command(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    named = {
        flag
        for code in re.findall(r"`([^`]+)`", text)
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*(?![\w*-])", code)
    }
    known = {flag for command in cli.programs() for flag in flags_of_command(command)}
    assert not {flag for flag in named - known - {"--no-FLAG"} if not FOREIGN.fullmatch(flag)}


def test_extras_are_those_of_the_project_and_the_page_of_installation_has_all() -> None:
    extras = {*tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]}
    for page in CURRENT:
        text = page.read_text(encoding="utf-8")
        lists = re.findall(r'(?:-e "?\.|latent-flow-matching)\[([\w,-]+)\]', text)
        assert {*re.findall(r"extras? `([\w-]+)`", text), *",".join(lists).split(",")} <= {*extras, ""}, page
    table = re.findall(r"^\| (`[^|]*)\|", (ROOT / "docs/guide/install.md").read_text(), re.MULTILINE)
    assert {*re.findall(r"`([\w-]+)`", " ".join(table))} == extras


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("latentflow train cats -o runs/cats --no-random-flip --preset tiny", []),
        ("A=1 latentflow train cats --learning-rte 1e-3  # a comment --with-flag", ["train --learning-rte"]),
        ("pip install x && latentflow generate 'a --cat' -x 3; latentflow drow", ["generate -x", "drow"]),
        ("torchrun --nproc-per-node 2 train/flow.py cats \\\n    --shards", ["train --shards"]),
        ("latentflow export runs/cats --preset tiny", ["export --preset"]),
        (
            "latentflow train cats --optimizer adam --path=linear --weighting edm",
            ["train --optimizer adam", "train --path linear"],
        ),
        (
            "latentflow distill A B --method reflow && latentflow edit a.png --method reflow",
            ["edit --method reflow"],
        ),
    ],
)
def test_a_command_or_flag_that_does_not_exist_is_found(line: str, wrong: list[str]) -> None:
    assert [mistake for words in commands(f"```bash\n{line}\n```") for mistake in mistakes(words)] == wrong


# --- Python ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "page", "table"),
    [(flow, "design-space.md", table) for table in TABLES.split()]
    + [(discrete, "discrete.md", table) for table in DISCRETE_TABLES.split()],
)
def test_the_maps_name_every_entry(module: ModuleType, page: str, table: str) -> None:
    text = (ROOT / "docs" / "reference" / page).read_text(encoding="utf-8")
    missing = [name for name in getattr(module, table) if f"`{name}`" not in text]
    assert not missing


def test_code_in_the_readme_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    for block in python_blocks(ROOT / "README.md"):
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "apple.png").is_file()


def test_code_of_the_map_runs() -> None:
    torch.manual_seed(0)
    names = {"x0": torch.randn(8, 2), "x1": torch.randn(8, 2), "t": torch.rand(8), "network": lambda x, t: x}
    for block in python_blocks(ROOT / "docs" / "reference" / "design-space.md"):
        exec(compile(block, "design-space.md", "exec"), names)
    assert names["loss"].isfinite() and names["x"].shape == (8, 2)  # type: ignore[union-attr]


def test_code_of_the_page_on_tokens_runs() -> None:
    torch.manual_seed(0)
    logits = torch.randn(17, 16)
    names = {
        "x1": torch.randint(0, 16, (2, 4, 4)),
        "t": torch.rand(2),
        "network": lambda x, t: logits[x],
        "unconditional": lambda x, t: 0.5 * logits[x],
        "embeddings": torch.randn(16, 3),
        "noise": torch.randn(2, 3, 4, 4),
        "code_network": lambda x, t: x.movedim(1, -1) @ logits[:3],
    }
    run_python("docs/reference/discrete.md", names)
    assert names["loss"].isfinite() and names["x"].max() < 16  # type: ignore[union-attr]
    assert names["tokens"].shape == (2, 4, 4)  # type: ignore[union-attr]


def test_code_of_the_page_on_autoencoders_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoencoderConfig(
        autoencoder_class="fsq", autoencoder_widths=(8, 8), encoder_layers=(1, 1), decoder_layers=(1, 1)
    )
    build_autoencoder(config, 16).save_pretrained(tmp_path / "RUN" / "autoencoder")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"images": torch.zeros(2, 3, 16, 16)}
    with torch.no_grad():
        run_python("docs/reference/autoencoder.md", names)
    assert names["images"].shape == (2, 3, 16, 16) and names["codes"].shape == (1000, 4)


def run_python(page: str, names: dict[str, Any]) -> None:
    """Run the Python blocks of a page one after the other."""
    blocks = python_blocks(ROOT / page)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize(
    "page",
    [
        "docs/guide/install.md",
        "docs/guide/share.md",
        "docs/guide/memory-and-speed.md",
        "docs/reference/python.md",
    ],
)
def test_code_of_pages_that_draw_with_the_shipped_checkpoint_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    names: dict[str, Any] = {}
    run_python(page, names)
    if page == "docs/reference/python.md":
        assert (tmp_path / "grid.png").is_file() and names["image"].shape == (1, 3, 64, 64)


def test_code_of_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/icons").mkdir(parents=True)
    (tmp_path / "runs/icons/pipeline").symlink_to(ROOT / "checkpoints" / "pictograms-128")
    run_python("docs/guide/tutorial.md", {})
    assert (tmp_path / "crown.png").is_file()


def test_code_of_the_page_on_few_steps_runs() -> None:
    names: dict[str, Any] = {"x0": torch.randn(4, 2), "u": lambda x, r, t: torch.ones_like(x)}
    run_python("docs/measurements/few-step.md", names)
    assert names["x1"].shape == (4, 2)


def test_code_of_the_page_on_adapters_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_adapter: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    for seed, name in enumerate(("hats", "boots")):
        make_adapter(Path("checkpoints/emoji-64"), Path(f"runs/{name}/adapter"), seed=seed)
    run_python("docs/guide/fine-tune.md", {"LatentFlowPipeline": LatentFlowPipeline})


@pytest.fixture
def make_adapter() -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location("adapters", ROOT / "tests" / "pipeline" / "adapters.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: Callable[..., Any] = module.make_adapter
    return made
