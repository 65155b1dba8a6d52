"""What the documentation says is there: links lead somewhere, code runs, the map names every entry of the tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from latentflow import flow

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("checkpoints/*/README.md")])
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)#\s]+)(?:#[^)]*)?\)")
TABLES = "COUPLINGS PATHS PREDICTIONS TIME_DENSITIES TIME_GRIDS WEIGHTINGS SOLVERS DIFFUSIONS"


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


@pytest.mark.parametrize("table", TABLES.split())
def test_the_map_names_every_entry(table) -> None:
    page = (ROOT / "docs" / "design-space.md").read_text(encoding="utf-8")
    missing = [name for name in getattr(flow, table) if f"`{name}`" not in page]
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
    for block in python_blocks(ROOT / "docs" / "design-space.md"):
        exec(compile(block, "design-space.md", "exec"), names)
    assert names["loss"].isfinite() and names["x"].shape == (8, 2)  # type: ignore[union-attr]
