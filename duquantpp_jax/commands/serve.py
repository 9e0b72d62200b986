"""`duquantpp serve`: a float or quantized model behind OpenAI's HTTP interface."""

import asyncio
import signal
import sys
from typing import Any

import jax

from duquantpp_jax.checkpoints import load_any, load_tokenizer
from duquantpp_jax.checkpoints.packed import said
from duquantpp_jax.commands.options.serve import ServeOptions
from duquantpp_jax.evaluation import Predictor
from duquantpp_jax.interop.application import Application
from duquantpp_jax.interop.desk import Desk
from duquantpp_jax.kernels.matvec.api import FEW
from duquantpp_jax.ptq import stores
from duquantpp_jax.ptq.layout import for_writing, implemented, is_packed, kernels_here
from duquantpp_jax.recipes import import_modules

HEAD_BYTES = 64 * 2**10
"""Most bytes of a request's head."""
HEAD_SECONDS = 30.0
"""Longest time that a request's head may take to arrive."""
CONNECTIONS = 512
GOODBYE_SECONDS = 5
"""How long answers may go on after the command is told to end."""


def application(options: ServeOptions) -> Application:
    """The ASGI application of a model, its thread running.

    Raises:
      ValueError: The model cannot be loaded, or an option is out of range.
    """
    for name in ("rows", "waiting", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: give 1 or more")
    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port {options.port}: give 0 for a free one, or 1 to 65535")
    import_modules(options.imports)
    model, linear, state = load_any(options.model, options.activation_format)
    implementation = options.implementation
    if implementation == "xla":  # what triton is for, for_writing says
        linear = implemented(linear, implementation)
    if options.rows > FEW:
        if implementation == "triton":
            raise ValueError(f"--implementation triton writes {FEW} texts at most: --rows {FEW}")
        implementation = "xla"
    state = for_writing(linear, state, jax.local_devices()[0], implementation)
    plain = "xla" if options.implementation == "xla" else None
    if plain is None and (kernels := kernels_here()) is not None:
        print(kernels, file=sys.stderr)
    if is_packed(state):
        print(f"{options.model}: token by token with packed weights (triton)", file=sys.stderr)
    predictor = Predictor(model, linear, state, attention=plain)
    if (used := said(options.model, predictor.linear)) is not None:
        print(f"{options.model}: {used}", file=sys.stderr)
    config = predictor.model.config
    tokenizer = load_tokenizer(options.model, config)
    store = stores.store(options.cache, config.head_dim, implementation=plain)
    desk = Desk(predictor, tokenizer, store, rows=options.rows, waiting=options.waiting)
    name = options.name or options.model.resolve().name
    return Application(desk, options.model, name, most_new=options.max_new_tokens)


def run(options: ServeOptions) -> int:
    """Serves until SIGTERM or Ctrl-C; returns the exit code."""
    try:
        import uvicorn  # pyright: ignore[reportMissingImports]
        from uvicorn.protocols.http.h11_impl import (  # pyright: ignore[reportMissingImports]
            H11Protocol,
        )
    except ImportError:
        raise ValueError("serve needs uvicorn: pip install 'duquantpp_jax[serve]'") from None

    class Hurried(H11Protocol):
        """Closes a connection on which no whole head arrives in time."""

        _head: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._head is not None:
                self._head.cancel()
            super().connection_lost(exc)

        def _wait(self) -> None:
            """Starts the clock where a head is awaited, and stops it where it has come."""
            idle = self.cycle is None or self.cycle.response_complete
            if idle and self._head is None:
                self._head = self.loop.call_later(HEAD_SECONDS, self.transport.close)
            elif not idle and self._head is not None:
                self._head = self._head.cancel()

    served = application(options)
    config = uvicorn.Config(
        served,
        host=options.host,
        port=options.port,
        http=Hurried,
        ws="none",
        lifespan="on",
        log_level="warning",
        server_header=False,
        h11_max_incomplete_event_size=HEAD_BYTES,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=GOODBYE_SECONDS,
    )
    server = uvicorn.Server(config)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn sends it again when it has ended
    signal.signal(signal.SIGINT, lambda *_: None)

    async def serve() -> None:
        task = asyncio.ensure_future(server.serve())
        while not (server.started or task.done()):
            await asyncio.sleep(0.05)
        if server.started:
            port = server.servers[0].sockets[0].getsockname()[1]
            url = f"http://{options.host}:{port}/v1"
            line = f"serving {options.model} on {url}"
            result = {"model": options.name or options.model.resolve().name, "url": url}
            options.terminal.give(result, lambda: print(line, flush=True))
        await task

    try:
        asyncio.run(serve())
    except SystemExit:  # of uvicorn, where it cannot listen; it has said why
        raise ValueError(f"cannot listen on {options.host}:{options.port}") from None
    return 0
