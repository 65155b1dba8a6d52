"""Holds the direction of imports, read from the source, and that nothing executes code from a checkpoint."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "latentflow"
PROGRAMS = sorted(file for folder in ("train", "pipelines") for file in (ROOT / folder).rglob("*.py"))
MODULES = sorted(file for file in PACKAGE.rglob("*.py") if "programs" not in file.relative_to(PACKAGE).parts)

# Layers from the bottom; a module may import from its own part and from lower layers. Data lies above models
# and autoencoder, whose latents and embeddings it caches; families above data, which reads images of any mode; training
# above the pipeline of its previews; inference above training, whose unfinished runs it opens; web above inference,
# whose functions answer its requests.
# Leaves that those after them, and everything else, may import; `cli` is for programs only.
GROUND = [
    {"errors"},
    {"utils.names"},
    {"utils", "utils.files", "utils.flags", "utils.libraries", "utils.progress", "utils.words"},
    {"utils.memory", "utils.single_files"},
    {"utils.weight_files"},
    {"utils.components", "utils.html_page", "utils.placement", "cli"},
    {"__main__"},
]
LEAVES = set().union(*GROUND)
LAYERS = [
    {"flow"},
    {"config"},
    {"models", "autoencoder"},
    {"data"},
    {"families"},
    {"metrics", "pipeline"},
    {"training.loop"},
    {"training.losses"},
    {"training.report"},
    {"training"},
    {"inference"},
    {"web", "evaluation"},
]


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def part(module: str) -> str:
    """`latentflow.models.dit` -> models, `latentflow.training.loop.fit` -> training.loop; a run and fine-tuning
    are one part, training."""
    names = module.split(".")
    name = names[1] if len(names) > 1 else ""
    inner = ".".join(names[1:3])
    return inner if inner in LEAVES.union(*LAYERS) or name == "utils" else name


def module_name(file: Path) -> str:
    names = list(file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imports(file: Path, everywhere: bool = True) -> list[tuple[int, str]]:
    """(line, absolute module) of every import; `from latentflow import x` counts as latentflow.x.

    Args:
        everywhere: also those within functions. Settings are checked there against tables of any package.
    """
    found = []
    package = module_name(file) if file.name == "__init__.py" else module_name(file).rpartition(".")[0]
    for node in ast.walk(parsed(file)) if everywhere else parsed(file).body:
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, *([node.module] if node.module else [])])
            found += (
                [(node.lineno, f"latentflow.{alias.name}") for alias in node.names]
                if base == "latentflow"
                else [(node.lineno, base)]
            )
    return found


def layer(name: str) -> int | None:
    return next((i for i, names in enumerate(LAYERS) if name in names), None)


def ground(name: str) -> int:
    return next((i for i, names in enumerate(GROUND) if name in names), len(GROUND))


def allowed(importer: str, imported: str) -> bool:
    if importer == imported or ground(imported) < ground(importer):
        return True
    if importer in LEAVES:
        return False
    if imported in LEAVES:
        return imported != "cli"  # programs only
    here, there = layer(importer), layer(imported)
    return here is not None and there is not None and there < here


def test_the_rules_themselves() -> None:
    assert allowed("models", "flow")
    assert allowed("models", "config")
    assert not allowed("config", "models")
    assert not allowed("flow", "config")
    assert allowed("training.loop", "models")
    assert allowed("training", "training.loop")
    assert not allowed("training.loop", "training.losses")
    assert allowed("flow", "errors")
    assert not allowed("flow", "models")
    assert not allowed("data", "training")
    assert not allowed("models", "data")
    assert not allowed("pipeline", "training.loop")
    assert not allowed("errors", "flow")
    assert allowed("utils.components", "utils.files")
    assert not allowed("utils.files", "utils.components")
    assert not allowed("errors", "utils.files")
    assert part("latentflow.pipeline.inpaint") == "pipeline"
    assert part("latentflow.training.loop.fit") == "training.loop"
    assert part("latentflow.training.fine_tune.prior") == "training"


def test_every_part_of_the_package_has_a_place() -> None:
    known = LEAVES.union(*LAYERS)
    assert {part(module_name(file)) for file in MODULES if part(module_name(file))} <= known


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_downwards(file: Path) -> None:
    importer = part(module_name(file))
    if not importer:
        return  # latentflow/__init__.py hands out names lazily
    wrong = []
    for line, module in imports(file, everywhere=importer != "config"):
        top = module.split(".")[0]
        if top in ("train", "pipelines"):
            wrong.append(f"line {line}: {module} is a program")
        elif top == "latentflow":
            target = part(module)
            is_leaf_value = module.count(".") == 1 and target.startswith("__")  # latentflow.__version__
            if target and not is_leaf_value and not allowed(importer, target):
                wrong.append(f"line {line}: {importer} must not import {target}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", PROGRAMS, ids=lambda file: str(file.relative_to(ROOT)))
def test_programs_import_latentflow_and_nothing_of_one_another(file: Path) -> None:
    neighbours = {other.stem for other in PROGRAMS} - sys.stdlib_module_names
    for line, module in imports(file):
        top = module.split(".")[0]
        assert top not in neighbours | {"train", "pipelines", "tests"}, f"line {line}: imports {module}"


@pytest.mark.parametrize("file", [*MODULES, *PROGRAMS], ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_unpickles(file: Path) -> None:
    """A checkpoint from elsewhere must not be able to run code."""
    modules = {module.split(".")[0] for _, module in imports(file)}
    assert not modules & {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            values = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert values.get("weights_only") == "True", (
                f"line {node.lineno}: torch.load without weights_only"
            )
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert ast.unparse(node.value) == "False", f"line {node.value.lineno}: trust_remote_code"


# Parts of libraries that take tenths of a second to import, and that drawing an image does not use.
SELDOM_USED = ["scipy.stats.distributions", "bitsandbytes.nn"]


HEAVY = ["torch", "diffusers", "transformers", "tyro"]
#: modules that one process imports one after the other, each with what is still absent then
LIGHT = [
    {"latentflow.config": ["torch", "numpy", "accelerate", "diffusers", "transformers", "yaml"]},
    {
        "latentflow": HEAVY,
        "latentflow.cli": HEAVY,
        "latentflow.families": HEAVY,
        "latentflow.flow": ["diffusers", "transformers", "accelerate", "tyro"],
        "latentflow.families.model": ["latentflow.pipeline", "tyro"],
    },
    {"latentflow.pipeline": ["latentflow.data", "latentflow.training", "tyro", *SELDOM_USED]},
]


@pytest.mark.parametrize("modules", LIGHT, ids=lambda modules: next(iter(modules)))
def test_light_imports_stay_light_and_leave_the_garbage_collector_on(modules: dict[str, list[str]]) -> None:
    """What waits for its use is there when it is used."""
    code = f"""
import gc, importlib.util, inspect, sys
for name, absent in {modules!r}.items():
    importlib.import_module(name)
    assert gc.isenabled() and not set(absent) & set(sys.modules), (name, set(absent) & set(sys.modules))
if name != "latentflow.pipeline":
    sys.exit()
import scipy
from diffusers import FlowMatchEulerDiscreteScheduler
assert importlib.util.find_spec("scipy.stats") and inspect.getmodule(len)
FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True).set_timesteps(3)
import scipy.stats._stats_py
from scipy.stats import norm
assert norm.ppf(0.5) == scipy.stats.norm.ppf(0.5) == 0.0
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_written_image_imports_neither_torch_nor_data_sources(tmp_path: Path) -> None:
    code = f"""
import sys
from PIL import Image
from latentflow.inference.images import save_images
save_images([Image.new("RGBA", (2, 2))], {str(tmp_path / "x.png")!r})
assert not {{"torch", "latentflow.data"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("program", [False, True])
def test_what_a_program_imports_is_left_out_of_the_search_for_garbage(program: bool) -> None:
    """In a script the objects of its own must stay in it."""
    begin = "utils.begin_program()" if program else ""
    code = (
        f"import gc; from latentflow import utils; {begin}\n"
        "with utils.quick_imports(): import json.tool\nprint(gc.get_freeze_count() > 1000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(program)]


FRAGMENT = re.compile(
    r"(Of|What|Whether|Where|That|Those|Which|How|Whom|Whose|Beside|By|In|On|For|To|As|Here|There|Nothing|None|Such)\b"
)


def fragments(file: Path) -> list[str]:
    """Return the docstrings of classes and functions that open with neither a verb nor a head noun."""
    nodes = [
        node
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    documented = [(node.lineno, ast.get_docstring(node) or "") for node in nodes]
    return [f"line {line}: {text.splitlines()[0]}" for line, text in documented if FRAGMENT.match(text)]


@pytest.mark.parametrize("file", [*MODULES, *PROGRAMS], ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings_open_with_a_verb_or_a_noun(file: Path) -> None:
    assert not fragments(file)


def test_fragments_are_found(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text('def f():\n    """Of a step."""\n\ndef g():\n    """Return a step."""\n')
    assert fragments(file) == ["line 1: Of a step."]
