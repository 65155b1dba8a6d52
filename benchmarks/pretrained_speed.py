"""Seconds per image of a pretrained model through our pipeline and through its own, in one run.

    python benchmarks/pretrained_speed.py [--model 4b] [--side 1024] [--steps 4] [--rounds 5]
    python benchmarks/pretrained_speed.py --model tiny --side 64 --rounds 20     (no GPU)

The model has the shape of FLUX.2 klein and random weights, in bfloat16, with a short text encoder of its width. Both
pipelines hold the same components and take turns; each call goes from prompt to image, and their images of one seed are
compared. Prints the median seconds of both, the median ratio of each pair with its quartiles, and the peak memory of
each on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from latentflow import LatentFlowPipeline
from latentflow.families.flux2 import Flux2Model

PROMPT = "a red apple on a table"
#: double and single blocks, heads, width of the text encoder; three of its layers are stacked
SHAPES = {"4b": (5, 20, 24, 2560), "tiny": (1, 2, 2, 64)}
LAYERS = (1, 2, 3)


def stock_pipeline(model: str, device: torch.device) -> Any:
    """Return diffusers' pipeline of FLUX.2 klein with random weights."""
    layers, single, heads, width = SHAPES[model]
    words = models.WordLevel({word: i for i, word in enumerate(["<pad>", "<unk>", *PROMPT.split()])}, "<unk>")
    core = Tokenizer(words)
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    chat = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=512, pad_token="<pad>", unk_token="<unk>", chat_template=chat
    )
    text = transformers.Qwen3Config(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        head_dim=32,
    )
    channels = (128, 256, 512, 512) if model == "4b" else (8, 8, 8, 8)
    network: Any = diffusers.Flux2Transformer2DModel
    default, random = torch.get_default_dtype(), torch.random.get_rng_state()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            parts: dict[str, Any] = {
                "transformer": network(
                    num_layers=layers,
                    num_single_layers=single,
                    num_attention_heads=heads,
                    joint_attention_dim=3 * width,
                    guidance_embeds=False,
                ),
                "text_encoder": transformers.Qwen3ForCausalLM(text),
                "vae": diffusers.AutoencoderKLFlux2(
                    down_block_types=("DownEncoderBlock2D",) * 4,
                    up_block_types=("UpDecoderBlock2D",) * 4,
                    block_out_channels=channels,
                    norm_num_groups=min(channels[0], 32) // 2,
                ),
            }
    finally:
        torch.set_default_dtype(default)
        torch.random.set_rng_state(random)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.Flux2KleinPipeline(
        **{name: part.eval().to(device) for name, part in parts.items()},
        tokenizer=tokenizer,
        scheduler=scheduler,
        is_distilled=True,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(model: str, side: int, steps: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of both pipelines, the ratios of pairs, the largest difference of images and peak memories."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stock = stock_pipeline(model, device)
    ours = LatentFlowPipeline(Flux2Model(stock, text_encoder_out_layers=LAYERS))
    ours.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {
        "prompt": PROMPT, "height": side, "width": side, "num_inference_steps": steps, "output_type": "np",
    }  # fmt: skip

    def draw(name: str) -> Any:
        generator = torch.Generator("cpu").manual_seed(0)
        if name == "ours":
            return ours(**call, generator=generator).images
        return stock(**call, generator=generator, guidance_scale=1.0, text_encoder_out_layers=LAYERS).images

    seconds: dict[str, list[float]] = {"ours": [], "stock": []}
    peaks: dict[str, float] = {}
    images: dict[str, Any] = {}
    for turn in range(rounds + 1):  # the first warms up
        for name in ("ours", "stock") if turn % 2 else ("stock", "ours"):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            taken, images[name] = timed(lambda name=name: draw(name), device)  # type: ignore[misc]
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() / 1e9
            if turn:
                seconds[name].append(taken)
    ratios = [own / other for own, other in zip(seconds["ours"], seconds["stock"], strict=True)]
    difference = float(np.abs(images["ours"] - images["stock"]).max())
    return {"seconds": seconds, "ratios": ratios, "difference": difference, "peaks": peaks, "device": device}


def timed(draw: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds that a call takes on its device, and what it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    images = draw()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, images


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[*SHAPES], default="4b")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    found = measure(args.model, args.side, args.steps, args.rounds)
    for name in ("ours", "stock"):
        peak = f", peak memory {found['peaks'][name]:.1f} GB" if found["peaks"] else ""
        print(
            f"{name}: {statistics.median(found['seconds'][name]):.3f} s per image on {found['device']}{peak}"
        )
    low, middle, high = statistics.quantiles(found["ratios"], n=4)
    print(f"ours / stock: {middle:.3f} [{low:.3f}..{high:.3f}], largest difference {found['difference']:.2g}")


if __name__ == "__main__":
    main()
