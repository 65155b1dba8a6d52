"""Our pipelines over flow models of other families: a stock pipeline of diffusers is inside, and called by ours.

    pipe = LatentFlowInpaintPipeline.from_pretrained("black-forest-labs/FLUX.2-klein-4B")
    pipe = LatentFlowInpaintPipeline.from_pipe(stock_pipeline)
    pipe = LatentFlowInpaintPipeline(model)

What is not a call of ours (``to``, offloading, components, ``load_lora_weights``, ``save_pretrained``) is the stock
pipeline's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, ClassVar, Self

from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from ..autoencoder import downscale_factor
from ..errors import UserError, few, with_article
from ..families import FlowModel, Rows
from ..families.added_inputs import ExtendableModel
from ..families.model import Size
from .arguments import ConditionArguments
from .calls import CallMixin
from .stock_adapters import load_adapter


class ModelPipeline(CallMixin):
    """The calls of a pipeline of ours over a `FlowModel` with a stock pipeline inside, ``model.pipeline``.

    Args:
        model: the flow model.
    """

    model: FlowModel
    #: the pipeline of ours whose calls these are
    kind: ClassVar[Any] = None
    #: our solvers on the stock scheduler's grid; that scheduler itself is ``pipe.model.pipeline.scheduler``
    scheduler = None

    def __init__(self, model: FlowModel) -> None:
        self.model = model
        self.vae_scale_factor = downscale_factor(model.vae) if model.vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The class of ours, so that ``isinstance(pipe, LatentFlowPipeline)`` holds."""
        return self.kind

    def __reduce__(self) -> Any:
        """Pickle and copy by the model: the class is made as it is here."""
        state = {name: value for name, value in vars(self).items() if name != "model"}
        return over_model, (self.kind, self.model), state

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """Build a pipeline of this kind with the components of another, see ``FlowPipeline.from_pipe``."""
        return cls.kind.from_pipe(pipeline, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Open a pipeline of this kind, see ``FlowPipeline.from_pretrained``."""
        return cls.kind.from_pretrained(pretrained_model_name_or_path, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not there yet
            raise AttributeError(name)
        return getattr(self.model.pipeline, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a component in the stock pipeline, which computes; anything else here."""
        inside = "model" in vars(self) and name != "scheduler" and name in self.model.pipeline.config
        if inside:
            setattr(self.model.pipeline, name, value)
        else:
            super().__setattr__(name, value)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the stock pipeline's components; see ``DiffusionPipeline.to``."""
        self.model.pipeline.to(*args, **kwargs)
        return self

    def load_lora_weights(self, source: Any, adapter_name: str | None = None, **options: Any) -> None:
        """Load an adapter by the stock pipeline's loader, and its input channels for masks and control
        images, if it has any; see `load_adapter`.

        Raises:
            UserError: it cannot be read, has nothing for this model, or was made for another base.
        """
        add_inputs = getattr(self.model, "add_inputs", None)
        load_adapter(self.model.pipeline, source, adapter_name, add_inputs=add_inputs, **options)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Forget these adapters, with their input channels for masks and control images."""
        self.model.pipeline.delete_adapters(adapter_names)
        self._remove_inputs([adapter_names] if isinstance(adapter_names, str) else adapter_names)

    def unload_lora_weights(self) -> None:
        """Take the adapters away, with their input channels for masks and control images; what is fused stays in the
        weights.

        Raises:
            UserError: an adapter with such channels is fused: the stock weights have no place for them.
        """
        if isinstance(self.model, ExtendableModel):
            layers = self.model.network.modules()
            fused = {name for layer in layers for name in getattr(layer, "merged_adapters", ())}
            if any(added.adapter in fused for added in self.model.added_inputs.values()):
                raise UserError(
                    "an adapter with input channels for masks or control images is fused, and cannot be unloaded",
                    "It cannot be merged: keep it beside its base (latentflow export RUN --adapter). In Python: "
                    "pipe.unfuse_lora() first.",
                )
            self._remove_inputs()
        self.model.pipeline.unload_lora_weights()

    def _remove_inputs(self, adapters: list[str] | None = None) -> None:
        if isinstance(self.model, ExtendableModel):
            self.model.remove_inputs(adapters)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write the stock pipeline's folder; see ``DiffusionPipeline.save_pretrained``.

        Raises:
            UserError: adapters are loaded beside the weights: the folder would not open.
        """
        parts = [name for name, part in self.components.items() if getattr(part, "peft_config", None)]
        if parts:
            raise UserError(
                f"adapters are loaded beside the weights of {few(parts)}, and a folder with them would not open",
                "Merge them first: pipe.fuse_lora(), then pipe.unload_lora_weights().",
            )
        self.model.pipeline.save_pretrained(save_directory, *args, **kwargs)

    def unknown_words(self, prompts: str | list[str]) -> list[str]:
        """Return no words: the vocabularies of pretrained text encoders spell everything."""
        return []

    def encode_rows(self, asked: ConditionArguments, count: int, drawn: Size) -> tuple[Rows, Rows | None]:
        """Return the conditions of a call; see `SamplingMixin.encode_rows`.

        Raises:
            UserError: a negative prompt where nothing leads away from it; embeddings that are no rows, or sizes as a
                condition.
        """
        model, embeds, negative_embeds = self.model, asked.prompt_embeds, asked.negative_prompt_embeds
        if isinstance(embeds, Tensor) or isinstance(negative_embeds, Tensor):
            raise UserError(
                f"embeddings of prompts are given to {with_article(type(model).__name__)} as a tensor",
                "A pretrained model takes rows: prompt_embeds=pipe.model.encode_prompt([...]), "
                "negative_prompt_embeds=pipe.model.encode_negative([...]).",
            )
        if asked.original_size or asked.target_size or asked.crops_coords_top_left != (0, 0):
            raise UserError(
                "original_size, crops_coords_top_left or target_size is given",
                "Leave them out: the size that is drawn is taken.",
            )
        limit = (
            {} if asked.max_sequence_length is None else {"max_sequence_length": asked.max_sequence_length}
        )
        if asked.class_labels is not None:
            rows = model.encode_class(_listed(asked.class_labels))
        elif embeds is not None:
            rows = model.adopt(embeds)
        else:
            encode: Callable[..., Rows] = model.encode_prompt
            if asked.references is not None:
                given = asked.negative_prompt is not None or negative_embeds is not None
                # a callback may switch guidance on
                guided = model.true_guidance(self.guidance_scale) != 1.0 or bool(asked.callback_on_step_end)
                encode = partial(encode, guided=guided and not given)
            rows = _encoded(encode, _listed(asked.prompt), asked.references, limit)
        negative = None
        if asked.negative_prompt is not None or negative_embeds is not None:
            if model.true_guidance(self.guidance_scale) == 1.0:
                raise UserError(
                    "a negative prompt is given, but nothing leads away from it at guidance scale "
                    f"{self.guidance_scale:g}",
                    model.describe_guidance(),
                )
            if negative_embeds is not None:
                negative = model.adopt(negative_embeds)
            else:
                texts = _listed(asked.negative_prompt)
                negative = _encoded(model.encode_negative, texts, asked.references, limit)
            negative = negative.repeat(len(rows) // len(negative))
        elif (
            embeds is not None
            and embeds.model is not model
            and model.true_guidance(self.guidance_scale) != 1.0
        ):
            # By the model that has encoded the prompts: this one may have no text encoders.
            unconditional = embeds.model.unconditional(embeds)
            negative = None if unconditional is None else model.adopt(unconditional)
        places = [row for row in range(len(rows)) for _ in range(asked.num_images_per_prompt)]
        places *= count // len(places)
        return rows[places], None if negative is None else negative[places]


def over_model(kind: Any, model: FlowModel) -> Any:
    """Return a pipeline over ``model`` that has the calls of ``kind``, one of our pipelines.

    It is an instance of ``kind`` to ``isinstance``, but has none of its components or loaders.
    """
    return class_over_models(kind)(model)


@cache
def class_over_models(kind: Any) -> type[ModelPipeline]:
    """Return the class of the pipelines over a flow model that have the calls of ``kind``."""
    described = {"__module__": kind.__module__, "__doc__": kind.__doc__, "kind": kind}
    return type(kind.__name__, (kind.call, ModelPipeline), described)


def _encoded(
    encode: Callable[..., Rows],
    prompts: list[str],
    references: list[list[Tensor]] | None,
    options: dict[str, Any],
) -> Rows:
    """Return a row for each prompt, with the images that it draws from; one prompt or list of images serves all.

    Prompts that draw from the same images are encoded in one call.
    """
    if references is None:
        return encode(prompts, **options)
    count = max(len(prompts), len(references))
    wanted = [(row % len(references), prompts[row % len(prompts)]) for row in range(count)]
    found: dict[tuple[int, str], Rows] = {}
    for number, images in enumerate(references):
        texts = [*dict.fromkeys(text for of, text in wanted if of == number)]
        rows = encode(texts, images=images, **options)
        found |= {(number, text): rows[place] for place, text in enumerate(texts)}
    return Rows.cat([found[pair] for pair in wanted])


def _listed(values: Any) -> list[Any]:
    return [values] if isinstance(values, str | int) else [*values]
