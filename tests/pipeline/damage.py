"""Damages to the files of a checkpoint: every component times every kind."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

ADAPTER = "fast/pytorch_lora_weights.safetensors"
INDEX = "model_index.json"
PLANTED = "planted_module"  # importing it leaves a trace

#: what may become of a damage: a sentence; the image of the undamaged checkpoint; a sentence, or an image that nobody
#: can tell from one of another, sound checkpoint
REFUSED, SAME, SOUND = "refused", "same", "sound"


@dataclass(frozen=True)
class Damage:
    """One damaged file.

    Attributes:
        name: for reports.
        file: within the checkpoint; a folder is removed.
        change: writes it anew, from what is there; it is a copy.
        outcome: one of the above.
    """

    name: str
    file: str
    change: Callable[[Path], None]
    outcome: str = REFUSED


def damaged_copy(checkpoint: Path, damage: Damage, to: Path) -> Path:
    """Return a copy of ``checkpoint`` in ``to``, of links but for the file that is damaged."""
    for file in checkpoint.rglob("*"):
        if file.is_file():
            (to / file.relative_to(checkpoint)).parent.mkdir(parents=True, exist_ok=True)
            if str(file.relative_to(checkpoint)) == damage.file:
                shutil.copy(file, to / damage.file)
            else:
                (to / file.relative_to(checkpoint)).symlink_to(file)
    damage.change(to / damage.file)
    return to


# ---------------------------------------------------------------- files of weights


class Trace:
    """Unpickled, it writes a file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.file, "w")


def _cut(share: float) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def _header(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = file.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = change(content[8 : 8 + size])
        file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])

    return damage


def _replace(old: bytes, new: bytes) -> Callable[[Path], None]:
    return _header(lambda header: header.replace(old, new, 1))


def file_damages(trace: Path) -> dict[str, Callable[[Path], None]]:
    payload = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, payload)
    return {
        "empty": lambda file: file.write_bytes(b""),
        "cut within the length": lambda file: file.write_bytes(file.read_bytes()[:5]),
        "cut within the header": lambda file: file.write_bytes(file.read_bytes()[:200]),
        "cut in half": _cut(0.5),
        "last byte missing": lambda file: file.write_bytes(file.read_bytes()[:-1]),
        "bytes appended": lambda file: file.write_bytes(file.read_bytes() + b"12345678"),
        "length of 2**60": lambda file: file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:]),
        "header is no JSON": _header(lambda header: b"{" + header[:-1]),
        "header nested": _header(lambda header: b'{"a":' * 3000 + b"1" + b"}" * 3000),
        "header is a list": _header(lambda header: b"[]"),
        "unknown type": _replace(b'"dtype":"F', b'"dtype":"Q'),
        "offsets moved": _replace(b'"data_offsets":[0,', b'"data_offsets":[4,'),
        "a pickle": lambda file: file.write_bytes(pickle.dumps(Trace(str(trace)))),
        "torch's own format": lambda file: file.write_bytes(payload.getvalue()),
        "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
        "missing": lambda file: file.unlink(),
    }


Tensors = dict[str, Tensor]


def _tensors(change: Callable[[Tensors, str], None], place: int = 0) -> Callable[[Path], None]:
    """Change the tensors, and name the one at ``place`` of those in their order."""

    def damage(file: Path) -> None:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        state = load_file(file)
        change(state, sorted(state)[place])
        save_file(state, file, metadata=metadata)

    return damage


def _renamed(state: Tensors, name: str) -> None:
    state[f"{name}x"] = state.pop(name)


def _swapped(state: Tensors, name: str) -> None:
    """Two tensors of different shape in each other's place."""
    other = next(key for key in state if state[key].shape != state[name].shape)
    state[name], state[other] = state[other], state[name]


def _value(value: float) -> Callable[[Tensors, str], None]:
    def change(state: Tensors, name: str) -> None:
        state[name] = state[name].clone()
        state[name].view(-1)[-1] = value

    return change


def _of_shape(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors, str], None]:
    return lambda state, name: state.update({name: change(state[name]).contiguous()})


def _all(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors, str], None]:
    return lambda state, _: state.update({name: change(one).contiguous() for name, one in state.items()})


TENSORS: dict[str, tuple[Callable[[Tensors, str], None], str]] = {
    "key renamed": (_renamed, REFUSED),
    "key missing": (lambda state, name: state.pop(name), REFUSED),
    "key added": (lambda state, name: state.update({f"{name}.more": torch.zeros(2)}), REFUSED),
    "two swapped": (_swapped, REFUSED),
    "one row more": (_of_shape(lambda one: torch.cat([one, one[:1]])), REFUSED),
    "one row less": (_of_shape(lambda one: one[:-1]), REFUSED),
    "one dimension more": (_of_shape(lambda one: one[None]), REFUSED),
    "empty": (_of_shape(lambda one: one[:0]), REFUSED),
    "a NaN": (_value(float("nan")), REFUSED),
    "an infinity": (_value(float("inf")), REFUSED),
    "whole numbers": (_of_shape(lambda one: one.to(torch.int32)), REFUSED),
    "truth values": (_of_shape(lambda one: one.bool()), REFUSED),
}
WHOLE: dict[str, tuple[Callable[[Tensors, str], None], str]] = {
    "all in int8": (_all(lambda one: (100 * one).to(torch.int8)), REFUSED),
    "all in float32": (_all(lambda one: one.float()), SAME),
    "all in float64": (_all(lambda one: one.double()), SAME),
    "all in float16": (_all(lambda one: one.half()), SOUND),
    "all in bfloat16": (_all(lambda one: one.bfloat16()), SOUND),
    "nothing": (lambda state, _: state.clear(), REFUSED),
    "keys of another network": (
        lambda state, _: [state.update({f"model.{name}": state.pop(name)}) for name in list(state)],
        REFUSED,
    ),
}


def _last_layer(state: Tensors, _: str) -> None:
    """Remove the layer of the highest number."""
    layers = {name.rpartition(".")[0] for name in state if any(part.isdecimal() for part in name.split("."))}
    last = max(layers, key=lambda name: [int(part) if part.isdecimal() else -1 for part in name.split(".")])
    for name in [name for name in state if name.startswith(last)]:
        del state[name]


def weight_damages(file: str, trace: Path, places: tuple[int, ...]) -> Iterator[Damage]:
    """Of a file of weights."""
    for name, change in file_damages(trace).items():
        yield Damage(name, file, change)
    for name, (of_tensors, outcome) in TENSORS.items():
        for place in places:
            yield Damage(f"{name} (tensor {place})", file, _tensors(of_tensors, place), outcome)
    for name, (of_tensors, outcome) in WHOLE.items():
        yield Damage(name, file, _tensors(of_tensors), outcome)
    yield Damage("last layer missing", file, _tensors(_last_layer))


# ---------------------------------------------------------------- JSON

JSON: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b'{"a": ',
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "nested": b'{"a":' * 3000 + b"1" + b"}" * 3000,
    "nested lists": b"[" * 100_000,
    "no settings": b"{}",
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
}


def json_damages(file: str) -> Iterator[Damage]:
    """Of a JSON file as a whole."""
    for name, content in JSON.items():
        loose = name == "no settings" and file.endswith("tokenizer_config.json")
        yield Damage(
            name, file, lambda path, content=content: path.write_bytes(content), SOUND if loose else REFUSED
        )
    yield Damage("missing", file, Path.unlink, SOUND if file.endswith("tokenizer_config.json") else REFUSED)


MISSING = object()


def setting(file: str, name: str, value: Any, outcome: str = REFUSED) -> Damage:
    """One setting changed, ``MISSING`` or new."""

    def change(path: Path) -> None:
        settings = json.loads(path.read_text())
        settings[name] = value
        if value is MISSING:
            del settings[name]
        path.write_text(json.dumps(settings))

    shown = "missing" if value is MISSING else repr(value)[:40]
    return Damage(f"{name} = {shown}", file, change, outcome)


WRONG = ("7", [7], {"a": 7}, None, -1, 0, 2**40, 10**12, 1.5, float("nan"))
NETWORK: dict[str, tuple[Any, ...]] = {
    "depth": (*WRONG, 10**9, 1, 100),
    "width": (*WRONG, 100, 17),
    "heads": ("4", [4], None, -1, 0, 10**12, 3),
    "in_channels": ("2", None, 0, 3, 10**9),
    "out_channels": ("2", 1, 1000, -5),
    "patch_size": ("1", 0, -1, 2, 10**6),
    "mlp_ratio": ("4", 0, -1.0, 2.0, 1e30, float("inf")),
    "norm": ("layers", 3, None, "layer"),
    "activation": ("relu", 3, "gelu"),
    "position": ("learned", None, 2),
    "qk_norm": (False, "yes", 1),
    "num_classes": (3, "3", 10**12),
    "text_dim": ("16", 8, 10**12, [16]),
    "condition_channels": (3, "0", -1, 10**12),
    "registers": (2, -1, 10**9, "1"),
    "time_scale": ("1000", float("nan"), 0.0, None),
    "sample_size": ("8", [8], [8, 8, 8], 10**9, -4, 0, {"a": 8}),
    "size_conditioning": (True, "no"),
    "interval_conditioning": (True, None, 0),
    "unheard_of": (1,),
    "_class_name": ("UNet", "AutoencoderKL", "os.system", 3, None),
    "quantization_config": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 4),
}
VAE: dict[str, tuple[Any, ...]] = {
    "latents_std": ([0.0, 0.0], [1.0], "1", ["a", "b"], [float("nan")] * 2, [-1.0, 1.0], 2.0, {}, MISSING),
    "latents_mean": ([0.0], "0", [float("inf")] * 2, [[0.0]], 10**400 - 1, "x", MISSING),
    "scaling_factor": ("1", 0.0, float("nan"), [1.0], -1.0),
    "latent_channels": (3, "2", None, [2], 10**12, -2, 0),
    "in_channels": ("3", 4, 10**12, None),
    "_class_name": ("AutoencoderTiny", "VQModel", "DiT", "system", 7, None),
    "quantization_config": ({"quant_method": "quanto"},),
}
TEXT: dict[str, tuple[Any, ...]] = {
    "d_model": ("192", 64, 10**12, None, [192], -1),
    "d_ff": (100, "384", 10**12, 0),
    "d_kv": (7, 10**12, "48"),
    "num_layers": (1, 3, 10**9, "2", -1, None),
    "num_heads": (3, 10**12, 0, "4"),
    "vocab_size": (10, 10**12, "1498", -1),
    "relative_attention_num_buckets": (8, "32", 0, 10**12),
    "feed_forward_proj": ("relu", 3, "gated-unheard", None),
    "model_type": ("bert", "unheard-of", 3, None, "clip"),
    "layer_norm_epsilon": ("x", [1]),
    "quantization_config": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "gptq", "bits": 4},
    ),
}
PIPELINE: dict[str, tuple[Any, ...]] = {
    "_class_name": ("StableDiffusionPipeline", "FluxPipeline", "os.system", 3, None, MISSING, ["LatentFlowPipeline"]),
    "id2label": ({"0": "cat"}, ["cat"], "cat", {"a": "cat"}, {"0": 1}, {"-1": "cat"}),
    "path": ("unheard-of", 3, None, ["condot"]),
    "path_options": ({"sigma_min": "a"}, {"unheard": 1.0}, [1], "a", {"sigma_min": float("nan")}, None),
    "prediction": ("unheard-of", 3, None),
    "coupling": ("unheard-of", 3, None),
    "average": ("yes", 1),
    "consistency": (True, "no"),
    "folded_guidance": ("4", float("nan"), [4.0]),
    "usual_guidance": ("4", float("nan"), [4.0]),
    "trained_null": ("no", 3),
    "time_density": ("unheard-of", 3, ["beta"]),
    "time_options": ({"mean": "a"}, {"unheard": 1.0}, [1], "a"),
    "step_counts": ("4", [0], ["4"], [10**9], 4, {"a": 1}),
    "unheard_of": (1,),
    "transformer": (
        [None, None], None, MISSING, "DiT", ["DiT"], ["latentflow.models.dit", "UNet"], ["os", "system"],
        ["unheard.of", "DiT"], [PLANTED, "DiT"], ["diffusers", "UNet2DModel"], ["diffusers", 3], [3, "DiT"],
        ["transformers", "T5EncoderModel"], ["subprocess", "Popen"], ["diffusers", "ModelMixin"], {"a": "b"}, 3,
    ),
    "vae": ("AutoencoderKL", ["diffusers", "AutoencoderTiny"], ["os", "system"], [PLANTED, "A"], 3),
    "text_encoder": (["transformers", "BertModel"], ["os", "system"], [PLANTED, "A"], ["transformers", "pipeline"], 3),
    "tokenizer": (["os", "system"], [PLANTED, "A"], ["transformers", "T5EncoderModel"], 3, ["transformers", "unheard"]),
    "scheduler": (
        ["diffusers", "DDIMScheduler"], ["os", "system"], [PLANTED, "A"],
        ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    ),
}  # fmt: skip
TOKENIZER: dict[str, tuple[Any, ...]] = {
    "model_max_length": ("32", 0, -1, None, [32]),
    "pad_token": (7, ["a"], {"a": 1}),
    "unk_token": (7,),
    "model_input_names": (["input_ids"], "input_ids", 3),
    "padding_side": ("up", 3),
}
# What no file contradicts: the libraries read it all the same, or no weight depends on it, so that it is a checkpoint
# of its own.
SOUNDS = {
    "path_options": (None,),
    "norm": ("layer",),
    "feed_forward_proj": ("relu", "gated-unheard"),
    "model_max_length": (None,),
}


def _vocabulary(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return damage


def tokenizer_damages(file: str) -> Iterator[Damage]:
    """Of tokenizer.json."""
    yield Damage("cut in half", file, _cut(0.5))
    for name, content in JSON.items():
        yield Damage(name, file, lambda path, content=content: path.write_bytes(content))
    for name, change in {
        "a token beyond the embedding": lambda doc: doc["model"]["vocab"].update(red=10**6),
        "a token of a string": lambda doc: doc["model"]["vocab"].update(red="1"),
        "a token below 0": lambda doc: doc["model"]["vocab"].update(red=-1),
        "unknown model": lambda doc: doc["model"].update(type="Unheard"),
        "no model": lambda doc: doc.pop("model"),
        "model is a list": lambda doc: doc.update(model=[]),
        "words beyond the embedding": lambda doc: doc["model"]["vocab"].update(
            {f"word{n}": 5000 + n for n in range(9)}
        ),
    }.items():
        yield Damage(name, file, _vocabulary(change))


def _metadata(name: str, value: Any) -> Callable[[Path], None]:
    """Change a setting of an adapter's file."""

    def damage(file: Path) -> None:
        with safe_open(file, "pt") as opened:
            metadata = dict(opened.metadata())
        key, _, inner = name.partition("/")
        document = json.loads(metadata[key]) if inner else value
        if inner and value is MISSING:
            del document[inner]
        elif inner:
            document[inner] = value
        metadata[key] = document if isinstance(document, str) else json.dumps(document)
        save_file(load_file(file), file, metadata=metadata)

    return damage


THEIRS, OURS = "lora_adapter_metadata", "latentflow"
METADATA: dict[str, tuple[Any, ...]] = {
    THEIRS: ("", "[", "[]", "3", "[" * 3000),
    OURS: ("", "[]", "3", '{"base": 3}', "[" * 3000, '{"unheard_of": 1}'),
    f"{THEIRS}/transformer.r": ("32", 3, 0, -1, None, 10**12, MISSING, [32]),
    f"{THEIRS}/transformer.lora_alpha": ("32", 0, float("nan"), None, MISSING, [3], -5),
    f"{THEIRS}/transformer.rank_pattern": ([3], {"qkv": 5}, {"qkv": "5"}, {"(": 4}, "a"),
    f"{THEIRS}/transformer.alpha_pattern": ([3], {"qkv": "5"}, {"(": 4}, 3),
    f"{THEIRS}/transformer.target_modules": (3, {"a": 1}, ["qkv", "t_embedder.mlp.0"]),
    f"{THEIRS}/transformer.use_dora": (True, "yes", 1),
    f"{OURS}/few_steps": (
        {"average": "yes"},
        {"unheard": 1},
        {"step_counts": [0]},
        {"folded_guidance": "a"},
        3,
    ),
    f"{OURS}/words": (["red"], "red", [3]),
    f"{OURS}/base": ({"float32": "another"}, []),
}


def _half(end: str, place: int) -> Callable[[Path], None]:
    def change(state: Tensors, _: str) -> None:
        del state[sorted(name for name in state if name.endswith(end))[place]]

    return _tensors(change)


def _other_rank(end: str, dim: int) -> Callable[[Path], None]:
    def change(state: Tensors, _: str) -> None:
        name = sorted(name for name in state if name.endswith(end))[0]
        state[name] = state[name].narrow(dim, 0, 1).contiguous()

    return _tensors(change)


def adapter_damages(file_of: Path, file: str, trace: Path, places: tuple[int, ...]) -> Iterator[Damage]:
    """Of an adapter's file."""
    yield from weight_damages(file, trace, places)
    for place in places:
        for end in ("lora_A.weight", "lora_B.weight"):
            yield Damage(f"{end} missing (layer {place})", file, _half(end, place))
    # A file of others says nothing beside its tensors: scale 1, and no intervals.
    plain = not any(name.startswith("added.") for name in load_file(file_of))
    yield Damage(
        "no metadata", file, lambda path: save_file(load_file(path), path), SOUND if plain else REFUSED
    )
    yield Damage("another rank of lora_A", file, _other_rank("lora_A.weight", 0))
    yield Damage("another rank of lora_B", file, _other_rank("lora_B.weight", 1))
    for name, values in METADATA.items():
        for value in values:
            shown = "missing" if value is MISSING else repr(value)[:40]
            yield Damage(f"{name} = {shown}", file, _metadata(name, value))


def all_damages(
    checkpoint: Path, trace: Path, places: tuple[int, ...] = (0,), *, brief: bool = False
) -> list[Damage]:
    """Every component times every kind.

    Args:
        checkpoint: with captions and an adapter in ``fast``.
        trace: a file that code writes which is executed.
        places: of the tensors that are changed, among those of a file in their order.
        brief: of each setting two values at most.
    """
    found: list[Damage] = []
    weights = [str(one.relative_to(checkpoint)) for one in sorted(checkpoint.glob("*/*.safetensors"))]
    for file in weights:
        if file == ADAPTER:
            found += adapter_damages(checkpoint / file, file, trace, places)
        else:
            found += weight_damages(file, trace, places)
    tables = {
        INDEX: PIPELINE,
        "transformer/config.json": NETWORK,
        "vae/config.json": VAE,
        "text_encoder/config.json": TEXT,
        "tokenizer/tokenizer_config.json": TOKENIZER,
    }
    for file, table in tables.items():
        found += json_damages(file)
        settings = json.loads((checkpoint / file).read_text())
        for name, values in table.items():
            for value in (values[0], values[-1]) if brief and len(values) > 2 else values:
                if settings.get(name) != value and not (value is MISSING and name not in settings):
                    sound = any(value is one or value == one for one in SOUNDS.get(name, ()))
                    found.append(setting(file, name, value, SOUND if sound else REFUSED))
    found += tokenizer_damages("tokenizer/tokenizer.json")
    for folder in ("transformer", "vae", "text_encoder", "tokenizer"):
        found.append(Damage("folder missing", folder, lambda path: shutil.rmtree(path)))
    return found
