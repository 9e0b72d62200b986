"""The tokenizer that the keys of a GGUF file describe: byte-level BPE.

`tokenizer.ggml.pre` names how text is split before merging. A split that is not known is refused,
because another split gives other tokens without a complaint.

Source: llama.cpp, src/llama-vocab.cpp, and the tokenizer.json of the models named there. The split
`default` is that of gpt-2, as transformers reads it.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from duquantpp_jax.checkpoints.shards import one_line

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
    if kind != "gpt2":
        raise ValueError(f"{path}: tokenizer {kind!r:.60} is not supported: it must be 'gpt2'")
    if not isinstance(split, str) or split not in SPLITS:
        raise ValueError(
            f"{path}: pre-tokenizer {split!r:.60} is not supported: use {' or '.join(SPLITS)}"
        )
    tokens, merges = _list(keys, "tokens", str), _list(keys, "merges", str)
    kinds, bos = _list(keys, "token_type", int), keys.get("tokenizer.ggml.bos_token_id")
    if not tokens or len({*tokens}) < len(tokens) or len(kinds) not in (0, len(tokens)):
        raise ValueError(f"{path}: its tokens are missing, repeat or lack a type: fetch it again")
    try:
        vocabulary = {token: number for number, token in enumerate(tokens)}
        pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=split == "llama-bpe")
        made = Tokenizer(model)
        if adds_bos(keys) and bos is not None:
            made.post_processor = processors.TemplateProcessing(
                single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
            )
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: its tokens or merges are broken ({one_line(error)})") from None
    before = SPLITS[split]
    level = pre_tokenizers.ByteLevel(False, use_regex=not isinstance(before, pre_tokenizers.Split))
    made.pre_tokenizer = level if before is None else pre_tokenizers.Sequence([before, level])
    made.decoder = decoders.ByteLevel()
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [token for token, its in zip(tokens, kinds, strict=False) if its == kind]
        made.add_tokens([AddedToken(t, special=special, normalized=False) for t in added])
    return made


def adds_bos(keys: Mapping[str, Any]) -> bool:
    """Whether text that is encoded with special tokens begins with BOS."""
    default = keys.get("tokenizer.ggml.pre") == "llama-bpe"
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
