"""Components of a checkpoint: files that fit together are loaded, all others are refused by name.

diffusers and transformers fill missing weights with random numbers, leave out weights that they do not know, and only
report it. Here a missing, unexpected, mis-shaped or non-finite weight is an error, and so is a file that cannot be
read. No code of a checkpoint's is executed, and no module is imported because a checkpoint names it.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, few, reading, shown
from .files import CONFIG, MEND, check_settings, read_settings
from .weight_files import stored_weights

if TYPE_CHECKING:
    from torch import Tensor, nn


_FLOATS = ("F", "BF")  # how safetensors' types of floating-point numbers begin


# ---------------------------------------------------------------- classes


def component_class(file: object, name: str, entry: Any, base: type) -> Any:
    """Return the class that a pipeline's index names for a component, without importing a module for it.

    Args:
        file: the index.
        name: the component's name.
        entry: [module, class], as diffusers writes it.
        base: class that it must be or derive from.

    Raises:
        UserError: there is no such class in diffusers, transformers or a module that is already imported, or it is no
            component of a pipeline.
    """
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
        raise UserError(f"{file}: {name} is {shown(entry)}", f"Expected: [module, class]. {MEND}")
    library, kind = entry
    try:
        # a library, or a part of diffusers' own pipelines, such as kolors
        place = sys.modules.get(library) or getattr(sys.modules.get("diffusers.pipelines"), library, None)
        found = getattr(place, kind, None)
    except (ImportError, RuntimeError):  # raised by transformers where a package is not installed
        found = None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(
            f"{file}: {name} is {library}.{kind}, which is no {base.__name__} that is known here",
            "latentflow executes no code of a checkpoint's: a component is a class of diffusers, transformers or "
            f"latentflow. Another can be passed: from_pretrained(folder, {name}=...).",
        )
    return found


def check_config(file: Path, config: Mapping[str, Any], kind: Any = None) -> None:
    """Refuse the config of quantised weights, or one that another class than ``kind`` wrote.

    Raises:
        UserError: names the file and the class.
    """
    if config.get("quantization_config") is not None:
        raise UserError(
            f"{file}: the weights are quantised", "Give the same model in float32 or half precision."
        )
    if kind is None:
        return
    written = config.get("_class_name", kind.__name__)
    wanted = str(getattr(getattr(kind, "config_class", None), "model_type", ""))
    model = config.get("model_type", wanted) if wanted else wanted
    if written != kind.__name__:
        raise UserError(f"{file} is of a {shown(written)}, not of a {kind.__name__}", MEND)
    if not isinstance(model, str) or not (wanted.startswith(model) or model.startswith(wanted)):
        raise UserError(f"{file} is of a model of type {shown(model)}, not {wanted}", MEND)


# ---------------------------------------------------------------- weights


def load_module(
    kind: Any, folder: Path, shown: object = None, *, fix: str = MEND, **options: Any
) -> nn.Module:
    """Load a network of diffusers, transformers or ours from the folder that its ``save_pretrained`` wrote.

    Args:
        kind: its class.
        folder: folder with config.json and the weights.
        shown: its name in errors; default: the folder.
        fix: advice for the user where the weights cannot be read.
        options: handed to ``kind.from_pretrained``: ``dtype``, ``variant``, ``use_safetensors``.

    Returns:
        The network, in evaluation mode.

    Raises:
        UserError: a file is missing or cannot be read; weights and config do not belong together.
    """
    from diffusers.models.modeling_utils import no_init_weights

    config_file = folder / CONFIG
    config = read_settings(config_file)
    check_config(config_file, config, kind)
    ours = issubclass(kind, Checked)
    if ours:
        check_settings(config_file, config, kind)
    if options.get("use_safetensors") and not any(folder.glob("*.safetensors")):
        raise UserError(f"{shown or folder} has no file of weights (.safetensors)", fix)
    stored = stored_weights(folder, options.get("variant"))
    check_layers(config_file, config, stored)

    def build() -> object:
        if hasattr(kind, "config_class"):  # a class of transformers
            return kind._from_config(kind.config_class.from_pretrained(folder))
        with no_init_weights():  # only its sizes are asked for
            return kind.from_config({**config})

    check_size(config_file, stored, build, ours=ours)
    options = {name: value for name, value in options.items() if value is not None}
    if "dtype" in options and not hasattr(kind, "config_class"):  # diffusers' name of it
        options["torch_dtype"] = options.pop("dtype")
    return load_checked(kind, str(folder), shown or folder, stored, fix=fix, **options)


class Checked:
    """A network of ours, whose ``from_pretrained`` refuses weights that do not fit, whoever calls it."""

    @classmethod
    def from_pretrained(cls, source: Any, **options: Any) -> Any:
        """Load the network; see ``diffusers.ModelMixin.from_pretrained``.

        Raises:
            UserError: weights are missing, unexpected, of another shape or not finite, or a file cannot be read.
        """
        if {"output_loading_info", "ignore_mismatched_sizes"} & options.keys():  # the caller checks these
            return super().from_pretrained(source, **options)  # type: ignore[misc]
        subfolder = options.pop("subfolder", None) or ""
        if Path(source, subfolder).is_dir():
            return load_module(cls, Path(source, subfolder), **options)
        return load_checked(cls, source, f"the network in '{source}'", subfolder=subfolder, **options)


def may_be_on_the_hub(name: str) -> bool:
    """Return whether ``name``, which is no folder here, has the form of a hub id."""
    return not Path(name).is_absolute() and len(Path(name).parts) <= 2


def load_transformers_model(
    name: str,
    shown: str,
    family: Callable[[Any], Any],
    *,
    fix: str,
    subfolder: str = "",
    **options: Any,
) -> Any:
    """Load a model of transformers, by hub id or folder.

    Args:
        name: hub id or folder.
        shown: its name in errors.
        family: config -> class that loads it.
        fix: advice for the user where it cannot be read.
        subfolder: folder inside it that holds the model.
        options: see `load_checked`.

    Raises:
        UserError: see `load_module`.
    """
    from transformers import AutoConfig

    folder = Path(name, subfolder)
    file = folder / CONFIG
    stored = None
    if folder.is_dir():
        stored = stored_weights(folder)
        check_layers(file, read_settings(file), stored)
    elif not may_be_on_the_hub(name):
        raise UserError(f"{shown} cannot be read: there is no such folder", fix)
    where: dict[str, Any] = {"subfolder": subfolder, "trust_remote_code": False}
    with library_reads(shown, fix=fix):
        config = AutoConfig.from_pretrained(name, **where)
    check_config(file, config.to_dict())
    kind = family(config)
    # The config of a model of images and text has one part for each half.
    half = getattr(getattr(kind, "config_class", None), "base_config_key", "")
    make = getattr(kind, "from_config", None) or kind._from_config
    check_size(file, stored, lambda: make(getattr(config, half, config) if half else config))
    return load_checked(kind, name, shown, stored, fix=fix, **where, **options)


def load_checked(
    kind: Any,
    source: str,
    shown: object,
    stored: Mapping[str, tuple[str, int]] | None = None,
    *,
    other_parts: bool = False,
    fix: str = MEND,
    **options: Any,
) -> nn.Module:
    """Return ``kind.from_pretrained(source)`` if every weight is from its file, fits and is finite.

    Args:
        shown: the source, as a user would call it.
        stored: see `stored_weights`.
        other_parts: the file may hold weights of other parts of a larger model, and lack a pooler, which is not used.
        fix: advice for the user where it cannot be read.
        options: passed to ``kind.from_pretrained``.

    Raises:
        UserError: names the weights, or the reason why the files cannot be read.
    """
    if placing := [name for name in ("device_map", "quantization_config") if options.get(name) is not None]:
        fix = f"If the files are whole, change {' and '.join(placing)}, or leave it out."
    with library_reads(shown, fix=fix):
        module, info = kind.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    buffers = tuple(name for name, _ in module.named_buffers())  # older files hold some that are now computed
    missing = sorted(name for name in info["missing_keys"] if not name.endswith("position_ids"))
    unexpected = sorted(name for name in info["unexpected_keys"] if not name.endswith(buffers))
    if other_parts:
        own = {name.partition(".")[0] for name in module.state_dict()}
        prefix = f"{getattr(module, 'base_model_prefix', '')}."
        missing = [name for name in missing if "pooler" not in name]
        unexpected = [name for name in unexpected if name.removeprefix(prefix).partition(".")[0] in own]
    if missing:
        raise _unfit(shown, f"weights are missing: {few(missing, 3)}")
    if unexpected:
        raise _unfit(shown, f"the config has no place for weights: {few(unexpected, 3)}")
    if info["mismatched_keys"]:
        wrong = sorted(
            f"{name} is {_sides(there)}, not {_sides(here)}" for name, there, here in info["mismatched_keys"]
        )
        raise _unfit(shown, f"weights have another shape than the config says: {few(wrong, 3)}")
    _check_values(module, shown, stored or {})
    return module.eval()  # type: ignore[no-any-return]


def _unfit(shown: object, what: str) -> UserError:
    return UserError(f"{shown}: weights and config do not belong together: {what}", MEND)


def _check_values(module: nn.Module, shown: object, stored: Mapping[str, tuple[str, int]]) -> None:
    """Refuse weights that are whole numbers, or not finite."""
    import torch

    values = {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
    whole = [name for name in values if name in stored and not stored[name][0].startswith(_FLOATS)]
    if whole:
        raise UserError(
            f"{shown}: weights are no floating-point numbers but {stored[whole[0]][0]}: {few(whole, 3)}",
            f"Quantised weights are not read. {MEND}",
        )
    usual = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    odd = [
        name
        for name, tensor in values.items()
        if tensor.dtype in usual and not tensor.is_meta and tensor.numel() and not is_finite(tensor)
    ]
    if odd:
        dtype = str(values[odd[0]].dtype).removeprefix("torch.")
        raise UserError(f"{shown}: weights are not finite (in {dtype}): {few(odd, 3)}", MEND)


def is_finite(values: Tensor) -> bool:
    """Return whether all values of a tensor, which must not be empty, are finite; reads them once, copies none."""
    import torch

    return bool(torch.isfinite(torch.stack(values.detach().aminmax())).all())


def check_layers(file: Path, config: Mapping[str, Any], stored: Mapping[str, tuple[str, int]] | None) -> None:
    """Refuse a config with more layers than there are tensors in the file of weights.

    Raises:
        UserError: names the setting.
    """
    for name, value in _settings_within(config):
        if stored is None or not re.search("layers|depth", name) or type(value) is not int:
            continue
        if value > len(stored):
            raise UserError(
                f"{file}: {name} is {value}, but the file of weights holds {len(stored)} tensors", MEND
            )


def check_size(
    file: Path,
    stored: Mapping[str, tuple[str, int]] | None,
    build: Callable[[], object],
    *,
    ours: bool = False,
) -> None:
    """Refuse a config that describes a far larger network than its weights are, before any memory is taken for it.

    Args:
        file: the config.
        stored: see `stored_weights`; None: nothing is known of them.
        build: builds the network; called where tensors take no memory.
        ours: the class is latentflow's, whose mistakes in settings are `UserError`; any other exception is a defect and
            passes.

    Raises:
        UserError: the network is too large, or cannot be built.
    """
    if stored is None:
        return
    import torch

    with ExitStack() as stack:
        stack.enter_context(about(file) if ours else library_reads(file))
        stack.enter_context(without_reports())
        stack.enter_context(_no_larger(file, stored))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.device("meta"))
        build()


def _settings_within(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _settings_within(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _settings_within(item, name)
    else:
        yield name, value


@contextmanager
def _no_larger(file: Path, stored: Mapping[str, tuple[str, int]]) -> Iterator[None]:
    """Refuse, within the context, to build a network that has far more weights than are stored."""
    from torch.nn.modules import module as hooks

    numbers = sum(count for _, count in stored.values())
    # Twice as many, since tied weights are built more than once; and room for small ones that are computed.
    left = {"tensors": 2 * len(stored) + 64, "numbers": 4 * numbers + 2**20}
    thread = threading.get_ident()

    def count(_: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is None or threading.get_ident() != thread:
            return
        left["tensors"] -= 1
        left["numbers"] -= tensor.numel()
        if min(left.values()) < 0:
            raise UserError(
                f"{file} describes a far larger network than the weights beside it, which are "
                f"{len(stored)} tensors of {numbers} numbers",
                MEND,
            )

    handles = [
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------- the libraries


def quiet_libraries() -> None:
    """Turn off warnings and progress bars of diffusers and transformers.

    Programs check what they load and have progress bars of their own; a script keeps what its user has set.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


@contextmanager
def library_reads(shown: object, fix: str = MEND) -> Iterator[None]:
    """Turn exceptions of diffusers, transformers and safetensors about files they cannot read into a `UserError`.

    Only their calls belong inside. Their advice to execute a checkpoint's code is not passed on.

    Args:
        shown: the file or checkpoint, as a user would call it.
        fix: advice for the user.

    Raises:
        UserError: in place of their exception.
        OutOfMemory: memory ran out; it names the component, if diffusers was loading one.
    """
    from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
    from safetensors import SafetensorError

    general = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)
    theirs = (ImportError, RuntimeError, SafetensorError, StrictDataclassError, HfHubHTTPError)
    with without_reports(), reading(shown, *general, *theirs, fix=fix):
        try:
            yield
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise UserError(
                f"{shown} needs code that it brings along, which latentflow does not execute",
                "Use a model of a kind that the installed libraries know.",
            ) from error
        except (RuntimeError, MemoryError) as error:
            from .memory import component_that_loads, is_out_of_memory, out_of_memory

            if not is_out_of_memory(error):
                raise
            part = component_that_loads(error)
            raise out_of_memory("load", error, f"the {part} of {shown}" if part else str(shown)) from error


@contextmanager
def about(shown: object) -> Iterator[None]:
    """Let every `UserError` within the context name its subject: a file, a checkpoint."""
    try:
        yield
    except UserError as error:
        raise UserError(
            error.what if str(shown) in error.what else f"{shown}: {error.what}", error.fix
        ) from error


@contextmanager
def without_reports() -> Iterator[None]:
    """Silence the libraries within the context; our errors say in one sentence what is wrong."""
    import diffusers.utils.logging
    import transformers.utils.logging

    loud = [
        (library, level)
        for library in (diffusers.utils.logging, transformers.utils.logging)
        if (level := library.get_verbosity()) != library.CRITICAL  # setting a level takes a while
    ]
    for library, _ in loud:
        library.set_verbosity(library.CRITICAL)
    try:
        yield
    finally:
        for library, level in loud:
            library.set_verbosity(level)


@contextmanager
def reported_missing() -> Iterator[dict[str, list[str]]]:
    """Yield class name -> weights that diffusers and transformers have found in no file, as they report them within.

    They fill them with random numbers, and a pipeline does not say so in any other way. transformers joins names:
    layers.{0, 1}.weight. Poolers and heads, which text encoders of pipelines do without, are left out.
    """
    found: dict[str, list[str]] = {}

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = re.sub(r"\x1b\[[0-9;]*m", "", str(record.msg))
            if report := re.search(
                r"Some weights of (\w+) were not .* newly initialized: \[(.*?)\]", text, re.DOTALL
            ):
                names = re.findall(r"'([^']+)'", report[2])
            elif report := re.search(r"(\w+) LOAD REPORT", text):
                names = re.findall(r"^(\S.*?)\s*\|\s*MISSING\b", text, re.MULTILINE)
            else:
                return
            unused = re.compile(r"pooler|lm_head|position_ids")
            found.setdefault(report[1], []).extend(name for name in names if not unused.search(name))

    listener = Listener()
    loggers = [
        logging.getLogger(f"{library}.modeling_utils") for library in ("diffusers.models", "transformers")
    ]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(listener)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    try:
        yield found
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(listener)
            logger.setLevel(level)
            logger.propagate = propagate


def _sides(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "one number"
