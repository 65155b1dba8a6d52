"""Captions become the same tokens and embeddings wherever and however often they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from latentflow.errors import UserError
from latentflow.models import encode_text, load_text_encoder, small_text_encoder, train_tokenizer, with_words
from latentflow.models.text import unknown_words

CAPTIONS = ["a red circle left of a blue square", "Waving hand: medium-light skin tone", "a red apple!"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(CAPTIONS, max_length=12)


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    return small_text_encoder(tokenizer, width=16, depth=2, heads=2)


def test_every_word_and_mark_of_the_captions_is_one_token(tokenizer: Any) -> None:
    expected = ["waving", "hand", ":", "medium", "-", "light", "skin", "tone"]
    assert tokenizer.tokenize(CAPTIONS[1]) == expected
    assert tokenizer.decode(tokenizer("A RED  apple").input_ids, skip_special_tokens=True) == "a red apple"


def test_an_unseen_word_is_spelled_from_known_pieces(tokenizer: Any) -> None:
    assert tokenizer.tokenize("reddish") == ["red", "##d", "##i", "##s", "##h"]
    assert tokenizer.tokenize("red ☃ apple") == ["red", "[UNK]", "apple"]

    assert tokenizer("").input_ids == tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]  # never none


def test_the_vocabulary_does_not_depend_on_the_order_of_captions_and_keeps_the_frequent_words(
    tokenizer: Any,
) -> None:
    assert train_tokenizer(CAPTIONS[::-1], max_length=12).get_vocab() == tokenizer.get_vocab()
    small = train_tokenizer(["ab ab ab ba", "ab aab"], vocab_size=8)  # 3 special, 4 for a and b, one word
    assert small.tokenize("ab ba") == ["ab", "b", "##a"]
    with pytest.raises(UserError, match="hold no word"):
        train_tokenizer(["", "  "])


def test_a_tokenizer_survives_saving(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "A reddish apple, left of a hand"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert (again.model_max_length, again.bos_token) == (12, tokenizer.bos_token)


def test_an_embedding_does_not_depend_on_its_neighbours_in_the_batch(tokenizer: Any, encoder: Any) -> None:
    alone, _ = encode_text(tokenizer, encoder, ["a red apple!"])
    together, mask = encode_text(tokenizer, encoder, ["a red apple!", CAPTIONS[0], ""])
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [5, 9, 1]
    torch.testing.assert_close(together[:1, :5], alone, rtol=1e-4, atol=1e-5)
    assert together.isfinite().all()


def test_word_order_shows_from_the_first_step_and_dropout_does_not(tokenizer: Any, encoder: Any) -> None:
    encoder.train()
    first, _ = encode_text(tokenizer, encoder, ["red left of blue"])
    assert torch.equal(first, encode_text(tokenizer, encoder, ["red left of blue"])[0])
    # With T5's own, nearly flat position biases this is 0.04 to 0.06, and models of `shapes` mixed up "a above b" and
    # "b above a" for as long as they were trained.
    captions = ["a red circle above a blue square", "a blue square above a red circle"]
    words = train_tokenizer(captions)
    for seed in range(5):
        torch.manual_seed(seed)
        embeddings, mask = encode_text(words, small_text_encoder(words, 64, 2, 4), captions)
        assert mask.all()
        pooled = embeddings.detach().mean(1)
        assert (pooled[0] - pooled[1]).norm() / pooled.norm(dim=1).mean() > 0.2


def test_embeddings_start_at_unit_scale_and_gradients_reach_every_weight(
    tokenizer: Any, encoder: Any
) -> None:
    embeddings, mask = encode_text(tokenizer, encoder, CAPTIONS)
    torch.testing.assert_close(embeddings[mask].square().mean(), torch.tensor(1.0), rtol=1e-3, atol=0.0)
    (embeddings[mask] * torch.linspace(0, 1, 16)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_a_prompt_that_is_cut_is_said(tokenizer: Any, encoder: Any) -> None:
    with pytest.warns(UserWarning, match="1 of 2 prompts exceed 4 tokens"):
        embeddings, _ = encode_text(tokenizer, encoder, ["a red apple", "a red apple!"], max_length=4)
    assert embeddings.shape[1] == 4


def test_a_saved_encoder_loads_with_the_same_embeddings(tokenizer: Any, encoder: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    encoder.save_pretrained(tmp_path / "text_encoder")
    again = load_text_encoder(tmp_path)
    assert type(again[1]) is type(encoder)
    assert torch.equal(encode_text(*again, CAPTIONS)[0], encode_text(tokenizer, encoder, CAPTIONS)[0])


def test_prompts_are_cut_at_the_positions_of_the_encoder(tokenizer: Any, tmp_path: Path) -> None:
    loaded, encoder = load_text_encoder(saved(clip(len(tokenizer), positions=7), tokenizer, tmp_path))
    assert not encoder.training
    with pytest.warns(UserWarning, match="exceed 7 tokens"):
        embeddings, mask = encode_text(loaded, encoder, ["red apple", CAPTIONS[0]])
    assert embeddings.shape == (2, 7, 16)
    assert mask.sum(1).tolist() == [3, 7]


def test_a_missing_encoder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read") as raised:
        load_text_encoder(tmp_path / "nothing-here")
    assert "hf download" in raised.value.fix


def test_words_that_our_tokenizer_has_to_spell_are_unknown(tmp_path: Path) -> None:
    """Their letters are known, so that no token is unknown, but nobody learnt what they mean."""
    tokenizer = train_tokenizer(["a red apple", "green tree, tall"])
    texts = ["A red pear (tall), zap zap!", "Tree \u2603", ""]
    assert "[UNK]" not in tokenizer.convert_ids_to_tokens(tokenizer("pear")["input_ids"])
    assert unknown_words(tokenizer, texts) == ["pear", "zap", "\u2603"]
    tokenizer.save_pretrained(tmp_path)
    assert unknown_words(AutoTokenizer.from_pretrained(tmp_path), texts) == ["pear", "zap", "\u2603"]
    assert unknown_words(with_words(tokenizer, ["pear"]), texts) == ["zap", "\u2603"]
    assert unknown_words(tokenizer, []) == []


def test_of_other_tokenizers_words_with_an_unknown_token_are_unknown() -> None:
    vocabulary = {"[UNK]": 0, "red": 1, "app": 2, "##le": 3, "[CLS]": 4}
    pieces = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bert = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]", cls_token="[CLS]")
    assert unknown_words(bert, ["red apple pear red", "pear ..."]) == ["pear"]


def test_a_tokenizer_of_bytes_knows_every_word() -> None:
    """One such is CLIP's, whose unknown token is the one that ends every text."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate([*alphabet, "<end>"])}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    clip = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<end>", eos_token="<end>")
    assert unknown_words(clip, ["a red zorgon \u2603"]) == []
    assert unknown_words(PreTrainedTokenizerFast(tokenizer_object=backend), ["zorgon"]) == []


WIDE: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip
EYE = {**WIDE, "image_size": 8, "patch_size": 4}


def bert(size: int) -> Any:
    return BertForMaskedLM(BertConfig(vocab_size=size, max_position_embeddings=16, **WIDE))


def t5(size: int) -> Any:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=size, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, pad_token_id=0)
    )


def clip(size: int, positions: int = 16) -> Any:
    text = {
        "vocab_size": size,
        "max_position_embeddings": positions,
        "bos_token_id": 2,
        "eos_token_id": 1,
        **WIDE,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=EYE, projection_dim=8))


def older(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename norms, and add a buffer that is computed now, as in files of years ago."""
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in state.items()
    }
    return {**renamed, "bert.embeddings.position_ids": torch.arange(16)[None]}


def saved(model: Any, tokenizer: Any, folder: Path, change: Any = None) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if change is not None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("make", "change", "kind"),
    [
        (bert, None, "BertModel"),
        (bert, older, "BertModel"),
        (t5, None, "T5EncoderModel"),
        (clip, None, "CLIPTextModel"),
    ],
)
def test_the_text_part_of_larger_and_older_models_loads_with_its_weights(
    make: Any, change: Any, kind: str, tokenizer: Any, tmp_path: Path
) -> None:
    model = make(len(tokenizer)).eval()
    loaded, encoder = load_text_encoder(saved(model, tokenizer, tmp_path, change))
    assert type(encoder).__name__ == kind
    tokens = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    whole = {"BertModel": "bert", "T5EncoderModel": "encoder", "CLIPTextModel": "text_model"}[kind]
    with torch.no_grad():
        expected = getattr(model, whole)(**tokens).last_hidden_state
        torch.testing.assert_close(encode_text(loaded, encoder, CAPTIONS)[0], expected)


def test_a_text_encoder_whose_files_do_not_fit_is_refused_by_name(tokenizer: Any, tmp_path: Path) -> None:
    folder = saved(bert(len(tokenizer)), tokenizer, tmp_path / "layers")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(UserError, match=r"the config has no place for weights: bert.encoder.layer.1"):
        load_text_encoder(folder)
    name = "bert.encoder.layer.0.output.dense.bias"
    for change, words in (
        (
            lambda state: {key: state[key] for key in state if key != name},
            "missing: .*layer.0.output.dense.bias",
        ),
        (lambda state: {**state, name: torch.zeros(7)}, "dense.bias is 7, not 16"),
        (
            lambda state: {**state, name: torch.full((16,), torch.nan)},
            "not finite .*layer.0.output.dense.bias",
        ),
    ):
        with pytest.raises(UserError, match=words):
            load_text_encoder(saved(bert(len(tokenizer)), tokenizer, tmp_path / words[:3], change))
    with pytest.raises(UserError, match=r"makes tokens up to number \d+, the encoder has embeddings of 5"):
        load_text_encoder(saved(bert(5), tokenizer, tmp_path / "words"))
    folder = saved(bert(len(tokenizer)), tokenizer, tmp_path / "code")
    (folder / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}')
    (folder / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    with pytest.raises(UserError, match="which latentflow does not execute") as raised:
        load_text_encoder(folder)
    assert "trust_remote_code" not in str(raised.value) and not (tmp_path / "executed").exists()
