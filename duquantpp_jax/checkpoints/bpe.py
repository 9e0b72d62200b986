"""The tokenizer that the keys of a GGUF file describe: BPE, byte-level or as SentencePiece has it.

`tokenizer.ggml.pre` names how text is split before byte-level merging. A split that is not known is
refused, because another split gives other tokens without a complaint.

Source: llama.cpp, src/llama-vocab.cpp, and the tokenizer.json of the models named there. The split
`default` is that of gpt-2, as transformers reads it.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from duquantpp_jax.checkpoints import sentencepiece
from duquantpp_jax.files import one_line

_CONTROL, _USER_DEFINED = 3, 4
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[str, pre_tokenizers.PreTokenizer | None] = {
    "gpt-2": None,
    "default": None,
    "smollm": pre_tokenizers.Digits(individual_digits=True),
    "llama-bpe": pre_tokenizers.Split(Regex(_WORDS % r"\p{N}{1,3}"), "isolated"),
    "qwen2": pre_tokenizers.Split(Regex(_WORDS % r"\p{N}"), "isolated"),
}
"""What comes before the byte level, which splits by itself unless a `Split` does."""


def tokenizer(keys: Mapping[str, Any], path: str) -> Tokenizer:
    """The tokenizer that the keys of the file at `path` describe.

    Raises:
      ValueError: It is of another kind, or its parts contradict each other.
    """
    kind, split = (keys.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind not in ("gpt2", "llama"):
        right = "it must be 'gpt2' or 'llama'"
        raise ValueError(f"{path}: tokenizer {kind!r:.60} is not supported: {right}")
    splits: list[Any] = [*SPLITS] if kind == "gpt2" else ["default", None]
    if split not in splits:
        right = f"use {' or '.join(split or 'none' for split in splits)}"
        raise ValueError(f"{path}: pre-tokenizer {split!r:.60} is not supported: {right}")
    stored, kinds = _list(keys, "tokens", str), _list(keys, "token_type", int)
    prefix = bool(keys.get("tokenizer.ggml.add_space_prefix", True))
    gemma = kind == "llama" and not prefix
    tokens = [*map(sentencepiece.spelled, stored)] if gemma else stored
    scores, bos = _list(keys, "scores", float), keys.get("tokenizer.ggml.bos_token_id")
    lengths = {len(kinds) or len(tokens)} if kind == "gpt2" else {len(kinds), len(scores)}
    if not tokens or len({*tokens}) < len(tokens) or lengths != {len(tokens)}:
        raise ValueError(
            f"{path}: its tokens are missing, repeat or lack a type or score: fetch it again"
        )
    try:
        if kind == "gpt2":
            made = _byte_level(tokens, _list(keys, "merges", str), split)
        else:
            unknown = tokens[keys.get("tokenizer.ggml.unknown_token_id", 0)]
            made = sentencepiece.tokenizer(tokens, scores, kinds, unknown, prefix)
        if adds_bos(keys) and bos is not None:
            made.post_processor = processors.TemplateProcessing(
                single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
            )
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: its tokens or merges are broken ({one_line(error)})") from None
    known = {*tokens}
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        pairs = zip(stored, kinds, strict=False)
        added = [token for token, its in pairs if its == kind and token in known]
        made.add_tokens([AddedToken(t, special=special, normalized=False) for t in added])
    return made


def _byte_level(tokens: list[str], merges: list[str], split: Any) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=split == "llama-bpe")
    made, before = Tokenizer(model), SPLITS[split]
    level = pre_tokenizers.ByteLevel(False, use_regex=not isinstance(before, pre_tokenizers.Split))
    made.pre_tokenizer = level if before is None else pre_tokenizers.Sequence([before, level])
    made.decoder = decoders.ByteLevel()
    return made


def adds_bos(keys: Mapping[str, Any]) -> bool:
    """Whether text that is encoded with special tokens begins with BOS."""
    kind, split = (keys.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    default = kind == "llama" or split == "llama-bpe"
    return bool(keys.get("tokenizer.ggml.add_bos_token", default))


def settings(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer_config.json."""
    tokens = _list(keys, "tokens", str)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: keys.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos(keys),
        **{n: tokens[i] for n, i in ids.items() if type(i) is int and 0 <= i < len(tokens)},
        "chat_template": keys.get("tokenizer.chat_template"),
    }


def _list(keys: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    found = keys.get(f"tokenizer.ggml.{name}")
    return found if isinstance(found, list) and found and type(found[0]) is kind else []
