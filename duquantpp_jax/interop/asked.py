"""What a request of OpenAI's completions or chat asks for, checked field by field.

A field that would change the answer and is not supported is refused by name; none is ignored but
those that say who asks.

Source: OpenAI API reference, endpoints /v1/completions and /v1/chat/completions.
"""

import dataclasses
import json
import secrets
from collections.abc import Mapping
from typing import Any, NoReturn

from duquantpp_jax.models.sampling import Sampling

MOST_ROWS = 64
"""Most texts that a request may ask for."""
MOST_MESSAGES = 1024
MOST_STOPS = 16
TOP = {"completions": 5, "chat": 20}
"""Most of the likeliest tokens that may be asked for at each token."""
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none"),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "parallel_tool_calls": (None, True, False),
}
"""Fields of which only these values are taken, as they change nothing."""


class Refused(ValueError):
    """A request that gets no answer, and why."""

    def __init__(self, message: str, *, status: int = 400, code: str = "", field: str = ""):
        """Args:
        code: Of the error, for a program.
        field: Of the request, that was wrong.
        """
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": field or None,
                               "code": code or None}}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request for text.

    Attributes:
      prompts: Texts or token ids; empty for a chat.
      messages: Of a chat.
      new: Most new tokens of each text; None for as many as there is room for.
      count: Texts for each prompt.
      top: How many of the likeliest tokens to report; None for no log-probabilities.
      usage: Whether a stream ends with the numbers of tokens.
    """

    prompts: list[str | list[int]]
    messages: list[dict[str, str]]
    new: int | None
    count: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    top: int | None
    echo: bool
    stream: bool
    usage: bool


def asked(body: bytes, kind: str, model: str) -> Asked:
    """The request in a body.

    Args:
      kind: completions or chat.
      model: The name of the model that answers.

    Raises:
      Refused: It is not JSON, or a field is missing, wrong or not supported.
    """
    try:
        fields = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise Refused("the body must be a JSON object")
    left = {name: value for name, value in fields.items() if name not in HARMLESS}
    for name, allowed in NEUTRAL.items():
        if name in left and left.pop(name) not in allowed:
            raise Refused(f"{name} is not supported: leave it out", field=name)
    chat = kind == "chat"
    named = left.pop("model", model)
    if named != model:
        message = f"the model {named!r:.100} does not exist: this server has {model!r}"
        raise Refused(message, status=404, code="model_not_found", field="model")
    messages = _messages(left.pop("messages", None)) if chat else []
    prompts = [] if chat else _prompts(left.pop("prompt", None))
    limits = [_number(left, n, None, 0, 2**31 - 1) for n in ("max_completion_tokens", "max_tokens")]
    new = next((limit for limit in limits if limit is not None), None if chat else 16)
    count = _number(left, "n", 1, 1, MOST_ROWS)
    if left.pop("best_of", None) not in (None, count):
        raise Refused("best_of is not supported: leave it out", field="best_of")
    if count * max(1, len(prompts)) > MOST_ROWS:
        raise Refused(f"more than {MOST_ROWS} texts are asked for: send several requests")
    warm, top_p = (_real(left, name, 1.0) for name in ("temperature", "top_p"))
    top_k = max(0, _number(left, "top_k", 0, -1, 2**31 - 1))
    try:
        sampling = Sampling(warm, top_k, top_p)
    except ValueError as error:
        raise Refused(str(error)) from None
    seed = _number(left, "seed", secrets.randbits(31), -(2**63), 2**63 - 1)
    stop = left.pop("stop", None)
    stop = [stop] if isinstance(stop, str) else stop or []
    if not (isinstance(stop, list) and all(isinstance(s, str) and s for s in stop)
            and len(stop) <= MOST_STOPS):  # fmt: skip
        raise Refused(f"stop must be a string or at most {MOST_STOPS} of them", field="stop")
    most = TOP[kind]
    if chat:
        top = _number(left, "top_logprobs", 0, 0, most)
        top = top if _flag(left, "logprobs") else None
    else:
        top = _number(left, "logprobs", None, 0, most)
    echo, stream = not chat and _flag(left, "echo"), _flag(left, "stream")
    usage = left.pop("stream_options", None) or {}
    if not isinstance(usage, dict) or not {*usage} <= {"include_usage", "include_obfuscation"}:
        raise Refused("stream_options may have include_usage", field="stream_options")
    if left:
        raise Refused(f"{min(left)!r:.100} is not supported: leave it out", field=min(left)[:100])
    if new == 0 and not echo:
        raise Refused("max_tokens is 0: ask for a token at least, or echo", field="max_tokens")
    if echo and stream:
        raise Refused("echo and stream do not go together: leave one out", field="echo")
    own = prompts, messages, new, count, sampling, seed, tuple(stop), top, echo, stream
    return Asked(*own, bool(usage.get("include_usage")))


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _number(fields: dict[str, Any], name: str, default: Any, least: int, most: int) -> Any:
    """An integer field, taken out of the fields."""
    value = fields.pop(name, None)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise Refused(f"{name} must be an integer from {least} to {most}", field=name)
    return value


def _real(fields: dict[str, Any], name: str, default: float) -> float:
    value = fields.pop(name, None)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e6:
        raise Refused(f"{name} must be a number", field=name)
    return float(value)


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.pop(name, None)
    if value is not None and not isinstance(value, bool):
        raise Refused(f"{name} must be true or false", field=name)
    return bool(value)


def _text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _prompts(value: Any) -> list[str | list[int]]:
    def ids(each: Any) -> bool:
        return isinstance(each, list) and bool(each) and all(
            isinstance(token, int) and not isinstance(token, bool) for token in each
        )  # fmt: skip

    several = value if isinstance(value, list) and not ids(value) else [value]
    if not several or not all(_text(each) or ids(each) for each in several):
        message = "prompt must be a text, a list of texts, of token ids, or of lists of them"
        raise Refused(message, field="prompt")
    return several


def _messages(value: Any) -> list[dict[str, str]]:
    wrong = "messages must be a list of {role, content}, the content a text or text parts"
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_MESSAGES:
        raise Refused(wrong, field="messages")
    messages = []
    for each in value:
        content = each.get("content") if isinstance(each, dict) else None
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(parts) if all(map(_text, parts)) else None  # type: ignore[arg-type]
        if not _text(content) or not _text(each.get("role")):
            raise Refused(wrong, field="messages")
        messages.append({"role": each["role"], "content": content})
    return messages
