"""BPE over text in which ▁ stands for a space, as SentencePiece has it, from a GGUF file's tokens.

The file lists no merges: two pieces merge where what they make is a token, and the token of the
highest score is made first. A character that is no piece falls back to the tokens of its bytes,
<0x00> to <0xFF>. Tokens that a user defined come before all others, in order. Gemma, which puts no
space before text, has runs of spaces among them; they are made of ▁ by merging.

Source: Kudo & Richardson, SentencePiece (arXiv:1808.06226); llama.cpp, src/llama-vocab.cpp; the
tokenizers of transformers for Llama 2 and Gemma.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_NORMAL, _SPACE = 1, "▁"


def spelled(token: str) -> str:
    """A token of Gemma as merging makes it: runs of spaces by ▁."""
    return token.replace(" ", _SPACE) if not token.strip(" ") else token


def merges(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """The pairs that merge into a token, those that merge first before others."""
    known = {*tokens}
    numbers = sorted(
        range(len(tokens)),
        key=lambda n: (True, -scores[n]) if kinds[n] == _NORMAL else (False, n),
    )
    return [
        (token[:cut], token[cut:])
        for token in map(tokens.__getitem__, numbers)
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in known and token[cut:] in known
    ]


def tokenizer(
    tokens: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    unknown: str,
    prefix: bool,
) -> Tokenizer:
    """The tokenizer, without special tokens.

    Args:
      unknown: Token of a character that has none, and whose bytes have none.
      prefix: Whether text begins with a space that it has not.
    """
    made = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=merges(tokens, scores, kinds),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    scheme = "first" if prefix else "never"
    made.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False)
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * prefix)
    return made
