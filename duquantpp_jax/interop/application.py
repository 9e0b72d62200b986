"""OpenAI's HTTP interface to a model, as an ASGI application.

    POST /v1/completions, /v1/chat/completions        answered whole, or streamed as events
    GET  /v1/models, /health

Every error is JSON in OpenAI's form. A body must be application/json: a page in a browser cannot
send that to another site without asking first.

Source: ASGI 3.0 specification; OpenAI API reference; HTML standard, server-sent events.
"""

import asyncio
import json
import sys
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from duquantpp_jax.checkpoints.hugging_face import chat_prompt
from duquantpp_jax.evaluation.continuing import Wish, Written
from duquantpp_jax.evaluation.scoring import RowScores
from duquantpp_jax.files.processes import give_back_memory
from duquantpp_jax.interop.answers import Choice
from duquantpp_jax.interop.asked import Asked, Refused, asked
from duquantpp_jax.interop.desk import Desk, Ticket

BODY_BYTES = 4 * 2**20
"""Most bytes of a request's body."""
BODY_SECONDS = 30.0
"""Longest time that a body may take to arrive."""
TIDY_SECONDS = 10.0
"""Between two times that freed memory is given back to the system."""
KINDS = {"/v1/completions": "completions", "/v1/chat/completions": "chat"}

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Application:
    """The ASGI application of a model in a directory."""

    def __init__(
        self,
        desk: Desk,
        directory: Path,
        name: str,
        *,
        most_new: int = 1024,
        body_bytes: int = BODY_BYTES,
        body_seconds: float = BODY_SECONDS,
    ):
        """Args:
        name: Of the model, in requests and answers.
        most_new: Most new tokens of a text.
        """
        self._desk, self._directory, self._name = desk, directory, name
        self._most_new, self._body_bytes, self._seconds = most_new, body_bytes, body_seconds
        self._born = int(time.time())

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] == "lifespan":
            return await self._live(receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1003})
        begun = [False]

        async def sent(message: Any) -> None:
            begun[0] = True
            await send(message)

        try:
            await self._answer(scope, receive, sent)
        except Refused as error:
            await _whole(sent, error.status, error.body)
        except ConnectionError:
            return  # the client has gone
        except Exception as error:  # an answer all the same
            traceback.print_exception(error, file=sys.stderr)
            if not begun[0]:
                await _whole(sent, 500, Refused("the server failed", status=500).body)

    async def _live(self, receive: Receive, send: Send) -> None:
        tidying = asyncio.ensure_future(_tidy())
        while True:
            kind = (await receive())["type"]
            if kind == "lifespan.shutdown":
                tidying.cancel()
                await asyncio.to_thread(self._desk.close)
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

    async def _answer(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        plain = {"/health": {"status": "ok"}, "/v1/models": self._models()}
        wanted = "POST" if path in KINDS else "GET"
        if path not in KINDS and path not in plain:
            raise Refused(f"there is no {path:.100}", status=404, code="unknown_url")
        if method != wanted:
            raise Refused(f"{path} takes {wanted}, not {method:.20}", status=405)
        if path in plain:
            return await _whole(send, 200, plain[path])
        kind = KINDS[path]
        request = asked(await self._body(scope, receive), kind, self._name)
        prompts = await asyncio.to_thread(self._prompts, request)
        messages: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        tickets = self._tickets(request, prompts, messages)
        choices = [
            Choice(kind, number, self._desk.tokenizer, request, ticket.prompt)
            for number, ticket in enumerate(tickets)
        ]
        self._desk.submit(tickets)
        watching = asyncio.ensure_future(_gone(receive))
        try:
            writing = self._stream if request.stream else self._at_once
            answering = asyncio.ensure_future(writing(request, kind, choices, messages, send))
            await asyncio.wait({watching, answering}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                await answering
            else:
                answering.cancel()
        finally:
            watching.cancel()
            for ticket in tickets:
                ticket.abandoned.set()

    def _models(self) -> dict[str, Any]:
        own = {"id": self._name, "object": "model", "created": self._born, "owned_by": "local"}
        return {"object": "list", "data": [own]}

    async def _body(self, scope: Mapping[str, Any], receive: Receive) -> bytes:
        """The body of a request; raises Refused where it is too long, too slow or of no JSON."""
        headers = dict(scope["headers"])
        if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            raise Refused("send Content-Type: application/json", status=415)
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self._seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionResetError("the client has gone")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self._body_bytes:
                        said = f"the body has more than {self._body_bytes} bytes"
                        raise Refused(said, status=413)
        except TimeoutError:
            raise Refused("the body did not arrive in time", status=408) from None
        return bytes(body)

    def _prompts(self, request: Asked) -> list[list[int]]:
        """The token ids of each prompt; raises Refused where they are wrong or too many."""
        config, tokenizer = self._desk.predictor.model.config, self._desk.tokenizer
        prompts: list[list[int]] = []
        if request.messages:
            try:
                text = chat_prompt(self._directory, request.messages)
            except ValueError as error:
                raise Refused(str(error), field="messages") from None
            prompts = [tokenizer.encode(text, add_special_tokens=False).ids]
        for prompt in request.prompts:
            given = isinstance(prompt, list)
            prompts.append(prompt if given else tokenizer.encode(prompt).ids)
        room = config.max_position_embeddings - (1 if request.new != 0 else 0)
        for ids in prompts:
            if not ids:
                raise Refused("a prompt is empty: give a word to start from", field="prompt")
            if len(ids) > room:
                said = f"a prompt has {len(ids)} tokens, and there is room for {room}"
                raise Refused(said, code="context_length_exceeded", field="prompt")
            if min(ids) < 0 or max(ids) >= config.vocab_size:
                said = f"a token id is not in 0 to {config.vocab_size - 1}"
                raise Refused(said, field="prompt")
        return prompts

    def _tickets(
        self, request: Asked, prompts: list[list[int]], messages: asyncio.Queue[Any]
    ) -> list[Ticket]:
        """A ticket for each text, which tells `messages` its number and how far it is."""
        loop = asyncio.get_running_loop()
        room = self._desk.predictor.model.config.max_position_embeddings
        tickets = []
        for prompt in prompts:
            new = min(self._most_new, room - len(prompt))
            if request.new is not None and request.new > new:
                said = f"max_tokens is {request.new}, and {new} is the most after this prompt"
                raise Refused(said, code="context_length_exceeded", field="max_tokens")
            new = new if request.new is None else request.new
            for turn in range(request.count):
                joined = not request.messages
                own = prompt, new, request.sampling, request.seed + turn, request.stop, joined
                number, score = len(tickets), request.echo and request.top is not None

                def tell(message: Any, number: int = number) -> None:
                    try:
                        loop.call_soon_threadsafe(messages.put_nowait, (number, message))
                    except RuntimeError:  # the loop is closed: nobody waits
                        return

                wish = Wish(*own) if new else None
                ask = prompt, wish, score or not new, request.top is not None, request.stream
                tickets.append(Ticket(*ask, tell))
        return tickets

    async def _told(
        self, choices: list[Choice], messages: asyncio.Queue[Any]
    ) -> AsyncIterator[Choice]:
        """Each choice that has got further, until all are whole; raises what went wrong."""
        while not all(choice.whole for choice in choices):
            number, message = await messages.get()
            if isinstance(message, Exception):
                raise message
            if isinstance(message, Written):
                choices[number].row = message
            elif isinstance(message, RowScores) or message is None:
                choices[number].prompt_scores(message)
            yield choices[number]

    async def _at_once(
        self, request: Asked, kind: str, choices: list[Choice], messages: Any, send: Send
    ) -> None:
        async for _ in self._told(choices, messages):
            pass
        answer = self._frame(kind, stream=False)
        answer |= {"choices": [choice.answer() for choice in choices]}
        await _whole(send, 200, {**answer, "usage": _usage(choices, request.count)})

    async def _stream(
        self, request: Asked, kind: str, choices: list[Choice], messages: Any, send: Send
    ) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        headers.append((b"cache-control", b"no-cache"))
        frame, begun = self._frame(kind, stream=True), False

        async def event(value: Any) -> None:
            nonlocal begun
            if not begun:
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            begun, text = True, value if isinstance(value, str) else _json(value).decode()
            body = f"data: {text}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})

        try:
            async for choice in self._told(choices, messages):
                if (part := choice.part()) is not None:
                    await event({**frame, "choices": [part]})
            if request.usage:
                await event({**frame, "choices": [], "usage": _usage(choices, request.count)})
            await event("[DONE]")
        except Refused as error:
            if not begun:
                raise
            await event(error.body)
        await send({"type": "http.response.body", "body": b""})

    def _frame(self, kind: str, *, stream: bool) -> dict[str, Any]:
        chat = kind == "chat"
        name = ("chat.completion.chunk" if stream else "chat.completion") if chat else (
            "text_completion"
        )  # fmt: skip
        identity = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        created = int(time.time())
        return {"id": identity, "object": name, "created": created, "model": self._name}


def _usage(choices: list[Choice], count: int) -> dict[str, int]:
    """Numbers of tokens; a prompt counts once, however many texts follow it."""
    read = sum(len(choice.prompt) for choice in choices[::count])
    new = sum(len(choice.row.ids) for choice in choices)
    return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


async def _whole(send: Send, status: int, value: Any) -> None:
    """Sends a response of JSON."""
    body = _json(value)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _tidy() -> None:
    """Gives freed memory back now and then: requests leave theirs in the pieces of many threads."""
    while True:
        await asyncio.sleep(TIDY_SECONDS)
        await asyncio.to_thread(give_back_memory)


async def _gone(receive: Receive) -> None:
    """Waits until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
