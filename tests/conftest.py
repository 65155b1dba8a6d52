"""What every test shares: which tests run, on how many threads, and where caches go."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported: the tests' tensors are small, and the processes of pytest-xdist share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run tests marked slow (minutes each)")
    parser.addoption("--run-gpu", action="store_true", help="run tests marked gpu (need CUDA)")
    parser.addoption(
        "--run-network", action="store_true", help="run tests marked network (need a package index)"
    )
    parser.addoption("--run-data", metavar="FOLDER", help="run tests marked data, on the data sets in FOLDER")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker in ("slow", "gpu", "network", "data"):
        if config.getoption(f"--run-{marker}"):
            continue
        skip = pytest.mark.skip(reason=f"marked {marker}: run with --run-{marker}")
        for item in items:
            # Not `in item.keywords`: that holds the names of folders as well, such as tests/data.
            if item.get_closest_marker(marker) is not None:
                item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """Libraries and tests are no garbage: it is not looked for among them, now or later."""
    gc.disable()
    result = yield
    gc.freeze()
    gc.enable()
    return result


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor fill the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Compute without gradients."""
    import torch

    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def data_folder(request: pytest.FixtureRequest) -> Path:
    """The folder of data sets that `--run-data` names (for tests marked ``data``)."""
    return Path(request.config.getoption("--run-data"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def load_program(repository: Path) -> Callable[[str], Any]:
    """Loads a program of `pipelines/` or `train/` as a module, by its name, such as "generate"."""

    def load(name: str) -> Any:
        files = [repository / folder / f"{name}.py" for folder in ("pipelines", "train")]
        file = next(file for file in files if file.is_file())
        spec = importlib.util.spec_from_file_location(f"{name}_program", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where the types of its config are looked up
        spec.loader.exec_module(module)
        return module

    return load
