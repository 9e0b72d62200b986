"""The header of a GGUF file is believed as far as the file reaches; blocks are the library's."""

import random
import struct
import time
import tracemalloc

import numpy as np
import pytest

from duquantpp_jax.checkpoints.gguf import read_contents
from duquantpp_jax.checkpoints.hugging_face import load_tokenizer
from duquantpp_jax.checkpoints.lazy import Checkpoint
from duquantpp_jax.checkpoints.shards import read_stored
from tests.checkpoints.spoiling import refusal
from tests.goldens.llama_cpp import KINDS, weights, write

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

U32, ARRAY, STRING = 4, 9, 8


def text(content):
    content = content if isinstance(content, bytes) else content.encode()
    return struct.pack("<Q", len(content)) + content


def header(*parts, version=3, tensors=0, keys=0):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def key(name, kind, *parts):
    return text(name) + struct.pack("<I", kind) + b"".join(parts)


def tensor(name, shape, kind=0, offset=0):
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


def long(number):
    return struct.pack("<Q", number)


BROKEN = {
    "not a GGUF file": (b"GGML" + bytes(20), "no GGUF file"),
    "empty": (b"", "no GGUF file"),
    "no more than its magic": (b"GGUF", "beyond"),
    "version 1": (header(version=1), "version 1"),
    "big-endian": (header(version=3 << 24), "little-endian"),
    "2^60 keys": (header(keys=2**60), "beyond"),
    "2^60 tensors": (header(tensors=2**60), "beyond"),
    "a string of 2^60 bytes": (header(long(2**60), b"x", keys=1), "beyond"),
    "a string of 2^64 - 1 bytes": (header(long(2**64 - 1), b"x", keys=1), "beyond"),
    "a value of 2^60 bytes": (header(key("a", STRING, long(2**60)), keys=1), "beyond"),
    "2^60 numbers": (
        header(key("a", ARRAY, struct.pack("<I", U32), long(2**60)), keys=1),
        "beyond",
    ),
    "2^60 strings": (
        header(key("a", ARRAY, struct.pack("<I", STRING), long(2**60)), keys=1),
        "beyond",
    ),
    "an array of arrays": (
        header(key("a", ARRAY, struct.pack("<I", ARRAY), long(2**60)), keys=1),
        "unknown kind 9",
    ),
    "an unknown kind": (header(key("a", 77, long(0)), keys=1), "unknown kind 77"),
    "a name that is not UTF-8": (header(text(b"\xff"), keys=1), "UTF-8"),
    "two keys of one name": (header(key("a", 0, b"1"), key("a", 0, b"1"), keys=2), "two of"),
    "two tensors of one name": (header(tensor("a", (1,)), tensor("a", (1,)), tensors=2), "two of"),
    "no dimensions": (header(tensor("a", ()), tensors=1), "0 dimensions"),
    "2^32 - 1 dimensions": (header(text("a"), b"\xff" * 4, tensors=1), "dimensions"),
    "an empty tensor": (header(tensor("a", (0, 2**40)), tensors=1), "shape"),
    "sizes whose product overflows": (header(tensor("a", (2**32, 2**32)), tensors=1), "beyond"),
    "an offset beyond the end": (
        header(tensor("a", (1,), 0, 2**63), bytes(64), tensors=1),
        "beyond",
    ),
    "an unknown block type": (header(tensor("a", (32,), 99), tensors=1), "99"),
    "half a block": (header(tensor("a", (48,), 8), bytes(999), tensors=1), "blocks of 32"),
    "an alignment of 3": (
        header(key("general.alignment", U32, struct.pack("<I", 3)), keys=1),
        "power of two",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_lie_in_the_header_is_refused_in_one_line_at_once(case, tmp_path):
    content, said = BROKEN[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    start = time.process_time()
    message = refusal(lambda: read_contents(path))
    assert time.process_time() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    assert said in message
    assert str(path) in message
    assert len(message) < 300 + len(str(path))


def said_of(path):
    """Why a file is refused; None where it is read to the end."""
    try:
        read = Checkpoint(path)
        list(read_stored(read.found, read.places))
        load_tokenizer(path)
        read.source.companions()["tokenizer_config.json"]()
    except ValueError as error:
        return str(error)


def test_bytes_changed_anywhere_are_read_or_refused(tmp_path):
    """A thousand files were tried; these are the first of them."""
    whole = [write(tmp_path / f"{a}.gguf", a, kinds=KINDS[a]).read_bytes() for a in KINDS]
    draw, refused = random.Random(0), 0
    for number in range(60):
        spoiled = bytearray(draw.choice(whole))
        at = draw.randrange(4, draw.choice([600, 12_000]))
        change = draw.choice([draw.randbytes(1), long(2**60), long(0), long(2**64 - 1)])
        spoiled[at : at + draw.choice([0, len(change)])] = change
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(spoiled[: draw.choice([len(spoiled)] * 9 + [at])])
        message = said_of(path)
        refused += message is not None
        assert "\n" not in (message or "")
    assert 10 < refused < 60


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_1", "Q8_0", "MXFP4"])
def test_blocks_are_those_of_the_library_and_floats_stay_as_they_are(kind, tmp_path):
    path = write(tmp_path / "x.gguf", "qwen2", kinds={"ffn_up.weight": kind})
    keys, tensors = read_contents(path)
    reader = gguf.GGUFReader(path)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            found, wanted = keys[name], field.contents()
            exact = np.float32(found) == wanted if isinstance(found, float) else found == wanted
            assert exact, name
    assert [*tensors] == [one.name for one in reader.tensors]
    for one in reader.tensors:
        array = tensors[one.name].read()
        wanted = gguf.dequantize(one.data, one.tensor_type).reshape(one.shape[::-1])
        np.testing.assert_array_equal(array.astype(np.float32), wanted)
        names = {"F16": "float16", "BF16": "bfloat16"}
        assert array.dtype.name == names.get(one.tensor_type.name, "float32")
        assert tensors[one.name].shape == array.shape


def test_nan_in_a_block_names_the_tensor(tmp_path):
    tensors = weights("llama")
    path = write(tmp_path / "x.gguf", kinds={"ffn_up.weight": "Q8_0"}, tensors=tensors)
    where = read_contents(path)[1]["blk.1.ffn_up.weight"].offset
    content = bytearray(path.read_bytes())
    content[where : where + 2] = b"\x00\x7e"
    path.write_bytes(content)
    read = Checkpoint(path)
    message = refusal(lambda: list(read_stored(read.found, read.places)))
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert "NaN" in message
