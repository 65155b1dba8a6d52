"""What every latentflow pipeline shares: components, conditions, the guided velocity, sampling, loading."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, ModelMixin, VQModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import diffusers_border as border
from .autoencoder import decode, downscale_factor
from .errors import UserError, lookup, unknown
from .flow import (
    PATHS,
    PREDICTIONS,
    CondOT,
    Velocity,
    as_velocity,
    change_path,
    guide_batched,
    integrate,
    make,
    time_grid,
)
from .flow import Path as FlowPath
from .models import MODELS, Condition, encode_text

Generators: TypeAlias = torch.Generator | list[torch.Generator]
ClassLabels: TypeAlias = int | str | Sequence[int | str]
#: (step, timestep as diffusers counts it, x) -> x
AfterStep: TypeAlias = Callable[[int, Tensor, Tensor], Tensor]


class FlowPipeline(DiffusionPipeline):  # type: ignore[misc]
    """The common part of the pipelines; not called itself.

    What a checkpoint is conditioned on is read from its network's config: ``text_dim`` set means captions,
    ``num_classes`` classes, neither nothing.

    Args:
        vae: autoencoder between images and latents; the statistics of its latents are in its own config.
        transformer: the velocity network, a ``DiT`` or a ``UNet``.
        text_encoder, tokenizer: for captions; None elsewhere, or where embeddings are passed instead.
        scheduler: None means our own solvers. A diffusers flow scheduler steps in their place, unless a call
            names a ``solver``.
        id2label: class id -> name.
        path: the probability path that the network was trained on, a key of ``latentflow.flow.PATHS``. It is sampled
            on the straight path all the same.
        path_options: settings of that path, such as {"beta_max": 12.0}.
        prediction: what the network predicts: "velocity", "data", "noise" or "score".
    """

    model_cpu_offload_seq: Any = "text_encoder->transformer->vae"
    _optional_components: ClassVar[Any] = ["vae", "transformer", "text_encoder", "tokenizer", "scheduler"]
    vae: Any
    transformer: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderDC | AutoencoderTiny | VQModel,
        transformer: ModelMixin,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        scheduler: Any | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,  # JSON makes the ids strings
        path: str = "condot",
        path_options: dict[str, float] | None = None,
        prediction: str = "velocity",
    ) -> None:
        super().__init__()
        components = {"text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler}
        self.register_modules(vae=vae, transformer=transformer, **components)
        # Keys as JSON has them, so that the config is the same before and after saving.
        names = None if id2label is None else {str(key): name for key, name in id2label.items()}
        self.register_to_config(
            id2label=names, path=path, path_options=dict(path_options or {}), prediction=prediction
        )
        if prediction not in PREDICTIONS:
            raise unknown("prediction", prediction, PREDICTIONS)
        self._prediction = prediction
        #: the probability path that the network was trained on
        self.path: FlowPath = make(PATHS, path, "path", **dict(path_options or {}))
        #: class name -> id
        self.labels: dict[str, int] = {name: int(key) for key, name in (names or {}).items()}
        self.vae_scale_factor = downscale_factor(vae) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale, self._guidance_interval = 1.0, (0.0, 1.0)
        self._num_timesteps, self._interrupt = 0, False

    # ---------------------------------------------------------------- the running call

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running call; a callback may change ``_guidance_scale``."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether guidance does anything: the checkpoint has a condition and the scale is not 1."""
        return self._guidance_scale != 1.0 and (self.takes_text or self.takes_classes)

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the running call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the call ends after this step; a callback sets ``_interrupt``, what is there is decoded."""
        return self._interrupt

    # ---------------------------------------------------------------- what the checkpoint takes

    @property
    def takes_text(self) -> bool:
        """Whether the network is conditioned on captions."""
        return self._network_config("text_dim") is not None

    @property
    def takes_classes(self) -> bool:
        """Whether the network is conditioned on a class."""
        return self._network_config("num_classes") is not None

    def _network_config(self, name: str, default: Any = None) -> Any:
        return default if self.transformer is None else self.transformer.config.get(name, default)

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Class ids of class names.

        Raises:
            UserError: a name is unknown (the nearest is suggested), or the checkpoint has no class names.
        """
        names = [label] if isinstance(label, str) else list(label)
        if names and not self.labels:
            raise UserError(f"class '{names[0]}': this checkpoint has no class names", self._takes())
        return [lookup(self.labels, name, "class") for name in names]

    def class_ids(self, class_labels: ClassLabels) -> list[int]:
        """Class ids of names, ids or a mixture.

        Raises:
            UserError: a name or an id is unknown.
        """
        labels = [class_labels] if isinstance(class_labels, int | str) else list(class_labels)
        ids = [self.get_label_ids(label)[0] if isinstance(label, str) else int(label) for label in labels]
        for number in ids:
            if not 0 <= number < self._network_config("num_classes"):
                raise UserError(f"class id {number} does not exist", self._takes())
        return ids

    def _takes(self) -> str:
        """What the checkpoint takes, as the second half of an error."""
        count, names = self._network_config("num_classes"), list(self.labels)
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

    def check_condition(
        self, prompt: Any = None, negative_prompt: Any = None, class_labels: Any = None
    ) -> None:
        """Refuse a condition that the checkpoint does not take, or the lack of one (None = not given).

        Raises:
            UserError: says what the checkpoint takes.
        """
        given = {"prompt": prompt, "negative_prompt": negative_prompt, "class_labels": class_labels}
        taken = {"prompt": self.takes_text, "negative_prompt": self.takes_text}
        taken["class_labels"] = self.takes_classes
        for name, value in given.items():
            if value is not None and not taken[name]:
                raise UserError(f"this checkpoint does not take {name}", self._takes())
        needed = [name for name in ("prompt", "class_labels") if taken[name]]
        if needed and all(given[name] is None for name in needed):
            raise UserError(f"{' or '.join(needed)} is missing", self._takes())

    # ---------------------------------------------------------------- condition and velocity

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Token embeddings of prompts, each repeated ``num_images_per_prompt`` times in place: a, a, b, b.

        An empty prompt becomes a row without tokens (mask all False), which means the learned null. Without a
        negative prompt the negative tensors are None, and guidance starts from that same null.

        Returns:
            prompt_embeds (B, L, D), negative_prompt_embeds (B, L', D), prompt_attention_mask (B, L) bool,
            negative_prompt_attention_mask (B, L') bool; None for what is not there.

        Raises:
            UserError: no text encoder is loaded, or the numbers of prompts and negative prompts differ.
        """
        device = device or self._execution_device
        if prompt is not None:
            prompt = [prompt] if isinstance(prompt, str) else list(prompt)
            prompt_embeds, prompt_attention_mask = self._embed(prompt, max_sequence_length)
        count = 0 if prompt_embeds is None else prompt_embeds.shape[0]
        if not do_classifier_free_guidance:
            negative_prompt_embeds = negative_prompt_attention_mask = None
        elif negative_prompt is not None:
            negative = (
                [negative_prompt] * count if isinstance(negative_prompt, str) else list(negative_prompt)
            )
            negative_prompt_embeds, negative_prompt_attention_mask = self._embed(
                negative, max_sequence_length
            )
        if negative_prompt_embeds is not None and negative_prompt_embeds.shape[0] != count:
            raise UserError(
                f"{negative_prompt_embeds.shape[0]} negative prompts for {count} prompts",
                "Pass one negative prompt for all, or one for each prompt.",
            )
        prompt_embeds, prompt_attention_mask = _repeated(
            prompt_embeds, prompt_attention_mask, num_images_per_prompt, device
        )
        negative_prompt_embeds, negative_prompt_attention_mask = _repeated(
            negative_prompt_embeds, negative_prompt_attention_mask, num_images_per_prompt, device
        )
        return prompt_embeds, negative_prompt_embeds, prompt_attention_mask, negative_prompt_attention_mask

    def _embed(self, prompts: list[str], max_length: int | None) -> tuple[Tensor, Tensor]:
        """(P, L, D) and (P, L) bool; an empty prompt has no tokens, unless there is a class beside it."""
        if self.text_encoder is None or self.tokenizer is None:
            raise UserError(
                "a prompt was given, but the pipeline was loaded without its text encoder or tokenizer",
                "Load them, or pass prompt_embeds (from pipe.encode_prompt) instead.",
            )
        embeds, mask = encode_text(self.tokenizer, self.text_encoder, prompts, max_length)
        if self.takes_classes:
            return embeds, mask
        written = torch.tensor([bool(text.strip()) for text in prompts], device=mask.device)
        return embeds, mask & written[:, None]

    def condition(
        self, class_ids: list[int] | None, text: Tensor | None, mask: Tensor | None
    ) -> Condition | None:
        """The network's condition of B rows, or None without any. Rows without tokens become the null."""
        if class_ids is None and text is None:
            return None
        device = self._execution_device
        labels = None if class_ids is None else torch.tensor(class_ids, device=device)
        empty = None if mask is None else ~mask.any(dim=1)
        drop = empty if empty is not None and bool(empty.any()) else None
        return Condition(class_labels=labels, text=text, text_mask=mask, drop=drop)

    def velocity(self, positive: Condition | None, negative: Condition | None) -> Velocity:
        """The guided velocity over B rows, float32 whatever the network's precision.

        Each call is one network evaluation: of B rows at guidance 1 and outside the guidance interval, of 2B
        rows inside it. ``negative`` None means no guidance. The scale is read at every call, so that a
        callback can change it.
        """
        guided = positive is not None and negative is not None
        alone = self._under(positive)
        doubled = self._under(Condition.cat(positive, negative)) if positive and negative else alone

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            scale = self._guidance_scale if guided else 1.0
            return guide_batched(doubled, alone, scale, self._guidance_interval)(x, t)

        return velocity

    def _under(self, condition: Condition | None) -> Velocity:
        """The network as a velocity under one condition: its own precision inside, float32 outside.

        Whatever the network's path, its samples are drawn on the straight one, where nothing is singular.
        """
        dtype = self.transformer.dtype
        moved = None if condition is None else condition.to(self._execution_device, dtype)

        def network(x: Tensor, t: Tensor) -> Tensor:
            times = t.to(x.device, torch.float32).expand(x.shape[0])
            output: Tensor = self.transformer(self.path.scale_input(x, t).to(dtype), times, moved)
            return output.float()

        straight, trained = CondOT(), as_velocity(network, self.path, self._prediction)
        return trained if self.path == straight else change_path(trained, old=self.path, new=straight)

    # ---------------------------------------------------------------- noise to latents to images

    def follow(
        self,
        velocity: Velocity,
        x: Tensor,
        steps: int,
        sigmas: list[float] | None,
        solver: str | None,
        generator: Generators | None,
        after_step: AfterStep,
    ) -> Tensor:
        """From noise to data, by our solvers or by the diffusers scheduler; ends early once interrupted."""

        def stepped(i: int, timestep: Tensor, y: Tensor) -> Tensor:
            y = after_step(i, timestep, y)
            if self._interrupt:
                raise _Interrupted(y)
            return y

        try:
            if self.scheduler is not None and solver is None:
                return self._follow_scheduler(velocity, x, steps, sigmas, generator, stepped)
            # Heun's last evaluation is at t = 1, where a velocity made from predicted data magnifies its errors.
            usual = "exponential-adams" if self._prediction == "data" else "heun"
            return self._follow_solver(velocity, x, steps, sigmas, solver or usual, generator, stepped)
        except _Interrupted as interrupted:
            return interrupted.latents

    def _follow_scheduler(
        self,
        velocity: Velocity,
        x: Tensor,
        steps: int,
        sigmas: list[float] | None,
        generator: Generators | None,
        after_step: AfterStep,
    ) -> Tensor:
        border.set_grid(self.scheduler, steps, sigmas, x.device)
        self._num_timesteps = len(self.scheduler.timesteps)
        return border.integrate_with_scheduler(
            self.scheduler,
            velocity,
            x,
            callback=lambda i, t, y: after_step(i, border.to_timestep(t), y),
            progress=self.progress_bar,
            generator=generator,
        )

    def _follow_solver(
        self,
        velocity: Velocity,
        x: Tensor,
        steps: int,
        sigmas: list[float] | None,
        solver: str,
        generator: Generators | None,
        after_step: AfterStep,
    ) -> Tensor:
        times = time_grid(steps) if sigmas is None else border.times_from_sigmas(sigmas)
        self._num_timesteps = len(times) - 1
        return integrate(
            velocity,
            x,
            times,
            solver,
            callback=lambda i, reached, y: after_step(i, border.to_timestep(times[i]), y),
            progress=self.progress_bar,
            generator=generator,
        )

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) float32, nominally in [-1, 1].

        An autoencoder that overflows in float16 (``force_upcast`` in its config) is widened meanwhile.

        Raises:
            UserError: no autoencoder is loaded.
        """
        if self.vae is None:
            raise UserError("the pipeline was loaded without its autoencoder", "Use output_type='latent'.")
        widen = self.vae.dtype == torch.float16 and bool(self.vae.config.get("force_upcast", False))
        if not widen:
            return decode(self.vae, latents)
        self.vae.to(torch.float32)
        try:
            return decode(self.vae, latents)
        finally:
            self.vae.to(torch.float16)

    def _output(self, latents: Tensor, output_type: str) -> Any:
        """Latents as the caller wants to have them."""
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(self.decode_latents(latents), output_type=output_type)

    @staticmethod
    def _check_output_type(output_type: str) -> None:
        kinds = ("pil", "np", "pt", "latent")
        if output_type not in kinds:
            raise unknown("output_type", output_type, kinds)

    # ---------------------------------------------------------------- saving and loading

    @classmethod
    def _get_signature_types(cls) -> dict[str, Any]:
        # from_pipe hands over a component only if its very class is named: name every network there is.
        return {**super()._get_signature_types(), "transformer": tuple(MODELS.values())}

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the pipeline folder; see ``diffusers.DiffusionPipeline.save_pretrained``."""
        # diffusers forgets a component that took the place of None (pipe.scheduler = ...): register it now.
        self.register_modules(**self.components)
        super().save_pretrained(save_directory, *args, **kwargs)
        for file in [Path(save_directory, self.config_name), *Path(save_directory).glob("*/config.json")]:
            _forget_origin(file)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a pipeline folder or hub id, safetensors only; see ``DiffusionPipeline.from_pretrained``.

        Raises:
            UserError: the folder holds no pipeline (one found inside it is named), or there is neither a
                folder nor a reachable hub repository of this name.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir() and not (folder / cls.config_name).is_file():
            inside = sorted(folder.glob(f"*/{cls.config_name}"))
            fix = f"Did you mean '{inside[0].parent}'?" if inside else "A run's pipeline is in RUN/pipeline."
            raise UserError(f"'{folder}' is not a pipeline folder: it holds no {cls.config_name}", fix)
        if not folder.is_dir() and len(folder.parts) != 2:
            raise UserError(f"no folder '{folder}'", "Check the path; a hub id has the form 'owner/name'.")
        kwargs.setdefault("use_safetensors", True)
        if not {"dtype", "torch_dtype"} & kwargs.keys():
            # diffusers' models widen half-precision files to float32 by default; transformers' do not.
            kwargs["dtype"] = torch.float32
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike[str], **kwargs: Any) -> str:
        """Fetch a hub repository's configs, tokenizer files and safetensors; return their local folder.

        diffusers' own download refuses repositories with components that are not its own. No code is fetched.

        Raises:
            UserError: the repository cannot be reached and is not in the local cache.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        handed_on = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        name = str(pretrained_model_name)
        try:
            return str(
                snapshot_download(
                    name,
                    allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"],
                    **{key: kwargs[key] for key in handed_on if kwargs.get(key) is not None},
                )
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"no folder '{name}', and no hub repository of that name could be fetched: {reason}",
                "Check the spelling and the network; offline, pass a folder that you have downloaded before.",
            ) from error


class _Interrupted(Exception):  # noqa: N818 - no error: the way out of any solver's loop
    def __init__(self, latents: Tensor) -> None:
        super().__init__("interrupted by a callback")
        self.latents = latents


def _repeated(
    embeds: Tensor | None, mask: Tensor | None, times: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Each row ``times`` times in place, on ``device``; a missing mask becomes all True."""
    if embeds is None:
        return None, None
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.to(torch.bool)
    return embeds.to(device).repeat_interleave(times, 0), mask.to(device).repeat_interleave(times, 0)


def _forget_origin(file: Path) -> None:
    """Remove the path that a component was loaded from: it tells strangers about this machine, and nothing else."""
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
