"""Single files of the tiny checkpoints, in the layouts in which models are published."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Weights = dict[str, Tensor]

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write(weights: Weights, file: Path) -> Path:
    save_file({name: value.contiguous().clone() for name, value in weights.items()}, file)
    return file


def prefixed(weights: Weights, prefix: str) -> Weights:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def _renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if name.startswith(f"{old}."):
            return new + name[len(old) :]
    return name


def unet(network: Any) -> Weights:
    """Return a U-Net's weights as Stable Diffusion's authors name them."""
    per = network.config.layers_per_block + 1

    def place(name: str) -> str:
        found = re.match(r"(down|up|mid)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.*)", name)
        if not found:
            return _renamed(name, _UNET)
        side, block, kind, number, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
        if kind == "downsamplers":
            return f"input_blocks.{per * (block + 1)}.0.op{rest.removeprefix('conv')}"
        if kind == "upsamplers":
            there = 2 if hasattr(network.up_blocks[block], "attentions") else 1
            return f"output_blocks.{per * (block + 1) - 1}.{there}.{rest}"
        if kind == "resnets":
            rest = _renamed(rest, _RESNET)
        if side == "mid":
            return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}"
        first = per * block + number + (side == "down")
        return f"{'input' if side == 'down' else 'output'}_blocks.{first}.{int(kind == 'attentions')}.{rest}"

    return {place(name): value for name, value in network.state_dict().items()}


def vae(autoencoder: Any) -> Weights:
    """Return the weights of an ``AutoencoderKL`` as Stable Diffusion's authors name them."""
    last = len(autoencoder.config.block_out_channels) - 1

    def place(name: str) -> str:
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda found: f"up.{last - int(found[1])}.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{last - int(found[1])}.upsample", name
        )
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        if found := re.match(r"(.*)mid_block\.attentions\.0\.(.*)", name):
            return f"{found[1]}mid.attn_1.{_renamed(found[2], _ATTENTION)}"
        return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")

    return {place(name): value for name, value in autoencoder.state_dict().items()}


def clip(encoder: nn.Module) -> Weights:
    """Return a CLIP encoder's weights under ``text_model``, as older releases of transformers named all of them."""
    weights = encoder.state_dict()
    return {
        name if name.startswith("text_") else f"text_model.{name}": value for name, value in weights.items()
    }


_SD3 = {
    "pos_embed.proj": "x_embedder.proj", "pos_embed.pos_embed": "pos_embed",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear", "norm_out.linear": "final_layer.adaLN_modulation.1",
}  # fmt: skip
_SD3_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
}  # fmt: skip


def sd3(network: Any) -> Weights:
    """Return the weights of Stable Diffusion 3's network as its authors name and join them."""
    weights, found = dict(network.state_dict()), {}
    last = network.config.num_layers - 1
    for name in (
        "norm_out.linear",
        f"transformer_blocks.{last}.norm1_context.linear",
    ):  # (shift, scale) there
        for kind in ("weight", "bias"):
            weights[f"{name}.{kind}"] = torch.cat(weights[f"{name}.{kind}"].chunk(2)[::-1])
    for block in range(last + 1):
        inside = f"transformer_blocks.{block}.attn."
        for side, parts in {
            "x": ("to_q", "to_k", "to_v"),
            "context": ("add_q_proj", "add_k_proj", "add_v_proj"),
        }.items():
            for kind in ("weight", "bias"):
                joined = torch.cat([weights.pop(f"{inside}{part}.{kind}") for part in parts])
                found[f"joint_blocks.{block}.{side}_block.attn.qkv.{kind}"] = joined
    for name, value in weights.items():
        if block_of := re.match(r"transformer_blocks\.(\d+)\.(.*)", name):
            found[f"joint_blocks.{block_of[1]}.{_renamed(block_of[2], _SD3_BLOCK)}"] = value
        else:
            found["pos_embed" if name == "pos_embed.pos_embed" else _renamed(name, _SD3)] = value
    return found


def z_image(network: nn.Module) -> Weights:
    """Return the weights of Z-Image's network as ComfyUI's files have them."""
    weights = dict(network.state_dict())
    for name in [name for name in weights if name.endswith(".to_q.weight")]:
        parts = [weights.pop(name.replace("to_q", part)) for part in ("to_q", "to_k", "to_v")]
        weights[name.replace("to_q", "qkv")] = torch.cat(parts)
    for old, new in (
        ("all_final_layer.2-1.", "final_layer."), ("all_x_embedder.2-1.", "x_embedder."),
        (".attention.to_out.0.", ".attention.out."), (".attention.norm_", ".attention."),
    ):  # fmt: skip
        weights = {name.replace(old, new): value for name, value in weights.items()}
    renamed = {
        re.sub(r"attention\.([qk])\.weight", r"attention.\1_norm.weight", name): value
        for name, value in weights.items()
    }
    return prefixed(renamed, "model.diffusion_model.")


def whole(pipe: Any, network: Weights, **encoders: Weights) -> Weights:
    """Return a whole checkpoint: network, autoencoder, and text encoders by the prefix of their names."""
    found = {**prefixed(network, "model.diffusion_model."), **prefixed(vae(pipe.vae), "first_stage_model.")}
    for prefix, weights in encoders.items():
        found |= prefixed(weights, prefix.replace("__", "."))
    return found


def gguf(network: nn.Module, file: Path) -> Path:
    """Write a network in GGUF: its larger matrices in 8 bits, the rest as it is."""
    import gguf as library

    writer = library.GGUFWriter(file, "flux")
    for name, value in network.state_dict().items():
        array = value.float().numpy()
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            kind = library.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, library.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
