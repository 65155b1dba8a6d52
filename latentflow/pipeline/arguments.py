"""The arguments of a pipeline's call: each of the right kind and in range, and those of the condition fitting one
another, before anything is computed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ParamSpec, Self, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..errors import UserError, finite, lookup, nearest, plural, shown, unknown, whole, with_article
from ..families.model import FlowModel, Generators, Rows, Size
from ..families.sizes import check_size
from ..flow import SOLVERS, Solver
from ..flow.discrete import SAMPLERS
from ..flow.tensors import require_finite
from ..flow.times import MOST_STEPS, STEPS_FIX
from .adapter_scale import SCALE_NAMES, Scale, check_scale, scale_of, scaled_adapters
from .scheduler import checked_sigmas

P = ParamSpec("P")
T = TypeVar("T")
#: (name, value) -> the value, in the form that the pipelines work with.
Check = Callable[[str, Any], Any]
ClassLabels: TypeAlias = int | str | Sequence[int | str]
#: called as (pipe, i, timestep, tensors) after step i; returns tensors to replace
StepCallback: TypeAlias = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]

#: largest side in pixels, and longest text in tokens: whatever is larger is a mistake
LARGEST = 2**20
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
#: arguments that many of diffusers' pipelines have and ours have not -> what to do in their place
FOREIGN = {
    "timesteps": "Pass sigmas: each is a timestep divided by 1000.",
    "prompt_2": "The checkpoint has one text encoder: pass prompt alone.",
    "negative_prompt_2": "The checkpoint has one text encoder: pass negative_prompt alone.",
    "eta": "Choose a solver that draws noise: solver='ddpm' or 'euler-maruyama'.",
    "callback": "Pass callback_on_step_end, which is called as (pipe, i, timestep, tensors).",
    "callback_steps": "Pass callback_on_step_end, which is called after every step.",
    "true_cfg_scale": "Pass guidance_scale: guidance is classifier-free here.",
    "lora_scale": 'Pass joint_attention_kwargs={"scale": ...}.',
}
#: what a callback may ask for; "prediction" cannot be replaced
CALLBACK_TENSORS = ["latents", "prompt_embeds", "negative_prompt_embeds", "prediction"]


def checked(call: Callable[P, T]) -> Callable[P, T]:
    """Check the arguments of a pipeline's method by ``CHECKS`` before it runs, within ``pipe.running``.

    None passes where it is the argument's default. Of unknown words it is warned once. The names of `AdapterScale`,
    where the method takes them (``**adapters``), are arguments like any other, and scale the adapters while it runs.
    """
    signature = _named_scales(inspect.signature(call))
    method = f".{call.__name__}".removesuffix(".__call__")

    @functools.wraps(call)
    def checking(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in signature.parameters:
                raise _not_taken(f"{type(args[0]).__name__}{method}", name, signature.parameters)
        given = signature.bind(*args, **kwargs)
        for name, value in given.arguments.items():
            if name in CHECKS and not (value is None and signature.parameters[name].default is None):
                given.arguments[name] = CHECKS[name](name, value)
        pipe = given.arguments["self"]
        scale = scale_of({name: given.arguments.pop(name, None) for name in SCALE_NAMES})
        if not pipe.is_running:
            words = [given.arguments.get(name) for name in ("prompt", "negative_prompt", "source_prompt")]
            pipe.warn_of_unknown_words(*words, stacklevel=2)
        with pipe.running(), scaled_adapters(pipe, scale):
            return call(*given.args, **given.kwargs)

    checking.__signature__ = signature  # type: ignore[attr-defined]
    return checking


def _named_scales(signature: inspect.Signature) -> inspect.Signature:
    """Return a signature with the names of `AdapterScale` in the place of ``**adapters``."""
    kinds = inspect.Parameter
    if not any(entry.kind is kinds.VAR_KEYWORD for entry in signature.parameters.values()):
        return signature
    own = [entry for entry in signature.parameters.values() if entry.kind is not kinds.VAR_KEYWORD]
    named = [kinds(name, kinds.KEYWORD_ONLY, default=None, annotation=Scale) for name in SCALE_NAMES]
    return signature.replace(parameters=[*own, *named])


def _not_taken(what: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for an argument that ``what`` does not have."""
    names = [name for name in known if name != "self"]
    guess = nearest(name, names)
    fix = FOREIGN.get(name) or (f"Did you mean {guess}?" if guess else f"It takes {', '.join(names)}.")
    return UserError(f"{what} takes no argument {shown(name)}", fix)


def texts(name: str, value: Any) -> str | list[str]:
    """Return a text, or a list of at least one.

    Raises:
        UserError: it is none, or holds half of a character (a lone surrogate).
    """
    rows = [value] if isinstance(value, str) else value
    if not isinstance(rows, list | tuple) or not rows or not all(isinstance(row, str) for row in rows):
        raise UserError(f"{name} is {shown(value)}", 'Pass a text, or a list of texts; "" is none.')
    for row in rows:
        if any("\ud800" <= character <= "\udfff" for character in row):
            raise UserError(f"{name} is {shown(row)}", "It holds half of a character: write it anew.")
    return value if isinstance(value, str) else list(rows)


def labels(name: str, value: Any) -> int | str | list[int | str]:
    """Return a class, or a list of at least one: names, or whole numbers (numpy's and torch's are).

    Raises:
        UserError: it is none.
    """

    def plain(label: Any) -> Any:
        return label.tolist() if hasattr(label, "tolist") else label

    value = plain(value)
    rows = [value] if isinstance(value, int | str) else value
    fine = isinstance(rows, list | tuple | range) and len(rows) > 0
    rows = [plain(row) for row in rows] if fine else []
    if not rows or not all(isinstance(row, int | str) and not isinstance(row, bool) for row in rows):
        raise UserError(f"{name} is {shown(value)}", "Pass a class name or number, or a list of them.")
    return rows[0] if isinstance(value, int | str) else rows


def _whole(least: int, most: int | None = None, fix: str = "") -> Check:
    return lambda name, value: whole(name, value, least, most, fix=fix)


def _finite(least: float = -float("inf"), most: float = float("inf"), fix: str = "") -> Check:
    return lambda name, value: finite(name, value, least, most, fix=fix)


def _scales(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return finite(name, value)
    if not value:
        raise UserError(f"{name} is an empty dictionary", "Leave it out.")
    return {kind: finite(f"{name}[{kind!r}]", each) for kind, each in value.items()}


def _tensor(shape: str, *, floating: bool = True, others: str = "") -> Check:
    """Return the check of a tensor of as many dimensions as ``shape`` names, such as "(B, L)", none of them 0.

    Args:
        others: more words on what may be passed.
    """

    def check(name: str, value: Any) -> Tensor:
        ndim = shape.count(",") + 1
        fits = isinstance(value, Tensor) and value.ndim == ndim and value.numel() > 0
        if not fits or (floating and not value.is_floating_point()) or value.is_complex():
            what = f"{shown(value)}, {value.dtype}" if isinstance(value, Tensor) else shown(value)
            kind = "floating-point tensor" if floating else "tensor"
            raise UserError(f"{name} is {what}", f"Pass a {kind} {shape}{others}.")
        if floating:
            require_finite(value, name, "Check where it comes from.")
        tensor: Tensor = value
        return tensor

    return check


def _pair(least: int, what: str) -> Check:
    def check(name: str, value: Any) -> tuple[int, int]:
        if not isinstance(value, tuple | list) or len(value) != 2:
            raise UserError(f"{name} is {shown(value)}", f"Give two numbers of pixels: {what}.")
        first, second = (
            whole(name, side, least, LARGEST, fix=f"Give two numbers of pixels: {what}.") for side in value
        )
        return first, second

    return check


def _instance(kind: Any, fix: str) -> Check:
    def check(name: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise UserError(f"{name} is {shown(value)}", fix)
        return value

    return check


def _generators(name: str, value: Any) -> Any:
    rows = [value] if isinstance(value, torch.Generator) else value
    if not isinstance(rows, list) or not rows or not all(isinstance(row, torch.Generator) for row in rows):
        raise UserError(
            f"{name} is {shown(value)}", "Pass a torch.Generator, or a list with one for each image."
        )
    return value


def _device(name: str, value: Any) -> torch.device:
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"{name} is {shown(value)}", "Pass a torch.device or its name, such as cpu."
        ) from error


#: the "solver" of a call that leaves the steps to a scheduler of diffusers
SCHEDULER = "scheduler"
#: the "solver" of a call that takes the one that was tuned to the checkpoint
TUNED = "tuned"


def _solver(name: str, value: Any) -> str | Solver:
    if isinstance(value, Solver):
        return value
    _instance(str, f"Pass one of {', '.join(SOLVERS)}.")(name, value)
    if value not in (SCHEDULER, TUNED):
        lookup({**SOLVERS, **SAMPLERS}, value, "solver")  # the second are of tokens
    return str(value)


def output_kind(name: str, value: Any) -> str:
    """Return one of ``OUTPUT_TYPES``.

    Raises:
        UserError: it is none of them.
    """
    _instance(str, f"Pass one of {', '.join(OUTPUT_TYPES)}.")(name, value)
    if value not in OUTPUT_TYPES:
        raise unknown(name, value, OUTPUT_TYPES)
    return str(value)


def _tensor_names(name: str, value: Any) -> list[str]:
    if not isinstance(value, list | tuple) or not all(isinstance(row, str) for row in value):
        raise UserError(f"{name} is {shown(value)}", f"Pass a list of {', '.join(CALLBACK_TENSORS)}.")
    for row in value:
        if row not in CALLBACK_TENSORS:
            raise unknown("callback tensor", row, CALLBACK_TENSORS)
    return list(value)


def _interval(name: str, value: Any) -> tuple[float, float]:
    fix = "Use 0 <= low <= high <= 1 (t = 1 is data)."
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise UserError(f"guidance interval {shown(value)}", fix)
    low, high = (finite("guidance interval", side, 0.0, 1.0, fix=fix) for side in value)
    if low > high:
        raise UserError(f"guidance interval {shown(value)}", fix)
    return low, high


def _embeds(name: str, value: Any) -> Tensor | Rows:
    if isinstance(value, Rows):
        return value
    if not isinstance(value, Tensor):
        fix = "Pass rows: pipe.model.encode_prompt([...]). Models of latentflow also take a tensor (B, L, D)."
        raise UserError(f"{name} is {shown(value)}", fix)
    tensor: Tensor = _tensor("(B, L, D)")(name, value)
    return tensor


def _autoencoder(name: str, value: Any) -> Any:
    if not callable(getattr(value, "decode", None)) or not hasattr(value, "config"):
        raise UserError(f"{name} is {shown(value)}", "Pass an autoencoder, such as load_autoencoder(folder).")
    return value


def _noise(name: str, value: Any) -> Tensor:
    whole = isinstance(value, Tensor) and value.ndim == 3 and value.dtype in _WHOLE_TYPES
    tensor: Tensor = _TOKENS(name, value.long()) if whole else _LATENTS(name, value)
    return tensor


def _temperature(name: str, value: Any) -> float:
    fix = "Use a positive, finite number; 1 leaves the logits as they are."
    if (number := finite(name, value, 0.0, fix=fix)) == 0.0:
        raise UserError(f"{name} is 0", fix)
    return number


_WHOLE_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_TOKENS = _tensor("(B, h, w)", floating=False)
_LATENTS = _tensor("(B, C, h, w)", others=", or to a checkpoint of tokens whole numbers (B, h, w)")
_SIZE, _MASK = _pair(1, "height and width"), _tensor("(B, L)", floating=False)
_FLAG = _instance(bool, "Pass True or False.")

#: argument of a pipeline's method -> its check. Images are checked as they are read.
CHECKS: dict[str, Check] = {
    "prompt": texts,
    "negative_prompt": texts,
    "source_prompt": texts,
    "class_labels": labels,
    "source_class_labels": labels,
    "height": _whole(1, LARGEST, "Give a whole number of pixels."),
    "width": _whole(1, LARGEST, "Give a whole number of pixels."),
    "num_inference_steps": _whole(1, MOST_STEPS, STEPS_FIX),
    "sigmas": lambda name, value: checked_sigmas(value),
    "guidance_scale": _finite(),
    "source_guidance_scale": _finite(),
    "control_scale": _scales,
    "guidance_interval": _interval,
    "num_images_per_prompt": _whole(1, 10**9),
    "frames": _whole(2, fix="Ask for at least 2, the first and the last."),
    "generator": _generators,
    "latents": _noise,
    "masked_image_latents": _noise,
    "prompt_embeds": _embeds,
    "negative_prompt_embeds": _embeds,
    "source_prompt_embeds": _embeds,
    "prompt_attention_mask": _MASK,
    "negative_prompt_attention_mask": _MASK,
    "source_prompt_attention_mask": _MASK,
    "max_sequence_length": _whole(1, LARGEST),
    "output_type": output_kind,
    "return_dict": _FLAG,
    "measure": _FLAG,
    "callback_on_step_end": _instance(Callable, "Pass a function (pipe, i, timestep, tensors)."),
    "callback_on_step_end_tensor_inputs": _tensor_names,
    "solver": _solver,
    "method": _instance(str, "Pass the name of a method."),
    "temperature": _temperature,
    "corrector": _finite(0.0, fix="Use a finite number from 0; 1 to 5 are usual."),
    "strength": _finite(0.0, 1.0, "Use 0 (nothing changes) to 1 (drawn from pure noise)."),
    "draws": _whole(1, 10_000),
    "plain_from": _finite(0.0, 1.0, "Use a time in [0, 1]; 1 is off."),
    "padding_mask_crop": _whole(0, LARGEST, fix="Give a number of pixels, at least 0."),
    "feather": _finite(0.0, fix="Give a number of pixels, at least 0."),
    "seamless": _FLAG,
    "original_size": _SIZE,
    "target_size": _SIZE,
    "crops_coords_top_left": _pair(0, "top and left"),
    **dict.fromkeys(SCALE_NAMES, check_scale),
    "do_classifier_free_guidance": _FLAG,
    "device": _device,
    "lora_scale": _finite(),
    "count": _whole(1, 10**9),
    "images": _tensor("(B, 3, H, W)"),
    "size": _SIZE,
    "vae": _autoencoder,
}


# ---------------------------------------------------------------- how they fit one another


@dataclass(frozen=True, kw_only=True)
class ConditionArguments:
    """The arguments of a call that say what is drawn; see ``LatentFlowPipeline``."""

    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    num_images_per_prompt: int = 1
    prompt_embeds: Tensor | Rows | None = None
    negative_prompt_embeds: Tensor | Rows | None = None
    prompt_attention_mask: Tensor | None = None
    negative_prompt_attention_mask: Tensor | None = None
    max_sequence_length: int | None = None
    class_labels: ClassLabels | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    callback_on_step_end: StepCallback | None = None
    callback_on_step_end_tensor_inputs: list[str] | None = None
    original_size: Size | None = None
    crops_coords_top_left: Size = (0, 0)
    target_size: Size | None = None
    generator: Generators | None = None
    latents: Tensor | None = None
    control_image: Any = None
    control_scale: float | Mapping[str, float] = 1.0
    like: Any = None
    temperature: float = 1.0
    corrector: float = 0.0
    #: the images that prompts draw from: one list for all prompts, or one for each
    references: list[list[Tensor]] | None = None

    @property
    def refers(self) -> bool:
        """True where the condition draws from images: prompts that are beside them, or rows that keep them."""
        rows = self.prompt_embeds
        return self.references is not None or (isinstance(rows, Rows) and "references" in rows.kept)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """Pick them from the local variables of a call."""
        names = [entry.name for entry in fields(cls)]
        return cls(**{name: arguments[name] for name in names if name in arguments})


def check_inputs(model: FlowModel, asked: ConditionArguments, height: int, width: int, images: int) -> int:
    """Refuse arguments that do not fit one another or the checkpoint; return the number of rows.

    Args:
        height, width: in pixels, of what is drawn.
        images: how many images the call brings; one prompt serves them all, and one image all prompts.

    Raises:
        UserError: a size that the autoencoder cannot make (the nearest is named), a condition that is missing or that
            the checkpoint does not take; arguments that exclude one another, or numbers of prompts, classes, images
            and generators that do not fit.
    """
    check_size(height, width, model.size_multiple)
    given = (
        ("prompt", asked.prompt, asked.prompt_embeds, asked.prompt_attention_mask),
        (
            "negative_prompt",
            asked.negative_prompt,
            asked.negative_prompt_embeds,
            asked.negative_prompt_attention_mask,
        ),
    )
    for name, text, embeds, mask in given:
        check_embeds(model, name, text, embeds, mask)
    prompts, negatives = (text if embeds is None else embeds for _, text, embeds, _ in given)
    model.check_condition(prompts, negatives, asked.class_labels)
    limit = model.longest_text
    if limit is not None and (asked.max_sequence_length or 0) > limit:
        raise UserError(
            f"max_sequence_length is {asked.max_sequence_length}", f"The text encoder takes {limit} tokens."
        )
    classes = None if asked.class_labels is None else len(model.class_ids(_class_list(asked.class_labels)))
    number, several = _number(negatives), _number(prompts) or 0
    if number is not None and (not several or number not in (1, several)):
        raise UserError(
            f"{plural(number, 'negative prompt')} for {plural(several, 'prompt')}",
            "Pass one negative prompt for all, or one for each prompt.",
        )
    count = count_rows(asked.num_images_per_prompt, _number(prompts), classes, images)
    check_noise(model, count, height, width, asked.generator, asked.latents)
    return count


def _class_list(given: ClassLabels) -> list[int | str]:
    found = labels("class_labels", given)
    return found if isinstance(found, list) else [found]


def check_embeds(
    model: FlowModel, name: str, text: Any, embeds: Tensor | Rows | None, mask: Tensor | None
) -> None:
    """Refuse embeddings ``name``_embeds beside a text or that the network does not take, or a mask of others.

    Raises:
        UserError: says their shapes.
    """
    if text is not None and embeds is not None:
        raise UserError(f"both {name} and {name}_embeds are given", "Pass one of them.")
    text_embeds: Any = embeds
    if isinstance(embeds, Rows):
        check_rows(model, name, embeds, mask)
        text_embeds = embeds.values.get("text")  # of our own models
    shape = None if text_embeds is None else tuple(text_embeds.shape)
    if mask is not None and (shape is None or tuple(mask.shape) != shape[:2]):
        raise UserError(
            f"{name}_attention_mask has shape {tuple(mask.shape)}, {name}_embeds {shape}",
            "Pass both as encode_prompt returns them: (B, L) and (B, L, D).",
        )
    if shape is not None and model.text_width not in (None, shape[-1]):
        raise UserError(f"{name}_embeds has shape {shape}", f"The network takes (B, L, {model.text_width}).")


def check_rows(model: FlowModel, name: str, rows: Rows, mask: Tensor | None) -> None:
    """Refuse rows ``name``_embeds that another kind of model has made, none at all, or a mask beside them.

    Raises:
        UserError: says which.
    """
    if not len(rows):
        raise UserError(f"{name}_embeds hold no rows", "Pass at least one row.")
    if type(rows.model) is not type(model):
        theirs, own = (with_article(type(each).__name__) for each in (rows.model, model))
        raise UserError(
            f"{name}_embeds are rows of {theirs}, but the model is {own}",
            "Encode the prompts with this model: pipe.model.encode_prompt([...]).",
        )
    if mask is not None:
        raise UserError(f"{name}_attention_mask is given beside rows", "Leave it out: rows have their own.")


def check_noise(
    model: FlowModel,
    count: int,
    height: int,
    width: int,
    generator: Generators | None,
    latents: Tensor | None = None,
) -> None:
    """Refuse a size that is not the model's, and generators or latents to start from that do not fit ``count`` images.

    Raises:
        UserError: the nearest sizes; how many generators there are; their shape or device.
    """
    check_size(height, width, model.size_multiple)
    if isinstance(generator, list) and len(generator) != count:
        raise UserError(
            f"{len(generator)} generators for {count} images",
            "Pass one for each image (prompts x num_images_per_prompt), or a single one.",
        )
    shape = (count, *model.latent_shape(height, width))
    if latents is not None and tuple(latents.shape) != shape:
        what = "latents" if latents.is_floating_point() else "latents that are tokens"
        raise UserError(
            f"{what} have shape {tuple(latents.shape)}",
            f"For these inputs it is {shape}{', tokens (whole numbers)' if model.draws_tokens else ''}.",
        )
    device = model.device.type
    for given in [generator] if isinstance(generator, torch.Generator) else generator or []:
        if given.device.type not in ("cpu", device):
            raise UserError(
                f"a generator is on {given.device}, the pipeline on {device}",
                "Make it on the CPU, where the same seed is the same noise everywhere: torch.Generator().",
            )


def _number(prompts: str | list[str] | Tensor | Rows | None) -> int | None:
    """Return the number of prompts, or of their embeddings; None = none."""
    return None if prompts is None else 1 if isinstance(prompts, str) else len(prompts)


def count_rows(images_per_prompt: int, prompts: int | None, classes: int | None, images: int) -> int:
    """Return the rows of a call: prompts (or classes) x images_per_prompt; one prompt serves any number of images.

    Args:
        prompts, classes: how many are given; None = none.

    Raises:
        UserError: the numbers of prompts, classes and images do not fit one another.
    """
    given = {count for count in (prompts, classes) if count is not None}
    if len(given) > 1:
        raise UserError(
            f"the numbers of prompts and class_labels differ: {sorted(given)}", "Pass as many of each."
        )
    count = given.pop() if given else 1
    if 1 not in (count, images) and count != images:
        raise UserError(
            f"{count} prompts or classes for {images} images", "Pass as many of each, or one of either."
        )
    return max(count, images) * images_per_prompt
