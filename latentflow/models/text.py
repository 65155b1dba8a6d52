"""Text encoders: a small tokenizer and encoder trained on the data, or those of a transformers model."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipTextModel,
    T5Config,
    T5EncoderModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

from ..errors import UserError, reading
from ..utils.components import library_reads, load_transformers_model, may_be_on_the_hub
from ..utils.files import MEND, read_settings
from ..utils.placement import execution_device
from ..utils.words import is_punctuation, known_words, missing_words, with_guess

PAD, UNKNOWN, START = "[PAD]", "[UNK]", "[START]"


def train_tokenizer(
    captions: Iterable[str], max_length: int = 32, vocab_size: int = 30_000
) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose vocabulary is the words and punctuation marks of ``captions``, in lower case.

    Words beyond ``vocab_size`` (the rarest) and unseen words are spelled in known beginnings and single
    characters (WordPiece); a word with a character never seen is [UNK]. Every text begins with [START], so
    that no text is empty. The same captions in any order give the same tokenizer.

    Raises:
        UserError: the captions hold no word.
    """
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.BertPreTokenizer()
    words = Counter(
        word for text in captions for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    )
    if not words:
        raise UserError("the captions hold no word to train a tokenizer on", "Give captions with words.")
    characters = sorted({character for word in words for character in word})
    spelling = [*characters, *(f"##{character}" for character in characters)]
    # dict.fromkeys: each word once, at its first place.
    by_frequency = sorted(words, key=lambda word: (-words[word], word))
    room = max(0, vocab_size - 3 - len(spelling))
    vocabulary = list(dict.fromkeys([PAD, UNKNOWN, START, *spelling, *by_frequency[:room]]))

    tokenizer = Tokenizer(
        models.WordPiece(vocab={word: index for index, word in enumerate(vocabulary)}, unk_token=UNKNOWN)
    )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, vocabulary.index(START))]
    )
    tokenizer.decoder = decoders.WordPiece()
    return _fast(tokenizer, max_length)


def with_words(tokenizer: PreTrainedTokenizerFast, words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `train_tokenizer` with ``words`` added: their ids follow the existing ones."""
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = document["model"]["vocab"]
    for word in words:
        vocabulary.setdefault(word, len(vocabulary))
    return _fast(Tokenizer.from_str(json.dumps(document)), tokenizer.model_max_length)


def _fast(tokenizer: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=START,
        model_max_length=max_length,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def small_text_encoder(
    tokenizer: PreTrainedTokenizerFast, width: int = 256, depth: int = 2, heads: int = 4
) -> PreTrainedModel:
    """Make a small encoder with random weights, to be trained together with the velocity network.

    T5's encoder (arXiv:1910.10683), because it starts well: normalised before every layer, so it needs no
    warm-up of its own; word embeddings of unit variance, so that words differ from the first step on; a
    last norm, so that the velocity network receives embeddings of a constant scale. The position biases start
    large, so that the heads attend to different places from the first step; with T5's own, near zero, the order of
    the words ("a circle above a square") was learnt last. No dropout: a text always has the same embedding.

    Raises:
        UserError: ``width`` is not a multiple of ``heads``.
    """
    if width % heads:
        raise UserError(f"text width {width} is not a multiple of {heads} heads", "Change one of the two.")
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // heads,
        d_ff=2 * width,
        num_layers=depth,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=None,
        use_cache=False,
    )
    encoder = T5EncoderModel(config)
    for name, parameter in encoder.named_parameters():
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    return encoder


def load_tokenizer(kind: Any, source: str | Path, shown: str = "", fix: str = MEND, **where: str) -> Any:
    """Load a tokenizer that can make batches: it pads, and masks the padding.

    Args:
        kind: its class in transformers, or AutoTokenizer.
        source: folder or hub id.
        shown: what it is called in errors; default: the folder.
        fix: what the user can do if it cannot be read.
        where: ``subfolder``.

    Raises:
        UserError: a file of it is damaged or missing, or it cannot make batches.
    """
    folder = Path(source, where.get("subfolder", ""))
    shown = shown or str(folder)
    if not folder.is_dir() and not may_be_on_the_hub(str(source)):
        raise UserError(f"{shown} cannot be read: there is no such folder", fix)
    if folder.is_dir():
        _check_tokenizer_files(folder)
    with library_reads(shown, fix=fix):
        tokenizer = kind.from_pretrained(source, trust_remote_code=False, **where)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    limit = tokenizer.model_max_length
    if type(limit) not in (int, float) or not limit >= 1:
        raise UserError(f"{shown}: model_max_length is {limit!r}", f"Expected: a number of tokens. {MEND}")
    with library_reads(shown, fix=fix):
        tokens = tokenizer(["a", "a a"], padding=True, truncation=True, max_length=min(limit, 8))
    if not {"input_ids", "attention_mask"} <= tokens.keys():
        raise UserError(f"{shown} makes {', '.join(tokens)}, not input_ids and attention_mask", MEND)
    return tokenizer


def _check_tokenizer_files(folder: Path) -> None:
    for file in sorted(folder.glob("*.json")):
        if file.name == "tokenizer.json":
            with reading(file, Exception, fix=MEND):  # tokenizers raises nothing more particular
                Tokenizer.from_file(str(file))
        elif file.name.startswith(("tokenizer", "special_tokens", "added_tokens")):
            read_settings(file)


def check_vocabulary(tokenizer: Any, encoder: PreTrainedModel) -> None:
    """Refuse a tokenizer that makes tokens for which the text encoder has no embedding.

    Raises:
        UserError: it does; both sizes are named.
    """
    largest = max(tokenizer.get_vocab().values(), default=0)
    rows = encoder.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise UserError(
            f"the tokenizer and the text encoder do not belong together: it makes tokens up to number {largest}, the "
            f"encoder has embeddings of {rows}",
            "Restore the checkpoint's folders tokenizer and text_encoder from one and the same source.",
        )


# Models of images and text, of which only the text half is loaded.
_TEXT_HALVES: dict[str, Any] = {"clip": CLIPTextModel, "siglip": SiglipTextModel}


def _text_family(config: Any) -> Any:
    if config.model_type in _TEXT_HALVES:
        return _TEXT_HALVES[config.model_type]
    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def load_text_encoder(name_or_path: str | Path) -> tuple[Any, PreTrainedModel]:
    """Load the tokenizer and the encoder of a transformers model (CLIP, T5, BERT, ...), by hub id or folder.

    A diffusers pipeline folder, with ``tokenizer/`` and ``text_encoder/`` inside, works as well. The encoder
    is in evaluation mode, in float32.

    Raises:
        UserError: the model cannot be found or read, or is not a text model; weights are missing, of another shape or
            not finite; the tokenizer knows more tokens than the encoder.
    """
    name = str(name_or_path)
    parts: tuple[dict[str, str], dict[str, str]] = ({}, {})
    if (Path(name) / "text_encoder").is_dir():
        parts = ({"subfolder": "tokenizer"}, {"subfolder": "text_encoder"})
    shown = f"the text encoder '{name}'"
    fix = (
        "Give a transformers model: a folder, or a hub id. Without a network, download it where there is "
        f"one (`hf download {name}`) and give that folder, or leave the option out to train a small one."
    )
    tokenizer = load_tokenizer(AutoTokenizer, name, shown, fix, **parts[0])
    encoder = load_transformers_model(
        name, shown, _text_family, fix=fix, **parts[1], other_parts=True, dtype=torch.float32
    )
    check_vocabulary(tokenizer, encoder)
    return tokenizer, encoder


def encode_text(
    tokenizer: Any, encoder: PreTrainedModel, prompts: list[str], max_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Encode prompts: token embeddings (B, L, D) and their mask (B, L), True = token, L that of the longest prompt.

    Gradients flow into ``encoder`` unless the caller disables them. A prompt longer than ``max_length`` (None =
    what the tokenizer and the encoder can take) is cut, with a warning.
    """
    limit = max_length or _longest(tokenizer, encoder)
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
    if tokens["input_ids"].shape[1] == limit and (
        cut := sum(len(ids) > limit for ids in tokenizer(prompts, verbose=False)["input_ids"])
    ):
        warnings.warn(f"{cut} of {len(prompts)} prompts exceed {limit} tokens and were cut", stacklevel=2)
    device = execution_device(encoder)
    ids, mask = (tokens[name].to(device) for name in ("input_ids", "attention_mask"))
    embeddings: Tensor = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return embeddings, mask.bool()


class UnknownWords(UserWarning):
    """A prompt holds words that the checkpoint has never seen."""


def unknown_words(tokenizer: Any, texts: Iterable[str]) -> list[str]:
    """Return the words of ``texts`` that the tokenizer does not know, each once.

    For a tokenizer of `train_tokenizer` they are the words that it has to spell, since the network trained with it
    has not learnt what they mean; for others, the words with an unknown token (none for a byte-level one).
    """
    if _is_ours(tokenizer):
        return missing_words(tokenizer.backend_tokenizer, texts)
    found: dict[str, None] = {}
    for text in texts:
        words = text.split() if tokenizer.unk_token_id is not None else []
        tokens = tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
        missing = [word for word, ids in zip(words, tokens, strict=True) if tokenizer.unk_token_id in ids]
        found |= dict.fromkeys(word for word in missing if not is_punctuation(word))
    return list(found)


def with_guesses(tokenizer: Any, words: Iterable[str]) -> list[str]:
    """Return ``words`` in quotes, with the known word that each may misspell for a tokenizer of `train_tokenizer`."""
    known = known_words(tokenizer.backend_tokenizer) if _is_ours(tokenizer) else []
    return [with_guess(word, known) for word in words]


def _is_ours(tokenizer: Any) -> bool:
    return getattr(tokenizer, "bos_token", None) == START and tokenizer.is_fast


def _longest(tokenizer: Any, encoder: PreTrainedModel) -> int:
    positions = getattr(encoder.config, "max_position_embeddings", None) or 512
    return int(min(tokenizer.model_max_length, positions))
