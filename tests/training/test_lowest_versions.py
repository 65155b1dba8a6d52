"""The lowest versions that pyproject.toml allows work together: everything imports, trains and draws on them."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from .command import TINY

# These stay as they are installed: each pair is a download of gigabytes.
KEPT = {"torch", "torchvision"}

IMPORT_ALL = """
import importlib, sys
from importlib.metadata import packages_distributions, version
for pin in sys.argv[1:]:
    name, _, wanted = pin.partition("==")
    assert version(name).startswith(wanted), (pin, version(name))
    for module, owners in packages_distributions().items():
        if name.lower() in {owner.lower() for owner in owners} and not module.startswith("_"):
            importlib.import_module(module)
"""


def lowest(project: dict) -> list[str]:
    """Pins of every direct dependency, extras included, at the lowest version that is declared."""
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + [line for extra in extras.values() for line in extra]
    pins = []
    for requirement in map(Requirement, lines):
        if requirement.name in KEPT | {project["name"]}:
            continue
        bounds = [one.version for one in requirement.specifier if one.operator == ">="]
        assert len(bounds) == 1, f"{requirement} needs one lower bound"
        pins.append(f"{requirement.name}=={bounds[0]}")
    return sorted(set(pins))


def test_every_dependency_has_one_lower_bound_wherever_it_is_named(repository: Path) -> None:
    pins = lowest(tomllib.loads((repository / "pyproject.toml").read_text())["project"])
    names = [pin.partition("==")[0].lower() for pin in pins]
    assert len(names) == len(set(names)), pins


@pytest.mark.network
def test_the_lowest_versions_together_import_train_and_draw(
    repository: Path, images: Path, tmp_path: Path
) -> None:
    pins = lowest(tomllib.loads((repository / "pyproject.toml").read_text())["project"])
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    # What is not pinned is found where this test runs, torch above all.
    site = sysconfig.get_path("purelib", vars={"base": str(environment)})
    Path(site, "installed.pth").write_text(sysconfig.get_path("purelib"))

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [str(python), *map(str, arguments)],
            capture_output=True, text=True, cwd=tmp_path, stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(repository), "LATENTFLOW_CACHE": str(tmp_path / "cache")},
        )  # fmt: skip
        assert done.returncode == 0, (arguments, done.stdout[-2000:], done.stderr[-4000:])
        return done.stdout

    run("-m", "pip", "install", "--quiet", *pins)
    run("-c", IMPORT_ALL, *pins)
    run(
        "-m", "latentflow", "train", images, "-o", tmp_path / "run", *TINY, "--max-train-steps", "4",
        "--preview-steps", "2", "--report-to", "tensorboard",
    )  # fmt: skip
    run(
        "-m", "latentflow", "train", images, "-o", tmp_path / "lora",
        "--init-from", tmp_path / "run" / "pipeline",
        "--lora-rank", "2", "--max-train-steps", "4",
    )  # fmt: skip
    run(
        "-m", "latentflow", "generate", "a red circle", "--checkpoint", tmp_path / "run",
        "--lora", tmp_path / "lora", "-o", "out.png",
    )  # fmt: skip
    run("-m", "latentflow", "generate", "--fast", "red apple", "-o", "apple.png")
    assert (tmp_path / "out.png").is_file() and (tmp_path / "apple.png").is_file()
