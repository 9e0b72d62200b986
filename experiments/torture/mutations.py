"""Ways to spoil a file: bytes, and JSON that stays JSON, in the formats that have JSON inside."""

import copy
import gzip
import json
import lzma
import random
import struct
from collections.abc import Callable
from typing import Any

DEEP, LONG = "@deep@", "@long@"
"""Placeholders for a list in a list, 100,000 times, and for a number of 5,000 digits."""
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**32, 2**62, 2**63, 2**64, -(2**63)),
    *(10**30, 1e308, -1e308, 1e-320, -0.0, 0.5, float("nan"), float("inf"), "", " ", "0", "null"),
    *("x" * 3000, "\ud800", "\x1b[2J\n", "../../etc/passwd", "/", "\0", "é", [], {}, [[]], [{}]),
    *({"": None}, [0] * 2000, [-1], DEEP, LONG),
)
SIZES = (0, 1, 2, 127, 128, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63)
SIZES += (2**64 - 1,)


def of_bytes(content: bytes, chance: random.Random) -> bytes:
    """Bytes changed at one to four places; half of the places lie in the first 4 KiB."""
    made = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        end = min(len(made), 4096) if chance.random() < 0.5 else len(made)
        at = chance.randrange(end + 1)
        size = chance.choice((1, 1, 2, 4, 8, 8, 64, 500))
        match chance.randrange(9):
            case 0 if at < len(made):
                made[at] ^= 1 << chance.randrange(8)
            case 1:
                made[at : at + 1] = bytes([chance.randrange(256)])
            case 2:
                width = chance.choice((4, 8))
                number = chance.choice(SIZES) % 256**width
                made[at : at + width] = number.to_bytes(width, "little")
            case 3:
                del made[at : at + size]
            case 4:
                made[at:at] = made[at : at + size]
            case 5:
                made[at:at] = chance.randbytes(size)
            case 6:
                del made[at:]
            case 7:
                made[at : at + size] = bytes(len(made[at : at + size]))
            case _:
                other = chance.randrange(len(made) + 1)
                made[at : at + size] = made[other : other + size]
    return bytes(made)


def of_value(value: Any, chance: random.Random) -> Any:
    """A JSON value with one to three of its parts changed."""
    made = json.loads(json.dumps(value))
    for _ in range(chance.choice((1, 1, 2, 3))):
        made = _changed(made, chance)
    return made


def _changed(value: Any, chance: random.Random) -> Any:
    inside = isinstance(value, dict | list) and len(value) > 0 and chance.random() < 0.9
    if not inside:
        if isinstance(value, str) and value[:1] in ("{", "[") and chance.random() < 0.7:
            try:  # JSON in a string
                return dumped(_changed(json.loads(value), chance))
            except (ValueError, RecursionError):
                return value
        if isinstance(value, int | float) and chance.random() < 0.4:
            return value + chance.choice((1, -1)) if chance.random() < 0.5 else value * 2
        return copy.deepcopy(chance.choice(VALUES))
    keys = [*value] if isinstance(value, dict) else [*range(len(value))]
    key = chance.choice(keys)
    match chance.randrange(10):
        case 0:
            del value[key]
        case 1:
            other = chance.choice(keys)
            value[key], value[other] = value[other], value[key]
        case 2 if isinstance(value, dict):
            value[chance.choice(("", "x", "format", str(key) + " "))] = value.pop(key)
        case 3 if isinstance(value, dict):
            value[f"{key}2"] = copy.deepcopy(value[key])
        case 4 if isinstance(value, list):
            value.insert(key, copy.deepcopy(chance.choice(value)))
        case _:
            value[key] = _changed(value[key], chance)
    return value


def dumped(value: Any) -> str:
    """JSON of a value, with what no `json.dumps` would write."""
    text = json.dumps(value)
    return text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000).replace(f'"{LONG}"', "9" * 5000)


def of_json(content: bytes, chance: random.Random) -> bytes:
    """A JSON file that stays one."""
    return dumped(of_value(json.loads(content), chance)).encode()


def of_safetensors(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose header stays JSON, and of the length that it says."""
    size = int.from_bytes(content[:8], "little")
    header = of_json(content[8 : 8 + size], chance)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def of_lines(content: bytes, chance: random.Random) -> bytes:
    """A .jsonl file with one of its lines changed."""
    lines = content.split(b"\n")
    number = chance.randrange(len(lines))
    if lines[number].strip():
        lines[number] = of_json(lines[number], chance)
    return b"\n".join(lines)


def of_gguf(content: bytes, chance: random.Random) -> bytes:
    """A GGUF file with one of its keys or tensors described otherwise."""
    keys, tensors, data = gguf_parts(content)
    which = keys if chance.random() < 0.7 else tensors
    at = chance.randrange(len(which))
    match chance.randrange(6):
        case 0:
            del which[at]
        case 1:
            which.append(which[at])
        case 2:
            other = chance.randrange(len(which))
            which[at], which[other] = (which[at][0], *which[other][1:]), which[at]
        case 3:
            which[at] = (of_bytes(which[at][0], chance), *which[at][1:])
        case _ if which is keys:
            name, kind, value = which[at]
            value = chance.choice(GGUF_VALUES) if chance.random() < 0.5 else (
                kind, of_bytes(value, chance)
            )  # fmt: skip
            which[at] = (name, *value)
        case _:
            name, shape, kind, offset = which[at]
            part = chance.randrange(3)
            if part == 0:
                shape = [*shape]
                shape[chance.randrange(len(shape))] = chance.choice(SIZES)
            elif part == 1:
                kind = chance.randrange(45)
            else:
                offset = chance.choice(SIZES)
            which[at] = (name, shape, kind, offset)
    return gguf_of(keys, tensors, data)


GGUF_VALUES = (
    (4, struct.pack("<I", 0)), (4, struct.pack("<I", 2**32 - 1)), (5, struct.pack("<i", -1)),
    (10, struct.pack("<Q", 2**63)), (6, struct.pack("<f", float("nan"))), (7, b"\1"),
    (6, struct.pack("<f", float("inf"))), (12, struct.pack("<d", 1e300)), (0, b"\xff"),
    (8, struct.pack("<Q", 3) + b"\x1b[J"), (8, struct.pack("<Q", 0)),
    (9, struct.pack("<IQ", 4, 0)), (9, struct.pack("<IQI", 4, 1, 7)),
    (9, struct.pack("<IQQ", 8, 1, 1) + b"x"), (9, struct.pack("<IQf", 6, 1, float("nan"))),
)  # fmt: skip
"""Values of keys: their kinds and bytes."""
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def gguf_parts(content: bytes) -> tuple[list[Any], list[Any], bytes]:
    """Keys (name, kind, bytes), tensors (name, shape, kind, offset) and data of a valid file."""
    at = 24

    def number(width: int = 8) -> int:
        nonlocal at
        at += width
        return int.from_bytes(content[at - width : at], "little")

    def string() -> bytes:
        nonlocal at
        size = number()
        at += size
        return content[at - size : at]

    def value(kind: int) -> None:
        nonlocal at
        if kind == 8:
            string()
        elif kind == 9:
            inner, count = number(4), number()
            for _ in range(count):
                value(inner)
        else:
            at += _WIDTHS[kind]

    count, several = struct.unpack("<QQ", content[8:24])
    keys, tensors = [], []
    for _ in range(several):
        name, kind = string(), number(4)
        begin = at
        value(kind)
        keys.append((name, kind, content[begin:at]))
    for _ in range(count):
        name, dimensions = string(), number(4)
        shape = [number() for _ in range(dimensions)]
        tensors.append((name, shape, number(4), number()))
    return keys, tensors, content[-(-at // 32) * 32 :]


def gguf_of(keys: list[Any], tensors: list[Any], data: bytes) -> bytes:
    """The file of these parts."""
    made = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for name, kind, value in keys:
        made += struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value
    for name, shape, kind, offset in tensors:
        made += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape))
        made += struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)
    return made + bytes(-len(made) % 32) + data


def unpacked(
    pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes]
) -> Callable[[bytes, random.Random], bytes]:
    """Changes what a packed file holds."""
    return lambda content, chance: pack(of_bytes(unpack(content), chance))


BY_ENDING: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": of_json,
    ".safetensors": of_safetensors,
    ".jsonl": of_lines,
    ".gguf": of_gguf,
    ".gz": unpacked(gzip.compress, gzip.decompress),
    ".xz": unpacked(lzma.compress, lzma.decompress),
}
"""By the end of a file's name, changes that leave it a file of its kind."""


def spoilt(name: str, content: bytes, chance: random.Random) -> bytes:
    """The content of a file, spoilt: half of the files that have a kind stay of it."""
    of_kind = BY_ENDING.get(name[name.rfind(".") :], of_bytes)
    return (of_kind if chance.random() < 0.6 else of_bytes)(content, chance)
