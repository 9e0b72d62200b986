"""Every test runs under strict dtype promotion; real data comes through DUQUANTPP_DATA."""

import dataclasses
import gc
import importlib.metadata
import os
import pathlib
import shutil
import socket
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from duquantpp_jax.checkpoints import save, testbed
from duquantpp_jax.core import Needs, Stats
from duquantpp_jax.models import Decoder, DecoderConfig, parameter_shapes
from duquantpp_jax.models.families import FAMILIES
from duquantpp_jax.models.parameters import LAYER

DATA_VARIABLE = "DUQUANTPP_DATA"
COMPILED_VARIABLE = "DUQUANTPP_TEST_COMPILED"
LLVM_LEVEL = "--xla_backend_optimization_level"
TEXT = pathlib.Path(__file__).parents[1] / "LICENSE"
"""A text of 21 rows in bytes, to calibrate on where the text does not matter."""


# Here, and not around each test: a compiled program is kept under it, and what fixtures of modules
# and sessions have compiled is then found by their tests.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Looks for garbage seldom: tracing makes objects by the million, and nearly all stay alive.
gc.set_threshold(200_000, 50, 1000)


def pytest_addoption(parser):
    parser.addoption(
        "--sixteenth", type=int, choices=range(16), help="of the files, sorted, every sixteenth"
    )


@pytest.hookimpl(tryfirst=True)  # before -m, so that a file is in one part whatever is marked
def pytest_collection_modifyitems(config, items):
    """Takes a sixteenth; else files with slow tests first, so that no core waits at the end."""
    if (part := config.getoption("sixteenth")) is None:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)
        return
    kept = sorted({item.path for item in items})[part::16]
    config.hook.pytest_deselected(items=[item for item in items if item.path not in kept])
    items[:] = [item for item in items if item.path in kept]


def pytest_configure(config):
    """Compiles each program once in a run, and quickly; processes of tests compile for themselves.

    The workers share a directory of programs, empty at the start: a program is found there by its
    text and by all that the compiler is told.

    LLVM does not optimize, in these processes and in those that tests start, which saves half of
    what compiling costs: what tests state holds at every level. Programs are optimized as those of
    users where XLA_FLAGS names a level (.ci/run does, on the oldest Python), and where JAX
    has a plugin of an accelerator.
    """
    if not hasattr(config, "workerinput"):
        flags = os.environ.get("XLA_FLAGS", "")
        if LLVM_LEVEL not in flags and not importlib.metadata.entry_points(group="jax_plugins"):
            os.environ["XLA_FLAGS"] = f"{flags} {LLVM_LEVEL}=0".strip()
        directory = tempfile.TemporaryDirectory(prefix="duquantpp-compiled-")
        config.add_cleanup(directory.cleanup)
        os.environ.setdefault(COMPILED_VARIABLE, directory.name)  # experiments/mutants.py gives one
        os.environ["DUQUANTPP_CACHE"] = str(pathlib.Path(directory.name) / "rows")
        # The workers use all cores; NumPy's BLAS would add threads that wait for them, busily.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    jax.config.update("jax_compilation_cache_dir", os.environ[COMPILED_VARIABLE])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


_connecting = [False]
"""Whether the test that runs may use a network."""


def _refusing(real, where):
    def call(*arguments, **options):
        unix = len(arguments) > where and isinstance(arguments[where], str | bytes) and where == 1
        if not _connecting[0] and not unix:
            raise AssertionError(f"a network is asked for: {arguments[where:]}")
        return real(*arguments, **options)

    return call


for _name in ("connect", "connect_ex", "bind", "sendto"):
    setattr(socket.socket, _name, _refusing(getattr(socket.socket, _name), 1))
socket.getaddrinfo = _refusing(socket.getaddrinfo, 0)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    """No command but `serve` asks for a network: only tests marked sockets may, and clients."""
    _connecting[0] = item.get_closest_marker("sockets") is not None
    yield
    _connecting[0] = False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Each worker takes neighbours, which share fixtures and programs; who is done helps."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


def pytest_collection_finish():
    """What was collected stays alive, and is not looked at again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def data(request) -> pathlib.Path:
    """The directory of real data, or a skip where DUQUANTPP_DATA does not name it."""
    place = os.environ.get(DATA_VARIABLE)
    request.node.user_properties.append((DATA_VARIABLE, "read" if place else "skipped"))
    if not place:
        pytest.skip(f"{DATA_VARIABLE} is not set")
    return pathlib.Path(place)


def pytest_terminal_summary(terminalreporter):
    """Says how programs were compiled, how many tests read real data, how many went without."""
    terminalreporter.write_line(f"XLA_FLAGS: {os.environ.get('XLA_FLAGS', '')}")
    reports = [
        r for kind in ("passed", "failed", "skipped") for r in terminalreporter.getreports(kind)
    ]
    marks = {
        (report.nodeid, value)
        for report in reports
        for name, value in getattr(report, "user_properties", ())  # a skipped module has none
        if name == DATA_VARIABLE
    }
    read, skipped = (sum(value == kind for _, value in marks) for kind in ("read", "skipped"))
    if marks:
        terminalreporter.write_line(
            f"real data ({DATA_VARIABLE}): read by {read} tests, {skipped} skipped for want of it"
        )


TINY = DecoderConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=257,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=256,
)


def tiny_decoder(**changes) -> Decoder:
    """A random decoder, its weights large enough that its outputs are not all alike.

    NumPy draws them: JAX would compile a program for every shape.
    """
    config = dataclasses.replace(TINY, **changes)
    random = np.random.default_rng(1)
    parameters = {}
    for name, shape in parameter_shapes(config).items():
        if name.endswith(("norm", ".bias")):
            array = np.full(shape, name.endswith("norm"), np.float32)
        else:
            size = 0.08 if name.endswith(("o_proj", "down_proj")) else 0.16
            array = size * random.standard_normal(shape, np.float32)
        parameters[name] = jnp.asarray(array)
    return Decoder(config, parameters)


def mixture(architecture: str, **changes) -> Decoder:
    """A random decoder of this family with two of four experts a token, and random biases."""
    counts = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    return relative(architecture, **counts, **changes)


def relative(architecture: str, **changes) -> Decoder:
    """A random decoder of this family, with random biases where it has some."""
    named = {"architectures": [architecture], "model_type": FAMILIES[architecture].model_type}
    fields = {**TINY.to_dict(), **named, "sliding_window": 12}
    config = DecoderConfig.from_dict({**fields, **changes})
    parameters, random = tiny_decoder(**vars(config)).parameters(), np.random.default_rng(2)
    for name, array in parameters.items():
        if name.endswith(".bias"):
            parameters[name] = jnp.asarray(random.standard_normal(array.shape, np.float32) / 8)
    return Decoder(config, parameters)


def byte_tokenizer() -> Tokenizer:
    """One token a byte, and 256 for the separator."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    vocabulary["<|endoftext|>"] = 256
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory) -> pathlib.Path:
    """A Hugging Face directory of a tiny random Llama over bytes."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save(tiny_decoder(), byte_tokenizer().to_str(), directory)
    return directory


@pytest.fixture
def directory(tiny_directory, tmp_path) -> pathlib.Path:
    """A copy of the tiny model that a test may spoil."""
    return shutil.copytree(tiny_directory, tmp_path / "model")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> pathlib.Path:
    """Ten documents of 1,100 to 2,000 letters."""
    place = tmp_path_factory.mktemp("text") / "text.txt"
    documents = [
        "".join(chr(97 + (i * i + 7 * d * i) % 26) for i in range(1100 + 100 * d))
        for d in range(10)
    ]
    place.write_text("<|endoftext|>".join(documents), encoding="utf-8")
    return place


@pytest.fixture(scope="session")
def shallow_directory(tmp_path_factory) -> pathlib.Path:
    """The embedded model with the first two of its four layers, and all of its rows."""
    place, model = tmp_path_factory.mktemp("shallow") / "testbed", testbed.load()
    kept = {n: a[:2] if n.startswith(LAYER) else a for n, a in model.parameters().items()}
    config = dataclasses.replace(model.config, num_hidden_layers=2)
    tokenizer = (testbed.directory() / "tokenizer.json").read_text(encoding="utf-8")
    save(Decoder(config, kept), tokenizer, place)
    shutil.copy(testbed.directory() / "tokens.npz", place)
    return place


@pytest.fixture(scope="module")
def shallow(shallow_directory):
    """Puts that model in the place of the embedded one; gives it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testbed, "directory", lambda: shallow_directory)
        yield testbed.load()


def stats_of(x, needs=Needs.GRAM | Needs.POSITIONS) -> Stats:
    """Stats of tokens [rows, length, k], all kept."""
    rows, length, width = x.shape
    empty = Stats.init(width, rows, length, sample_limit=rows * length, needs=needs)
    return empty.update(x, jnp.int32(0))


def heavy_tails(freedom, shape, seed=0) -> jax.Array:
    """Numbers of Student's t distribution, from NumPy: JAX compiles one second for each shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_t(freedom, shape), jnp.float32)
