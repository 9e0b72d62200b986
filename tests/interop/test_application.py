"""The ASGI application as a client sees it, without a server: answers, streams and refusals."""

import asyncio
import itertools
import json
import shutil

import numpy as np
import pytest

from duquantpp_jax.checkpoints import load
from duquantpp_jax.evaluation.predict import Predictor
from duquantpp_jax.interop import application as applications
from duquantpp_jax.interop import desk as desks
from duquantpp_jax.interop.application import Application
from duquantpp_jax.interop.asked import Refused, asked
from duquantpp_jax.interop.desk import Desk
from duquantpp_jax.ptq import stores
from tests.conftest import byte_tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def application(tiny_directory, tmp_path_factory):
    place = shutil.copytree(tiny_directory, tmp_path_factory.mktemp("served") / "tiny")
    (place / "chat_template.jinja").write_text("{{ messages[-1].content }}>")
    store = stores.store("float32", 16)
    desk = Desk(Predictor(load(place)), byte_tokenizer(), store, rows=1, waiting=3)
    limits = {"most_new": 40, "body_bytes": 5000, "body_seconds": 0.05}
    yield Application(desk, place, "tiny", **limits)
    desk.close()


def ask(application, path, body, *, method="POST", kind=b"application/json", then=()):
    """Status and body of the answer; what comes after the body is `then`, or nothing."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    waiting = [{"type": "http.request", "body": body}, *then]
    sent = []

    async def receive():
        return waiting.pop(0) if waiting else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "method": method, "headers": [(b"content-type", kind)]}
    asyncio.run(application(scope, receive, send))
    if not sent:
        return None, b""
    assert [message["type"] for message in sent[:2]] == [
        "http.response.start",
        "http.response.body",
    ]
    assert not sent[-1].get("more_body")
    return sent[0]["status"], b"".join(message["body"] for message in sent[1:])


def wish(**more):
    return {
        "model": "tiny",
        "prompt": "abc",
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": 1,
    } | more


def events(body):
    lines = body.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_a_stream_an_answer_and_a_chat_are_the_same_text(application):
    status, body = ask(application, COMPLETIONS, wish())
    answer = json.loads(body)
    (choice,) = answer["choices"]
    assert (status, answer["object"], choice["finish_reason"]) == (200, "text_completion", "length")
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
    scores = choice["logprobs"]
    assert scores["token_logprobs"] == [max(top.values()) for top in scores["top_logprobs"]]
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    _, body = ask(application, COMPLETIONS, wish(**streaming))
    *parts, last = events(body)
    assert last["usage"] == answer["usage"]
    assert "".join(part["choices"][0]["text"] for part in parts) == choice["text"]
    streamed = [part["choices"][0]["logprobs"]["token_logprobs"] for part in parts]
    assert [*itertools.chain(*streamed)] == scores["token_logprobs"]
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "abc"}], "temperature": 0}
    chat |= {"max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    whole = json.loads(ask(application, CHAT, chat)[1])["choices"][0]
    direct = json.loads(ask(application, COMPLETIONS, wish(prompt="abc>"))[1])["choices"][0]
    _, body = ask(application, CHAT, chat | {"stream": True})
    deltas = [part["choices"][0]["delta"] for part in events(body)]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta["content"] for delta in deltas) == whole["message"]["content"]
    assert len(whole["logprobs"]["content"]) == 6
    assert direct["text"] == whole["message"]["content"]


def test_an_echo_has_the_scores_of_the_prompt(application):
    asking = wish(echo=True, max_tokens=0, prompt=["abcd", "abcdef"])
    first, second = json.loads(ask(application, COMPLETIONS, asking)[1])["choices"]
    assert (first["text"], second["text"]) == ("abcd", "abcdef")
    values = second["logprobs"]["token_logprobs"]
    assert values[0] is None
    assert values[1:4] == pytest.approx(first["logprobs"]["token_logprobs"][1:], rel=1e-5)
    assert second["logprobs"]["text_offset"] == [0, 1, 2, 3, 4, 5]


def test_a_stop_string_ends_a_text_and_no_part_of_it_is_streamed(application):
    text = json.loads(ask(application, COMPLETIONS, wish())[1])["choices"][0]["text"]
    stop = text[2:4]
    _, body = ask(application, COMPLETIONS, wish(stop=[stop], stream=True))
    parts = [part["choices"][0] for part in events(body)]
    assert "".join(part["text"] for part in parts) == text[: text.index(stop)]
    assert parts[-1]["finish_reason"] == "stop"


WRONG = {
    "not JSON": (b"{", 400),
    "NaN": (b'{"prompt": NaN}', 400),
    "deep": (b"[" * 4000, 400),
    "a list": ([], 400),
    "no UTF-8": (b'"\xff"', 400),
    "too long": (b" " * 5001, 413),
    "another model": (wish(model="gpt"), 404),
    "no prompt": ({"model": "tiny"}, 400),
    "an empty prompt": (wish(prompt=""), 400),
    "an unknown token": (wish(prompt=[1, 257]), 400),
    "half a surrogate pair": (b'{"prompt": "\\ud800"}', 400),
    "a long prompt": (wish(prompt="a" * 2048), 400),
    "many tokens": (wish(max_tokens=41), 400),
    "true tokens": (wish(max_tokens=True), 400),
    "cold": (wish(temperature=-1), 400),
    "tools": (wish(tools=[{}]), 400),
    "unknown": (wish(mirostat=1), 400),
    "many texts": (wish(n=65), 400),
    "more than may ever wait": (wish(n=4), 400),
    "many likely tokens": (wish(logprobs=6), 400),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_refused_in_the_form_of_the_interface(name, application):
    body, wanted = WRONG[name]
    status, answer = ask(application, COMPLETIONS, body)
    assert status == wanted
    error = json.loads(answer)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert len(error["message"]) < 300


def test_where_too_many_wait_the_next_is_told_to_try_later(application, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(application._desk._tickets, "qsize", lambda: 3)
        status, answer = ask(application, COMPLETIONS, wish())
    assert (status, json.loads(answer)["error"]["code"]) == (503, "server_busy")
    assert ask(application, COMPLETIONS, wish())[0] == 200


def test_other_paths_methods_and_kinds_of_body_are_refused(application):
    assert ask(application, "/v1/edits", b"")[0] == 404
    assert ask(application, COMPLETIONS, b"", method="GET")[0] == 405
    assert ask(application, COMPLETIONS, wish(), kind=b"text/plain")[0] == 415
    assert ask(application, CHAT, wish())[0] == 400
    models = json.loads(ask(application, "/v1/models", b"", method="GET")[1])
    assert [model["id"] for model in models["data"]] == ["tiny"]


def test_slow_clients_and_those_that_go_leave_the_next_one_served(application):
    half = {"type": "http.request", "body": b"{", "more_body": True}

    async def slow():
        sent, waiting = [], [half]

        async def receive():
            return waiting.pop(0) if waiting else await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "path": COMPLETIONS, "method": "POST", "headers": headers}
        await application(scope, receive, send)
        return sent[0]["status"]

    assert asyncio.run(slow()) == 408
    gone = ({"type": "http.disconnect"},)
    assert ask(application, COMPLETIONS, wish(max_tokens=12), then=gone) == (None, b"")
    assert ask(application, COMPLETIONS, wish())[0] == 200


def test_freed_memory_is_given_back_for_as_long_as_it_lives(application, monkeypatch):
    given, told = [], []
    monkeypatch.setattr(applications, "TIDY_SECONDS", 0.0)
    monkeypatch.setattr(applications, "give_back_memory", lambda: given.append(1))
    monkeypatch.setattr(application._desk, "close", lambda: None)

    async def live():
        async def receive():
            while told and len(given) < 3:
                await asyncio.sleep(0.001)
            return {"type": "lifespan.shutdown" if told else "lifespan.startup"}

        async def send(message):
            told.append(message["type"])

        await application({"type": "lifespan"}, receive, send)

    asyncio.run(asyncio.wait_for(live(), 60))
    assert told == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_a_failure_of_the_model_is_an_answer_and_the_next_request_is_served(
    application, monkeypatch, capsys
):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(desks, "Continuing", broken)
        status, body = ask(application, COMPLETIONS, wish())
    assert (status, json.loads(body)["error"]["type"]) == (500, "server_error")
    assert "out of memory" in capsys.readouterr().err
    assert ask(application, COMPLETIONS, wish())[0] == 200


def test_defaults_are_those_of_the_interface():
    request = asked(b'{"model": "m", "prompt": "a"}', "completions", "m")
    assert (request.new, request.count, request.sampling.temperature) == (16, 1, 1.0)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = {"messages": [{"role": "user", "content": parts}]}
    request = asked(json.dumps(chat).encode(), "chat", "m")
    assert (request.new, request.messages) == (None, [{"role": "user", "content": "ab"}])
    with pytest.raises(Refused, match="'x' is not supported"):
        asked(b'{"prompt": "a", "x": 1}', "completions", "m")
    assert np.isfinite(request.seed)
