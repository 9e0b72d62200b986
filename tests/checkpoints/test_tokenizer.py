"""The tokenizer that a GGUF file states is the one that transformers makes of it, or is refused."""

import pytest

from duquantpp_jax.checkpoints import load_tokenizer
from tests.checkpoints.spoiling import refusal
from tests.checkpoints.test_llama_cpp import golden
from tests.goldens import llama_cpp as goldens
from tests.goldens.llama_cpp import write

pytest.importorskip("gguf", reason="needs the extra gguf")


@pytest.mark.parametrize("pre", goldens.PRE_TOKENIZERS)
def test_token_ids_are_those_of_the_transformers_library(pre, tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "x.gguf", pre=pre))
    for number, text in goldens.compared(pre):
        found = tokenizer.encode(text).ids
        assert found == golden()[f"{pre}: {number}"].tolist(), text
        assert tokenizer.decode(found, skip_special_tokens=False) == text


@pytest.mark.parametrize("architecture", goldens.PIECES)
def test_ids_of_pieces_are_those_of_the_transformers_library(architecture, tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "x.gguf", architecture, pre=architecture))
    for number, text in enumerate(goldens.PIECES_TEXTS):
        found = tokenizer.encode(text).ids
        assert found == golden()[f"{architecture} pieces: {number}"].tolist(), text
        back = tokenizer.decode(found[1:], skip_special_tokens=False)
        assert back.lstrip() == text.replace("▁", " ").lstrip()
    assert set(golden()[f"{architecture} pieces: 7"]) & set(range(11, 267))  # bytes


def test_splits_differ_where_they_should(tmp_path):
    ids = {}
    for pre in goldens.PRE_TOKENIZERS:
        tokenizer = load_tokenizer(write(tmp_path / "x.gguf", pre=pre))
        ids[pre] = tokenizer.encode("the   1234 THE'S 1").tokens
    assert ids["gpt-2"] == ids["default"]
    assert len({tuple(found) for found in ids.values()}) == 4
    # llama.cpp: each digit by itself, so that whitespace before one is a word.
    assert ids["smollm"][2:7] == ["ĠĠĠ", "1", "2", "3", "4"]


def test_bos_is_added_where_the_file_says_so(tmp_path):
    asked = {"tokenizer__ggml__add_bos_token": True}
    tokenizer = load_tokenizer(write(tmp_path / "x.gguf", **asked))
    assert tokenizer.encode("the").tokens[0] == "<|im_start|>"
    assert tokenizer.encode("the", add_special_tokens=False).tokens[0] != "<|im_start|>"
    unsaid = {"tokenizer__ggml__add_bos_token": None}
    adds = {}
    for pre in ("llama-bpe", "qwen2"):
        tokenizer = load_tokenizer(write(tmp_path / "x.gguf", pre=pre, **unsaid))
        adds[pre] = tokenizer.encode("the").tokens[0] == "<|im_start|>"
    assert adds == {"llama-bpe": True, "qwen2": False}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("pre", "tekken", "'tekken' is not supported: use gpt-2"),
        ("pre", None, "None is not supported"),
        ("pre", ["smollm"], "not supported"),
        ("model", "t5", "'t5' is not supported: it must be 'gpt2' or 'llama'"),
        ("model", "llama", "pre-tokenizer 'smollm' is not supported: use default"),
        ("tokens", None, "tokens are missing"),
        ("tokens", 7, "tokens are missing"),
        ("tokens", ["a", "a"], "repeat"),
        ("token_type", [1, 1], "type"),
        ("merges", ["a b c"], "broken"),
        ("merges", ["a zzz"], "broken"),
    ],
)
def test_a_tokenizer_that_cannot_be_made_is_refused(key, value, said, tmp_path):
    path = write(tmp_path / "x.gguf", **{f"tokenizer__ggml__{key}": value})
    assert said in refusal(lambda: load_tokenizer(path))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("scores", None, "lack a type or score"),
        ("scores", [1.0, 2.0], "lack a type or score"),
        ("token_type", None, "lack a type or score"),
        ("unknown_token_id", 10**6, "broken"),
        ("unknown_token_id", "<unk>", "broken"),
    ],
)
def test_pieces_that_make_no_tokenizer_are_refused(key, value, said, tmp_path):
    keys = {f"tokenizer__ggml__{key}": value}
    path = write(tmp_path / "x.gguf", "llama", pre="llama", **keys)
    assert said in refusal(lambda: load_tokenizer(path))
