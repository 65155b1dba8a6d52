"""Answering requests of the web page: bounds of their values, images in, images out. Gradio is not used here."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import AdapterChoice, MemoryConfig
from ..errors import UserError, finite, unknown, whole
from ..inference.images import read_image
from ..inference.memory import decoder_options
from ..inference.opening import SHIPPED, local_folder, open_pipeline, with_run_adapter
from ..inference.sample import (
    BATCH,
    Capabilities,
    conditions,
    model_capabilities,
    read_capabilities,
    sample_images,
)
from .checkpoint_facts import FAST, LARGEST_WEIGHT, Card, checkpoint_name, offered_adapters, read_card

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_IMAGES = BATCH
MOST_STEPS = 200
MOST_GUIDANCE = 20.0
LONGEST_PROMPT = 1000
LARGEST_IMAGE = 4  # times the side that the checkpoint was trained at
CANVAS = 512  # pixels of the longer side of an uploaded image on the page
LARGEST_SEED = 2**32 - 1
MOST_OPEN = 2  # pipelines of our own that are kept, each with other adapters merged into its weights

#: Smallest and largest value, and type, of every number in a request.
BOUNDS: dict[str, tuple[float, float, type]] = {
    "images": (1, MOST_IMAGES, int),
    "seed": (0, LARGEST_SEED, int),
    "steps": (1, MOST_STEPS, int),
    "guidance": (0, MOST_GUIDANCE, float),
    "strength": (0, 1, float),
    "temperature": (0.05, 2, float),
    "corrector": (0, 10, float),
    "feather": (0, 32, int),
    "margin": (0, 64, int),
    "control_image_scale": (0, 10, float),
    "control_labels_scale": (0, 10, float),
    "lora_weight": (-LARGEST_WEIGHT, LARGEST_WEIGHT, float),
}

IMAGE_TO_IMAGE = "image-to-image"
#: the way to edit by instruction
REFERENCE = "reference"
#: Called with (steps done, all steps, description), and with previews of the images where there are any; an exception
#: that it raises ends the request.
Progress = Callable[..., None]


def number(name: str, value: Any) -> Any:
    """Return a number of a request, a whole one as an int.

    Raises:
        UserError: it is no number, not whole, or outside its bounds, which limit how long a request can take.
    """
    low, high, kind = BOUNDS[name]
    if kind is float:
        return finite(name, value, low, high)
    is_whole = isinstance(value, float) and value.is_integer()  # JavaScript has no other numbers
    return whole(name, int(value) if is_whole else value, int(low), int(high))


def text(name: str, value: Any) -> str | None:
    """Return a text of a request, or None.

    Raises:
        UserError: it is not text, or is too long.
    """
    if value is not None and not isinstance(value, str):
        raise UserError(f"{name} must be text", "Give it in quotation marks.")
    if len(value or "") > LONGEST_PROMPT:
        raise UserError(f"{name} has {len(value or '')} characters", f"At most {LONGEST_PROMPT}.")
    return value


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Values that every request has: the conditions, the number of images, and how they are sampled.

    Attributes:
        fast: use the checkpoint's few-step adapter.
        lora: (name, weight) of each adapter that is used; the names are those that the server offers.
        control_image, control_labels: uploads that lead what is drawn: an image, a label map.
        control_image_scale, control_labels_scale: guidance over each of them.
        temperature, corrector: of checkpoints that draw tokens.

    Raises:
        UserError: a number is outside its bounds, which are those of the page's sliders; or a text is invalid.
    """

    prompt: str | None = None
    class_label: str | None = None
    negative_prompt: str | None = None
    images: int = 1
    seed: int = 0
    steps: int = 20
    guidance: float = 4.0
    solver: str | None = None
    fast: bool = False
    lora: tuple[tuple[str, float], ...] = ()
    control_image: str | None = None
    control_labels: str | None = None
    control_image_scale: float = 1.0
    control_labels_scale: float = 1.0
    temperature: float = 1.0
    corrector: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.fast, bool):
            raise UserError("fast must be true or false")
        for name, value in vars(self).copy().items():
            if name not in ("fast", "lora"):
                checked = number(name, value) if name in BOUNDS else text(name, value)
                object.__setattr__(self, name, checked)  # whole numbers as int
        weights = tuple((name, number("lora_weight", weight)) for name, weight in self.lora)
        object.__setattr__(self, "lora", weights)


class InferenceServer:
    """A checkpoint that answers requests, one at a time.

    Pipelines are opened by the first request that needs them. Every method opens one before it imports anything: if
    two threads import torch or diffusers at once, one may see half a module, or both may wait for each other for
    ever.

    Args:
        checkpoint, device: as for ``open_pipeline``.
        adapters: adapters that are in use when the page is opened.
        lora_folder: folder whose adapters are offered as well.
        preview_vae: autoencoder with which a preview is decoded after each step; None: no previews.
        memory: as for ``open_pipeline``.

    Attributes:
        name: the checkpoint's name.
        card: facts from its model card.
        adapters: the adapters that visitors may choose, by name.
        has_fast: it has a few-step adapter.
        chosen: the adapters that are in use when the page is opened.
        capabilities: what the checkpoint takes with these.

    Raises:
        UserError: there is no such checkpoint or adapter.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        device: str = "auto",
        adapters: AdapterChoice | None = None,
        lora_folder: str | None = None,
        preview_vae: str | None = None,
        memory: MemoryConfig | None = None,
    ) -> None:
        self.name = checkpoint_name(str(SHIPPED) if checkpoint is None else checkpoint)
        checkpoint, adapters = with_run_adapter(checkpoint, adapters)
        flags, folder = adapters or AdapterChoice(), local_folder(checkpoint)
        self._checkpoint, self._device, self._flags, self._memory = checkpoint, device, flags, memory
        self.preview_vae = preview_vae
        self._previews: dict[str | None, Any] = {}
        self._opened: OrderedDict[AdapterChoice, Any] = OrderedDict()
        self._loading = threading.Lock()
        self._sampling = threading.Lock()  # pipelines and tokenizers are not safe in several threads
        self.card = Card() if folder is None else read_card(folder)
        self.adapters = offered_adapters(folder, flags.lora, lora_folder)
        self.has_fast = flags.fast or (folder is not None and (folder / FAST).is_dir())
        weights = [(name, offered.weight) for name, offered in self.adapters.items() if offered.chosen]
        self.chosen = self.choice(flags.fast, weights)
        adapted = self.chosen.fast or self.chosen.lora  # adapters may add classes
        known = None if adapted else read_capabilities(checkpoint)
        self.capabilities = known or model_capabilities(self.pipe.model)

    # ---------------------------------------------------------------- opening

    def choice(self, fast: bool, lora: Sequence[tuple[str, float]]) -> AdapterChoice:
        """Return the flags of ``latentflow generate`` for these adapters.

        Args:
            lora: name and weight of each.

        Raises:
            UserError: one of them is not offered, so that no other file is opened whatever a request names.
        """
        if fast and not self.has_fast:
            raise UserError("this checkpoint has no few-step adapter", "Switch it off.")
        for name, _ in lora:
            if name not in self.adapters:
                raise unknown("LoRA", name, self.adapters)
        texts = tuple(f"{self.adapters[name].source}:{weight}" for name, weight in lora)
        return replace(self._flags, fast=fast, lora=texts)

    def open(self, choice: AdapterChoice) -> Any:
        """Return the pipeline with these adapters in its weights, as ``latentflow generate`` opens it.

        It is opened anew, since adapters that are taken out of weights again leave rounding errors, and kept until
        others are chosen. The first takes half a minute on a slow machine.

        Raises:
            UserError: it cannot be loaded; adapters are called by their names, without the server's folders.
        """
        with self._loading:
            if choice not in self._opened:
                from ..pipeline import LatentFlowPipeline

                large = not all(hasattr(pipe, "merge_lora_weights") for pipe in self._opened.values())
                if len(self._opened) == (1 if large else MOST_OPEN):  # pretrained models are large
                    self._opened.popitem(last=False)
                try:
                    pipe = open_pipeline(
                        LatentFlowPipeline, self._checkpoint, self._device, choice, self._memory
                    )
                except UserError as error:
                    raise self._without_folders(error) from error
                self._opened[choice] = pipe
            self._opened.move_to_end(choice)
            return self._opened[choice]

    def _without_folders(self, error: UserError) -> UserError:
        what, fix = error.what, error.fix
        for name, offered in self.adapters.items():
            what, fix = what.replace(offered.source, name), fix.replace(offered.source, name)
        return UserError(what, fix)

    @property
    def pipe(self) -> Any:
        """Return the pipeline that was used last, or else that with the adapters of the flags.

        Raises:
            UserError: it cannot be loaded.
        """
        opened = next(reversed(self._opened), self.chosen)
        return self.open(opened)

    def capabilities_with(self, choice: AdapterChoice) -> Capabilities:
        """Return what the checkpoint takes with other adapters: some bring classes, or need few steps."""
        return model_capabilities(self.open(choice).model)

    @property
    def facts(self) -> list[str]:
        """Return what a visitor wants to know of the checkpoint, in short phrases."""
        model = self.pipe.model
        size = model.native_size
        labels = self.capabilities.labels
        return [
            *([f"{size[1]} x {size[0]} pixels"] if size else []),
            *(["text prompts"] if self.capabilities.text else []),
            *([f"{len(labels)} classes"] if labels else []),
            *([] if self.capabilities.condition else ["unconditional: takes no prompt"]),
            *(["trained to inpaint"] if self.capabilities.masks else []),
            *(["draws under control images"] if "image" in self.capabilities.control else []),
            *(["draws under label maps"] if "labels" in self.capabilities.control else []),
            *(["few-step adapter"] if self.has_fast else []),
        ]

    @property
    def _edits_by_words(self) -> bool:
        return self.capabilities.condition and self.capabilities.has_velocity

    @property
    def choices(self) -> dict[str, list[str]]:
        """Return the names of the solvers, and of the inpainting and editing methods that suit the checkpoint."""
        model = self.pipe.model
        from ..families.tokens import TokenModel
        from ..flow import EDITING, SOLVERS
        from ..flow.discrete.simulate import samplers_of
        from ..flow.inpainting import INPAINTING

        edits = [*(EDITING if self._edits_by_words else ()), IMAGE_TO_IMAGE]
        if self.capabilities.instructions:
            edits = [REFERENCE, *([] if self.capabilities.needs_images else edits)]
        if isinstance(model, TokenModel):
            return {"solver": samplers_of(model.token_path), "inpaint": [], "edit": edits}
        if not self.capabilities.has_velocity:
            return {"solver": [], "inpaint": ["pnp-flow"], "edit": edits}
        return {
            "solver": list(SOLVERS),
            "inpaint": [*(["trained"] if self.capabilities.masks else []), *INPAINTING],
            "edit": edits,
        }

    def unknown_words(self, request: GenerationRequest, *prompts: str | None) -> list[str]:
        """Return the words of prompts that the vocabulary of the request's pipeline lacks."""
        pipe = self.open(self.choice(request.fast, request.lora))
        found: list[str] = pipe.unknown_words([prompt for prompt in prompts if prompt])
        return found

    def opened(self, upload: str | None) -> tuple[Image, str]:
        """Open an uploaded image, upright, RGB or RGBA, and shrink it if it is too large for the checkpoint.

        Returns:
            The image, and a sentence if it was shrunk, else "".

        Raises:
            UserError: there is none; or it cannot be read, with the file's name without the server's folder.
        """
        pipe = self.pipe
        if upload is None:
            raise UserError("there is no image", "Upload one, or send one from another tab.")
        image = _read_upload(upload, read_image)
        trained = pipe.model.native_side or 64 * pipe.vae_scale_factor
        width, height = image.size
        image.thumbnail((LARGEST_IMAGE * trained, LARGEST_IMAGE * trained))
        shrunk = f"The image was reduced from {width} x {height} to {image.width} x {image.height} pixels."
        return image, shrunk if image.size != (width, height) else ""

    def control(self, kind: str, upload: str) -> Image:
        """Open an uploaded control image: RGB on white, or a label map as a palette image in its labels' colours.

        Raises:
            UserError: it cannot be read, with the file's name without the server's folder; a label map has labels that
                the checkpoint does not know.
        """
        labels = self.pipe.model.control_labels
        from ..data.images import decode_image, to_rgb
        from ..data.labels import read_label_ids, to_label_image

        if kind == "image":
            return to_rgb(_read_upload(upload, read_image))
        return _read_upload(
            upload, lambda path: to_label_image(read_label_ids(decode_image(path), labels), labels)
        )

    # ---------------------------------------------------------------- requests

    def generate(self, request: GenerationRequest, progress: Progress) -> list[Image]:
        """Generate images for a prompt or class."""
        return self._sample("LatentFlowPipeline", request, progress)

    def inpaint(
        self,
        request: GenerationRequest,
        progress: Progress,
        upload: str | None,
        strokes: list[str],
        *,
        method: str | None = None,
        strength: float = 1.0,
        feather: int = 0,
        margin: int = 0,
    ) -> list[Image]:
        """Repaint the part of an image that was painted over.

        Args:
            strokes: uploaded RGBA images of the canvas, opaque where it was painted over.
            margin: width in pixels of the surroundings that the network sees; 0: the whole image.
        """
        settings = {
            "method": text("method", method),
            "strength": number("strength", strength),
            "feather": number("feather", feather),
            "padding_mask_crop": number("margin", margin) or None,
        }
        image, _ = self.opened(upload)
        from ..data.images import decode_image

        mask = painted([_read_upload(stroke, decode_image) for stroke in strokes], image.size)
        if mask.getbbox() is None:
            raise UserError("nothing is painted over", "Paint over the area to replace.")
        kind = "LatentFlowInpaintPipeline"
        return self._sample(kind, request, progress, image=image, mask_image=mask, **settings)

    def edit(
        self,
        request: GenerationRequest,
        progress: Progress,
        upload: str | None,
        source: str,
        method: str | None,
        strength: float,
    ) -> list[Image]:
        """Edit an image.

        Args:
            source: prompt or class of the image as it is; "": unknown.
            method: one of ``choices["edit"]``; None: the pipeline's default, or image-to-image for a checkpoint
                without conditions or without a velocity.
            strength: not used by "reference".
        """
        text("source_prompt", source)
        text("method", method)
        settings: dict[str, Any] = {"strength": number("strength", strength), "image": self.opened(upload)[0]}
        if method == REFERENCE or (method is None and self.capabilities.instructions):
            del settings["strength"]
        if method == IMAGE_TO_IMAGE or not self._edits_by_words:
            return self._sample("LatentFlowImg2ImgPipeline", request, progress, **settings)
        if method in ("inversion", "direct"):  # they have no seed: more images would be equal
            request = replace(request, images=1)
        if source:
            classes = [source] if request.class_label else []
            pipe = self.open(self.choice(request.fast, request.lora))
            [shown] = conditions(pipe, [] if classes else [source], classes)
            settings |= {f"source_{name}": value for name, value in shown.items()}
        if method is not None:
            settings["method"] = method
        return self._sample("LatentFlowEditPipeline", request, progress, **settings)

    def _preview_decoder(self, pipe: Any) -> Any:
        """Return the autoencoder that decodes previews, or None.

        Raises:
            UserError: it cannot be loaded, or its latents are not the checkpoint's.
        """
        if self.preview_vae is None:
            return None
        with self._sampling:  # while it is tried, it decodes in the place of the checkpoint's own
            if self.preview_vae not in self._previews:
                from ..autoencoder import open_decoder

                self._previews[self.preview_vae] = open_decoder(
                    self.preview_vae,
                    pipe.vae,
                    pipe._execution_device,
                    **decoder_options(self._memory or MemoryConfig()),
                )
        return self._previews[self.preview_vae]

    def _sample(
        self, kind: str, request: GenerationRequest, progress: Progress, **settings: Any
    ) -> list[Image]:
        import latentflow

        choice = self.choice(request.fast, request.lora)
        if choice not in self._opened:
            progress(0, 1, "Loading the model")
        loaded = self.open(choice)  # before a pipeline class is imported
        labels, chosen = loaded.model.classes, request.class_label
        if labels and not self.capabilities.text and not chosen:
            some = ", ".join(labels[:10]) + (", ..." if labels[10:] else "")
            raise UserError("no class is chosen", f"Choose one: {some}.")
        pipe = getattr(latentflow, kind).from_pipe(loaded)
        pipe.set_progress_bar_config(disable=True)
        guided = loaded.model.few_steps.folded_guidance != 1.0  # it has learned a scale, and takes no other
        prompts = [request.prompt or ""] if self.capabilities.text and not chosen else []
        negative = request.negative_prompt if prompts else None  # a chosen class takes the place of both
        shown = conditions(pipe, prompts, [chosen] if chosen else [], negative or None)

        uploads = {"image": request.control_image, "labels": request.control_labels}
        controls = {kind: self.control(kind, upload) for kind, upload in uploads.items() if upload}
        if controls:
            settings["control_image"] = controls
            settings["control_scale"] = {kind: getattr(request, f"control_{kind}_scale") for kind in controls}
        if kind != "LatentFlowEditPipeline":
            settings |= {name: getattr(request, name) for name in self.capabilities.jump_settings}
        decoder = self._preview_decoder(loaded)

        def after_step(pipe: Any, i: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            predicted = None if decoder is None else tensors["prediction"]
            shown = () if predicted is None else (pipe.to_images(predicted, vae=decoder),)
            progress(i + 1, pipe.num_timesteps, "Generating", *shown)
            return {}

        with self._sampling:
            progress(0, 1, "Generating")
            return sample_images(
                pipe,
                shown * request.images,
                request.seed,
                num_inference_steps=request.steps,
                guidance_scale=None if guided else request.guidance,
                solver=request.solver,
                callback_on_step_end=after_step,
                callback_on_step_end_tensor_inputs=None if decoder is None else ["prediction"],
                **settings,
            )


def painted(strokes: list[Image], size: tuple[int, int]) -> Image:
    """Return the mask (mode "L", white where any stroke is) for an image of this size."""
    from PIL import Image, ImageChops

    mask = Image.new("L", size)
    for stroke in strokes:
        alpha = stroke.convert("RGBA").getchannel("A")
        mask = ImageChops.lighter(mask, alpha.resize(size, Image.Resampling.BOX))
    return mask.point(lambda level: 255 * (level >= 128))


def _read_upload(upload: str, read: Callable[[str], Image]) -> Image:
    """Read an upload; errors have the file's name without the server's folder."""
    if not Path(upload).is_file():  # the oldest uploads make room for new ones
        raise UserError(f"{Path(upload).name} is no longer stored", "Upload it again.")
    try:
        return read(upload)
    except UserError as error:
        folder = f"{Path(upload).parent}{os.sep}"
        raise UserError(error.what.replace(folder, ""), error.fix.replace(folder, "")) from error
