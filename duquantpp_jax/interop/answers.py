"""A text on its way into an answer of OpenAI's completions or chat.

Source: OpenAI API reference, the completion and chat completion objects and their chunks.
"""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from duquantpp_jax.evaluation.continuing import Written
from duquantpp_jax.evaluation.scoring import RowScores
from duquantpp_jax.interop.asked import Asked

LEAST = -9999.0
"""The log-probability that stands for all lower ones; JSON has no infinity."""

Likely = list[tuple[int, float]]


class Choice:
    """A text of an answer.

    Attributes:
      prompt: Token ids of the prompt.
      row: What there is of the text so far.
    """

    def __init__(
        self, kind: str, number: int, tokenizer: Tokenizer, request: Asked, prompt: list[int]
    ):
        """Args:
        kind: completions or chat.
        number: Of the text in the answer.
        """
        self._chat, self._number, self._tokenizer = kind == "chat", number, tokenizer
        self._request, self.prompt, self.row = request, prompt, Written()
        self._scored: list[tuple[float | None, Likely]] = []
        self._only_prompt, self._letters, self._tokens, self._begun = request.new == 0, 0, 0, False
        self._over = False

    @property
    def whole(self) -> bool:
        """Whether nothing more comes."""
        return bool(self._scored) if self._only_prompt else self.row.finish is not None

    def prompt_scores(self, scored: RowScores | None) -> None:
        """Takes the scores of the prompt; None of one that has no targets."""
        self._scored = [(None, [])]
        if scored is not None:
            pairs = zip(scored.likeliest.tolist(), scored.largest.tolist(), strict=True)
            likely = [list(zip(*pair, strict=True)) for pair in pairs]
            self._scored += zip(scored.log_q.tolist(), likely, strict=True)

    def answer(self) -> dict[str, Any]:
        """The whole text."""
        text, row = self.row.text, self.row
        if self._request.echo:
            text = self._tokenizer.decode(self.prompt, skip_special_tokens=False) + text
        scores = None
        if self._request.top is not None:
            before = self._scored if self._request.echo else []
            ids = [*(self.prompt if self._request.echo else []), *row.ids]
            scores = self._scores(ids, [*before, *zip(row.log_q, row.likeliest, strict=True)], 0)
        finish = row.finish or "length"
        inner: dict[str, Any] = {"text": text}
        if self._chat:
            inner = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": self._number, **inner, "logprobs": scores, "finish_reason": finish}

    def part(self) -> dict[str, Any] | None:
        """What has come since the last part, for a stream; None where nothing is new."""
        row = self.row
        new = row.text[self._letters : row.settled]
        if self._over or (not new and row.finish is None):
            return None
        scores = None
        if self._request.top is not None:
            pairs = [*zip(row.log_q, row.likeliest, strict=True)]
            ids = row.ids[self._tokens :]
            scores = self._scores(ids, pairs[self._tokens :], self._letters)
        inner: dict[str, Any] = {"text": new}
        if self._chat:
            role = {} if self._begun else {"role": "assistant"}
            inner = {"delta": {**role, "content": new}}
        self._begun, self._over = True, row.finish is not None
        self._letters, self._tokens = max(self._letters, row.settled), len(row.ids)
        return {"index": self._number, **inner, "logprobs": scores, "finish_reason": row.finish}

    def _scores(
        self, ids: list[int], scored: Sequence[tuple[float | None, Likely]], offset: int
    ) -> dict[str, Any]:
        """Log-probabilities of tokens, in the form of the interface."""
        top = self._request.top or 0
        if self._chat:
            content = [
                {
                    **self._token(token, log_q),
                    "top_logprobs": [self._token(*e) for e in likely[:top]],
                }
                for token, (log_q, likely) in zip(ids, scored, strict=True)
            ]
            return {"content": content, "refusal": None}
        words, offsets, likeliest = [self._word(token) for token in ids], [], []
        for word, (log_q, likely) in zip(words, scored, strict=True):
            offsets.append(offset)
            offset += len(word)
            named: dict[str, float] = {}
            for token, value in likely[:top]:
                named.setdefault(self._word(token), max(value, LEAST))
            likeliest.append(None if log_q is None else named)
        values = [None if log_q is None else max(log_q, LEAST) for log_q, _ in scored]
        return {"tokens": words, "token_logprobs": values, "top_logprobs": likeliest,
                "text_offset": offsets}  # fmt: skip

    def _token(self, token: int, log_q: float | None) -> dict[str, Any]:
        word = self._word(token)
        value = LEAST if log_q is None else max(log_q, LEAST)
        return {"token": word, "logprob": value, "bytes": list(word.encode("utf-8", "replace"))}

    def _word(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False)
