"""The wheel, installed in an empty environment beside a package that owns `train` and `pipelines`."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import latentflow
from latentflow.utils.libraries import install_command

pytest.importorskip("hatchling", reason='needs hatchling: pip install -e ".[test]"')


def execute(
    *command: str | Path, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    capture = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    done = subprocess.run(words, cwd=cwd, env=env, **capture)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    execute(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=repository)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment with the wheel, which sees our dependencies but not this repository."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, symlinks=os.name != "nt", with_pip=True)
    scheme = {"base": str(root), "platbase": str(root)}
    scripts = Path(sysconfig.get_path("scripts", "venv", vars=scheme))
    site = Path(sysconfig.get_path("purelib", "venv", vars=scheme))
    pip = shlex.split("-m pip install --no-deps --no-index --disable-pip-version-check")
    execute(scripts / "python", *pip, wheel, cwd=root)
    for name in ("train", "pipelines"):  # somebody else's packages of those names
        (site / name).mkdir()
        (site / name / "__init__.py").write_text("raise ImportError('latentflow imported a stranger')\n")
    # After the environment's own folder, so that an editable latentflow among the dependencies comes second;
    # .pth files in there (such as the editable install's) are not processed.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    hidden = ("PYTHONPATH", "VIRTUAL_ENV")
    kept = {key: value for key, value in os.environ.items() if key not in hidden}
    return {**kept, "LATENTFLOW_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}


def test_the_wheel_holds_latentflow_alone(wheel, repository) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = next(name for name in names if name.endswith("entry_points.txt"))
        assert "latentflow = latentflow.cli:main" in archive.read(entry_points).decode()
    assert {name.split("/")[0] for name in names} == {
        "latentflow",
        f"latent_flow_matching-{latentflow.__version__}.dist-info",
    }
    assert "latentflow/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    for folder in ("train", "pipelines", "checkpoints/emoji-64"):
        for file in (repository / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert f"latentflow/programs/{file.relative_to(repository).as_posix()}" in names
    assert not [name for name in names if "__pycache__" in name]


def test_the_command_finds_its_programs(installed, environment, tmp_path) -> None:
    where = "import latentflow; print(latentflow.__file__)"
    found = execute(installed / "python", "-c", where, cwd=tmp_path, env=environment).stdout.strip()
    assert Path(found).is_relative_to(installed.parent)
    overview = execute(installed / "latentflow", "--help", cwd=tmp_path, env=environment).stdout
    for command in ("train", "evaluate"):
        assert f"  {command} " in overview


def test_a_missing_library_is_named_as_in_the_clone(installed, environment, tmp_path) -> None:
    code = "from latentflow.utils.libraries import install_command; print(install_command('peft', 'lpips'))"
    said = execute(installed / "python", "-c", code, cwd=tmp_path, env=environment).stdout.strip()
    assert said == install_command("peft", "lpips") and ">=" in said


def test_a_tiny_training_runs(installed, environment, tmp_path) -> None:
    for i in range(12):
        (tmp_path / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (20 * i, 0, 90)).save(tmp_path / "images" / "ab"[i % 2] / f"{i}.png")
    line = "train images --preset tiny --autoencoder-steps 2 --max-train-steps 2 --train-batch-size 4 -o run"
    execute(installed / "latentflow", *line.split(), cwd=tmp_path, env=environment)
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()
