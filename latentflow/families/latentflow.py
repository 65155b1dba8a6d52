"""latentflow's own checkpoints: a ``DiT`` or a ``UNet`` of captions, classes, sizes and masks, or of nothing."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from .. import flow
from ..autoencoder import latent_channels, mask_channels, masked_condition
from ..errors import UserError, lookup, unknown
from ..flow import CONSISTENCY_STEPS, COUPLINGS, PATHS, PREDICTIONS, TIME_DENSITIES, CondOT, make
from ..flow.tensors import require_finite
from ..models import Condition, ControlInputs, DiT, encode_text
from ..models.text import START
from ..utils.names import as_spelled
from .control import CONTROL, ControlledModel
from .edit_defaults import EditDefaults
from .few_steps import FewSteps
from .model import Rows, Size
from .training_defaults import TrainingDefaults

#: steps of an ordinary network, and of one of average velocities, where nothing else is asked for
USUAL_STEPS, FEW_STEPS = 16, 4
#: steps of a solver, a scheduler or a method that is named without their number
NAMED_STEPS = 20
USUAL_GUIDANCE = 4.0


class LatentFlowModel(ControlledModel):
    """The flow model of latentflow's own checkpoints.

    What a checkpoint is conditioned on is read from its network's config: ``text_dim`` set means captions,
    ``num_classes`` classes, neither nothing. Its rows have text (B, L, D) with text_mask (B, L), class_labels (B,) and
    drop (B,), see ``latentflow.models.Condition``; they keep sizes (B, 6), channels (B, C', h, w), control
    (B, C, h, w), layout (B, H, W), control_scale (B, 1, 1, 1) and z (B, Z).

    Raises:
        UserError: the pipeline's settings are none, or do not belong together.
    """

    #: further arguments of the network's calls
    network_options: Mapping[str, Any] = {}

    def __new__(cls, pipeline: Any = None) -> LatentFlowModel:  # None: a copy is made
        """Return a model of tokens, or of codes, for a pipeline that has such a network."""
        config = {} if pipeline is None else pipeline.config
        if config.get("token_path") is not None or config.get("prediction") == "codes":
            from .tokens import CodeModel, TokenModel  # which derive from this class

            cls = CodeModel if config.get("token_path") is None else TokenModel
        return super().__new__(cls)

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        config = pipeline.config
        if config.prediction not in (known := (*PREDICTIONS, "codes")):
            raise unknown("prediction", config.prediction, known)
        lookup(COUPLINGS, config.coupling, "coupling")
        self.prediction, self.coupling = config.prediction, config.coupling
        self.path = make(PATHS, config.path, "path", **dict(config.path_options or {}))
        if config.get("average") and (self.prediction != "velocity" or self.path != CondOT()):
            raise UserError(
                f"average velocities with prediction {self.prediction} on path {config.path}",
                "They are of velocities on the straight path: prediction velocity, path condot.",
            )
        density, options = config.get("time_density") or "logit-normal", config.get("time_options") or {}
        make(TIME_DENSITIES, density, "time density", **dict(options))
        usual = config.get("usual_guidance")
        if usual is not None and not (isinstance(usual, int | float) and math.isfinite(usual)):
            raise UserError(f"usual_guidance {usual!r}", "Give a number, such as 2.0, or None.")
        self._usual_guidance: float | None = usual
        self.trained_null = config.get("trained_null", True)
        if not isinstance(self.trained_null, bool):
            raise UserError(f"trained_null {self.trained_null!r}", "Give true or false.")

    @staticmethod
    def open_pipeline(name_or_path: str | os.PathLike[str], **options: Any) -> Any:
        """Open a ``LatentFlowPipeline``; see its ``from_pretrained``."""
        module = importlib.import_module("latentflow.pipeline.generate")  # which lies above this package
        return module.LatentFlowPipeline.from_pretrained(name_or_path, **options)

    # ---------------------------------------------------------------- what the checkpoint takes

    def setting(self, name: str, default: Any = None) -> Any:
        """Return a setting of the network, or ``default`` where it has none or is not loaded."""
        return default if self.network is None else self.network.config.get(name, default)

    @property
    def takes_text(self) -> bool:
        return self.text_width is not None

    @property
    def takes_classes(self) -> bool:
        return self.setting("num_classes") is not None

    @property
    def takes_masks(self) -> bool:
        return self.vae is not None and self.setting("condition_channels") == mask_channels(self.vae)

    @property
    def control_inputs(self) -> ControlInputs:
        return ControlInputs.of(self.setting("control"))

    @property
    def takes_sizes(self) -> bool:
        return bool(self.setting("size_conditioning"))

    @property
    def classes(self) -> tuple[str, ...]:
        names = self.pipeline.config.get("id2label") or {}
        return tuple(
            names.get(str(number), str(number)) for number in range(self.setting("num_classes") or 0)
        )

    @property
    def trains_text(self) -> bool:
        """True for a network whose text encoder was trained with it: its tokenizer is one of `train_tokenizer`."""
        pipeline = self.pipeline
        return pipeline.text_encoder is not None and getattr(pipeline.tokenizer, "bos_token", None) == START

    @property
    def text_width(self) -> int | None:
        """Width D of the embeddings of captions; None for a network that takes none."""
        width: int | None = self.setting("text_dim")
        return width

    @property
    def labels(self) -> dict[str, int]:
        return {name: int(key) for key, name in (self.pipeline.config.get("id2label") or {}).items()}

    @property
    def native_size(self) -> Size | None:
        size = self.setting("sample_size")
        rows, columns = size if isinstance(size, list | tuple) else (size, size)
        factor = self.pipeline.vae_scale_factor
        return None if rows is None else (rows * factor, columns * factor)

    @property
    def size_multiple(self) -> int:
        return int(self.pipeline.vae_scale_factor * self.setting("patch_size", 1))

    def describe_condition(self) -> str:
        count, names = self.setting("num_classes"), list(self.labels)
        if self.takes_text and self.takes_classes:
            return "It takes a prompt, class_labels, or both."
        if self.takes_text:
            return 'It takes a prompt: pipe(prompt="..."); prompt="" draws without a condition.'
        if names:
            shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
            return f"It takes class_labels: {shown}."
        if self.takes_classes:
            return f"It takes class_labels: ids from 0 to {count - 1}."
        return "It takes no condition: num_images_per_prompt is the number of images."

    # ---------------------------------------------------------------- conditions

    def encode_prompt(  # type: ignore[override]
        self,
        prompts: Sequence[str],
        *,
        class_labels: Sequence[int | str] | None = None,
        max_sequence_length: int | None = None,
    ) -> Rows:
        """Return one row for each prompt; "" is the null, unless there is a class beside it.

        Args:
            class_labels: for networks that take both: one for each prompt.
            max_sequence_length: tokens per prompt; default: the tokenizer's own limit.

        Raises:
            UserError: the network takes no prompts, or its text encoder or tokenizer is not loaded.
        """
        self.check_condition(prompts, class_labels=class_labels)
        text, mask = self.embed_text(
            [prompts] if isinstance(prompts, str) else [*prompts], max_sequence_length
        )
        return self.rows(None if class_labels is None else self.class_ids(class_labels), text, mask)

    def encode_class(self, labels: Sequence[int | str]) -> Rows:
        """Return one row for each class, a name or an id.

        Raises:
            UserError: the network takes no classes, or knows none of this name.
        """
        self.check_condition(class_labels=labels)
        return self.rows(self.class_ids(labels))

    def null(self, n: int) -> Rows:
        """Return ``n`` rows without a condition: the learned null of a network that takes one.

        Raises:
            UserError: it has not learnt one.
        """
        self.require_null()
        text, mask, ids = None, None, None
        if self.takes_text:
            text = torch.zeros(n, 1, self.setting("text_dim"), device=self.device)
            mask = torch.zeros(n, 1, dtype=torch.bool, device=self.device)
        elif self.takes_classes:
            ids = [0] * n
        rows = self.rows(ids, text, mask, count=n)
        return replace(
            rows, values={**rows.values, "drop": torch.ones(n, dtype=torch.bool, device=self.device)}
        )

    def unconditional(self, rows: Rows) -> Rows | None:
        """Return the same rows with every class and text dropped; None where there are neither."""
        if not {"text", "class_labels"} & rows.values.keys():
            return None
        self.require_null()
        drop = rows.values["drop"]
        assert isinstance(drop, Tensor)
        return replace(rows, values={**rows.values, "drop": torch.ones_like(drop)})

    def rows(
        self,
        class_ids: Sequence[int] | None,
        text: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        count: int = 1,
    ) -> Rows:
        """Return rows of classes, of embeddings as `embed_text` makes them, or of both.

        Args:
            class_ids: B numbers.
            text, mask: (B, L, D) and (B, L) bool. Rows without tokens are the null.
            count: of rows, where none of these is given.
        """
        device = self.device
        labels = None if class_ids is None else torch.tensor(class_ids, device=device)
        if text is not None and mask is not None:
            text, mask = text.to(device), mask.to(device)
            drop = ~mask.any(dim=1)
            if not self.trained_null and drop.any():
                self.require_null()
        else:
            drop = torch.zeros(count if labels is None else len(labels), dtype=torch.bool, device=device)
        return self.rows_of(Condition(class_labels=labels, text=text, text_mask=mask, drop=drop), count)

    def rows_of(self, condition: Condition, count: int) -> Rows:
        """Return the network's condition of ``count`` images as rows."""
        values = {entry.name: getattr(condition, entry.name) for entry in fields(condition)}
        if condition.drop is None:
            values["drop"] = torch.zeros(count, dtype=torch.bool, device=self.device)
        given = {name: value for name, value in values.items() if value is not None}
        kept = {name: given.pop(name) for name in [*given] if name in ("channels", "sizes", "z", *CONTROL)}
        return Rows(self, given, kept)

    def embed_text(self, prompts: list[str], max_length: int | None = None) -> tuple[Tensor, Tensor]:
        """Return token embeddings (P, L, D) and their mask (P, L) bool; an empty prompt has no tokens, unless the
        network takes a class beside it.

        Raises:
            UserError: the checkpoint takes no text; the text encoder or the tokenizer is not loaded; what it makes is
                not finite.
        """
        if self.network is not None and not self.takes_text:
            self.check_condition(prompt=prompts)
        pipeline = self.pipeline
        if pipeline.text_encoder is None or pipeline.tokenizer is None:
            raise UserError(
                "a prompt was given, but the pipeline was loaded without its text encoder or tokenizer",
                "Load them, or pass prompt_embeds (from pipe.encode_prompt) instead.",
            )
        embeds, mask = encode_text(pipeline.tokenizer, pipeline.text_encoder, prompts, max_length)
        require_finite(
            embeds,
            "what the text encoder makes of the prompts",
            "In float16 it may overflow: load it in bfloat16 or float32. Else its weights are damaged.",
        )
        if self.takes_classes:
            return embeds, mask
        written = torch.tensor([bool(text.strip()) for text in prompts], device=mask.device)
        return embeds, mask & written[:, None]

    def class_ids(self, labels: Sequence[int | str]) -> list[int]:
        """Return the ids of class names, ids or a mixture.

        Raises:
            UserError: a name (the nearest is suggested) or an id is unknown, or the checkpoint has no class names.
        """
        known, ids = self.labels, []
        for label in labels:
            if isinstance(label, str) and not known:
                raise UserError(
                    f"class '{label}': this checkpoint has no class names", self.describe_condition()
                )
            number = lookup(known, as_spelled(label, known), "class") if isinstance(label, str) else label
            if not 0 <= number < (self.setting("num_classes") or 0):
                raise UserError(f"class id {number} does not exist", self.describe_condition())
            ids.append(number)
        return ids

    def with_known(self, rows: Rows, images: Tensor, masks: Tensor, known: Tensor | None = None) -> Rows:
        if not self.takes_masks:
            super().with_known(rows, images, masks)
        if len(rows) % len(images) or len(images) != len(masks):
            raise UserError(
                f"{len(images)} images and {len(masks)} masks for {len(rows)} rows",
                "Give a mask for each image, and as many images as rows, or a part of them.",
            )
        with self.steady_vae() as vae:
            channels = masked_condition(vae, images, masks)
            if known is not None:
                channels = torch.cat([channels[:, : -latent_channels(vae)], known.to(channels)], 1)
        return replace(
            rows, kept={**rows.kept, "channels": channels.repeat_interleave(len(rows) // len(channels), 0)}
        )

    def unlabelled(self, n: int) -> Rows:
        return self.null(n) if self.takes_text and not self.takes_classes else self.rows(None, count=n)

    @property
    def longest_text(self) -> int | None:
        config = getattr(self.pipeline.text_encoder, "config", None)
        return getattr(config, "max_position_embeddings", None)

    def known_latents(self, rows: Rows) -> Tensor:
        channels = rows.kept["channels"]
        assert isinstance(channels, Tensor)
        return channels[:, -latent_channels(self.vae) :]

    def with_sizes(self, rows: Rows, original: Size, crop: Size, target: Size, drawn: Size) -> Rows:
        """Return the rows of images that were of the size ``original``, and cropped at ``crop`` to ``target``.

        Args:
            drawn: the size that is drawn.

        Raises:
            UserError: other sizes than what is drawn, for a network that takes none.
        """
        if self.takes_sizes:
            sizes = torch.tensor([[*original, *crop, *target]] * len(rows), dtype=torch.float32)
            return replace(rows, kept={**rows.kept, "sizes": sizes.to(self.device)})
        if (original, crop, target) != (drawn, (0, 0), drawn):
            raise UserError(
                "this checkpoint was not trained with sizes and crops as a condition",
                "Leave original_size, crops_coords_top_left and target_size out.",
            )
        return rows

    # ---------------------------------------------------------------- from noise to data

    @property
    def few_steps(self) -> FewSteps:
        """Settings of few-step sampling: of an adapter in effect, whichever pipeline loaded it, or the checkpoint's."""
        adapted: FewSteps | None = getattr(self.network, "_few_steps", None)
        if adapted is not None:
            return adapted
        names = [entry.name for entry in fields(FewSteps) if entry.name in self.pipeline.config]
        return FewSteps.of({name: self.pipeline.config[name] for name in names})

    @property
    def training_defaults(self) -> TrainingDefaults:
        return TrainingDefaults(
            learning_rate=1.2e-2,
            full_learning_rate=4e-4,
            condition_dropout=0.1,
            source="docs/measurements/fine-tuning.md",
        )

    @property
    def usual_steps(self) -> int:
        few = self.few_steps
        return few.step_counts[-1] if few.step_counts else FEW_STEPS if few else USUAL_STEPS

    @property
    def edit_defaults(self) -> EditDefaults:
        return super().edit_defaults if self.trained_null else EditDefaults(guidance=1.0)

    @property
    def usual_guidance(self) -> float:
        """Guidance scale where nobody asks for one: in addition to what is distilled into the weights."""
        return self.guidance(None)

    @property
    def usual_solver(self) -> str | flow.Solver:
        """The solver that draws where none is named: docs/measurements/samplers.md has it beside others."""
        if self.few_steps:
            return CONSISTENCY_STEPS if self.few_steps.consistency else "euler"
        return "exponential-adams"

    def usual_grid(self, steps: int | None, height: int, width: int) -> Tensor:
        """Return the times that `usual_solver` takes: steps are shorter at both ends, but of few-step networks."""
        if self.few_steps:
            return self.time_grid(steps, height, width)
        return flow.time_grid(self.usual_steps if steps is None else steps, kind="sine")

    def guidance(self, scale: float | None) -> float:
        """Return the guidance scale that is used; a checkpoint into which its guidance is distilled does without."""
        if self.few_steps.folded_guidance != 1.0:
            return 1.0
        if scale is None:
            scale = self._usual_guidance
        return USUAL_GUIDANCE if scale is None else scale

    def adjust_guided(self, guided: Tensor, alone: Tensor) -> Tensor:
        """Return the guided velocity in the channels that are guided, elsewhere that of the condition alone."""
        count = self.pipeline.config.get("guidance_channels")
        return guided if count is None else torch.cat([guided[:, :count], alone[:, count:]], dim=1)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        return int(self.network.config.in_channels), height // factor, width // factor

    def prepare(self, rows: Rows) -> Condition:
        """Return the network's condition."""
        moved = rows.to(self.device, self.network.dtype)
        kept = dict(moved.kept)
        if "sizes" in kept:  # in half precision they would be others
            kept["sizes"] = rows.kept["sizes"].to(self.device)  # type: ignore[union-attr]
        return Condition(**moved.values, **kept)  # type: ignore[arg-type]

    def predict(
        self, x: Tensor, t: Tensor, condition: Condition, end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        if condition.sizes is None and self.takes_sizes:
            factor = self.pipeline.vae_scale_factor
            drawn = [x.shape[-2] * factor, x.shape[-1] * factor]
            sizes = torch.tensor([[*drawn, 0, 0, *drawn]] * len(x), dtype=torch.float32, device=x.device)
            condition = replace(condition, sizes=sizes)
        interval = {} if end is None or not self.few_steps.average else {"end": end}
        output: Tensor = self.network(x, t, condition, **interval, **self.network_options)
        return output

    @torch.no_grad()
    def features(
        self, images: Tensor, block: int, t: float, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the mean (B, D) of a noisy image's tokens behind ``block`` blocks of the network, without a condition
        but under the image's latent variable, if there is one.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            block: 1 to the network's depth.
            t: in [0, 1]; at 1 nothing of the image is noise.
            generator: of the noise.

        Raises:
            UserError: the network is no `DiT`, or has no such block.
        """
        network = self.network
        if not isinstance(network, DiT):
            raise UserError(
                f"a {type(network).__name__} has no blocks of tokens", "Features are those of a DiT."
            )
        if not 1 <= block <= len(network.blocks):
            raise UserError(f"block {block} of {len(network.blocks)}", f"Use 1 to {len(network.blocks)}.")
        x1 = self.encode(images.to(self.device))
        noise = torch.randn(x1.shape, generator=generator).to(x1)
        x = self.path.scale_input(self.path.sample(noise, x1, t).xt, t).to(self.dtype)
        rows = self.with_latent_variable(self.null(len(x)), like=x1, mean=True)
        found = network(x, t, self.prepare(rows), features=block, only_features=True)
        tokens: Tensor = found.features
        return tokens.float().mean(1)

    def _bound(self, rows: Rows, times: Tensor | None, scale: float) -> flow.Velocity:
        if times is not None and self.few_steps.consistency:
            times = times[[0, -1]]  # at every step it goes to the end of the grid
        return super()._bound(rows, times, scale)
