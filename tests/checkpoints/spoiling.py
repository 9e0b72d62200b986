"""Ways to spoil a model directory, and the one line that has to be said then."""

import json

import pytest
from safetensors.numpy import load_file, save_file


def rewrite(directory, **changes):
    """Changes fields of config.json; None removes one."""
    path = directory / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))


def retensor(directory, **changes):
    """Changes tensors of model.safetensors; `...` removes one. Dots are written `__`."""
    path = directory / "model.safetensors"
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    tensors = load_file(path) | changes
    save_file({n: t for n, t in tensors.items() if t is not ...}, path, {"format": "pt"})


def shard(directory, parts=3):
    """Splits model.safetensors into shards with an index; returns the index's weight_map."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = [f"model-{i + 1:05}-of-{parts:05}.safetensors" for i in range(parts)]
    where = {name: files[i % parts] for i, name in enumerate(tensors)}
    for file in files:
        save_file({n: t for n, t in tensors.items() if where[n] == file}, directory / file)
    write_index(directory, where)
    return where


def write_index(directory, where):
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def refusal(call) -> str:
    """The message of the ValueError that `call` raises, which must be one line."""
    with pytest.raises(ValueError, match=": ") as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message
