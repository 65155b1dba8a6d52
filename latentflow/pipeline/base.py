"""The common part of latentflow's pipelines: components, noise and size of a call, and its output."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, ModelMixin, VQModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..autoencoder import downscale_factor
from ..errors import UserError
from ..families.few_steps import FewSteps
from ..families.model import Generators, Size
from .adapters import AdapterMixin
from .arguments import CALLBACK_TENSORS, output_kind
from .conditioning import ConditionMixin
from .loading import CheckpointPipeline, check_components


class FlowPipeline(ConditionMixin, AdapterMixin, CheckpointPipeline):
    """The common part of the pipelines; not called itself.

    What a checkpoint is conditioned on, and how it is sampled, is asked of its `model`.

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
        coupling: the coupling that it was trained with, a key of ``latentflow.flow.COUPLINGS``. "data-dependent" means
            that inpainting starts from the known latents, with noise in the hole only (arXiv:2310.03725).
        average: the network predicts average velocities (arXiv:2505.13447): by default they lead from time to time of
            the grid, one evaluation a step. A solver that is named integrates its velocities.
        consistency: those average velocities lead to the data only: between steps noise is added again.
        folded_guidance: scale of the guidance that was learned along; where it is not 1, none is added.
        step_counts: the numbers of steps, of one evaluation each, that the network was made for, in increasing order;
            by default the last is taken, and another is warned of. Empty: 4 steps of average velocities, and no
            few-step sampling of other networks.

    Raises:
        UserError: components that do not belong together, or settings that are none.
    """

    model_cpu_offload_seq: Any = "text_encoder->transformer->vae"
    _callback_tensor_inputs: ClassVar[list[str]] = CALLBACK_TENSORS
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
        coupling: str = "independent",
        average: bool = False,
        consistency: bool = False,
        folded_guidance: float = 1.0,
        step_counts: list[int] | None = None,
    ) -> None:
        super().__init__()
        check_components(vae, transformer, text_encoder, tokenizer, id2label)
        components = {"text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler}
        self.register_modules(vae=vae, transformer=transformer, **components)
        few = FewSteps(
            average=average,
            consistency=consistency,
            folded_guidance=folded_guidance,
            step_counts=tuple(step_counts or ()),
        )
        # Keys as JSON has them, so that the config is the same before and after saving.
        names = None if id2label is None else {str(key): name for key, name in id2label.items()}
        self.register_to_config(
            id2label=names,
            path=path,
            path_options=dict(path_options or {}),
            prediction=prediction,
            coupling=coupling,
            **few.plain(),
        )
        self.vae_scale_factor = downscale_factor(vae) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        _ = self.model  # refuses settings that are none

    def prepare_noise(
        self, count: int, height: int, width: int, generator: Generators | None, latents: Tensor | None
    ) -> Tensor:
        """Return the noise (B, C, h, w) of ``count`` images, float32; or ``latents``.

        Raises:
            UserError: generators or latents that do not fit.
        """
        self.check_noise(count, height, width, generator, latents)
        if latents is not None:
            return latents.to(self._execution_device, torch.float32)
        return self.model.noise(count, height, width, generator)

    def image_size(
        self, height: int | None = None, width: int | None = None, latents: Tensor | None = None
    ) -> Size:
        """Return height and width in pixels: as asked for, else of the given latents, else as in training.

        Raises:
            UserError: none of these is known.
        """
        native = self.model.native_size
        if latents is not None:
            native = latents.shape[-2] * self.vae_scale_factor, latents.shape[-1] * self.vae_scale_factor
        if native is None:
            if height is None or width is None:
                raise UserError("this checkpoint does not say its size", "Pass height and width.")
            return height, width
        return native[0] if height is None else height, native[1] if width is None else width

    def canvas_size(self, size: Size) -> Size:
        """Return ``size`` in pixels, rounded up to what the autoencoder and the network's patches divide."""
        unit = self.model.size_multiple
        return -(-size[0] // unit) * unit, -(-size[1] // unit) * unit

    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents; see `FlowModel.encode`."""
        return self.model.encode(images)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W); see `FlowModel.decode`."""
        return self.model.decode(latents)

    def to_images(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Return latents as a caller wants to have them: "pil", "np", "pt" or "latent".

        In a callback that asks for "prediction", ``pipe.to_images(tensors["prediction"])`` is a preview: the images
        that the flow is heading for.
        """
        output_kind("output_type", output_type)
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(self.decode_latents(latents), output_type=output_type)

    def output_images(self, latents: Tensor, output_type: str, size: Size) -> Any:
        """Return latents as a caller wants to have them, cropped to ``size``, the height and width of the images."""
        if output_type == "latent":
            return latents
        images = (self.decode_latents(latents) / 2.0 + 0.5).clamp(0.0, 1.0)
        return self.to_output(images[:, :, : size[0], : size[1]], output_type)

    def to_output(self, images: Tensor, output_type: str) -> Any:
        """Return images (B, 3, H, W) in [0, 1] as a caller wants to have them: "pil", "np" or "pt"."""
        return self.image_processor.postprocess(images, output_type, do_denormalize=[False] * len(images))

    def finish_call(self, images: Any, return_dict: bool) -> Any:
        """Return what a call returns, and let go of the components that were brought to the device."""
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
