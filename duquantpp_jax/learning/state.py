"""Checkpoints of learning: one safetensors file, written whole or not at all.

Arrays are named by their path in the state. The metadata holds the settings and a hash of all; a
file of other settings, or one that has been changed, is refused.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from duquantpp_jax import files

FORMAT = "duquantpp_jax learning 2"
HISTORY, START_LOSS = "history", "start_loss"

History = list[tuple[int, float, float]]


def digest(tree: Any) -> str:
    """A hash of the arrays of a tree: their paths, shapes, types and numbers."""
    found = hashlib.sha256()
    for name, leaf in _named(tree):
        array = np.ascontiguousarray(leaf)
        found.update(f"{name} {array.dtype} {array.shape} ".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def describe(optimizer: optax.GradientTransformation, learned: Any) -> str:
    """A hash of an optimiser: of the program that JAX traces of one update of `learned`.

    Rates, schedules and moments are numbers of that program: optimisers of one hash do the same.
    """
    update = optax.with_extra_args_support(optimizer).update

    def loss(moved: Any) -> Array:
        return sum((jnp.sum(leaf) for leaf in jax.tree.leaves(moved)), jnp.float32(0))

    def one_step(gradient: Any, state: Any, moved: Any) -> Any:
        value = loss(moved)
        return update(gradient, state, moved, value=value, grad=gradient, value_fn=loss)

    with jax.numpy_dtype_promotion("standard"):  # optax counts on it
        traced = jax.make_jaxpr(one_step)(learned, optimizer.init(learned), learned)
    program = re.sub(r" at 0x[0-9a-f]+", "", str(traced.jaxpr))  # where functions lie in memory
    return hashlib.sha256((program + digest(traced.consts)).encode()).hexdigest()


def save(
    path: Path, state: Any, start_loss: float, history: History, settings: Mapping[str, str]
) -> None:
    """Writes a state, a pytree of arrays, with the settings that must be the same to go on."""
    tensors = dict(_named(state)) | {START_LOSS: np.float64(start_loss)}
    tensors[HISTORY] = np.asarray(history, np.float64).reshape(-1, 3)
    files.write_tensors(path, tensors, {"format": FORMAT, **settings})


def load(path: Path, like: Any, settings: Mapping[str, str]) -> tuple[Any, float, History]:
    """The state, the start loss and the history that `save` wrote; `like` has the same structure.

    Raises:
      ValueError: The file is no such checkpoint, or of other settings or shapes.
    """
    again = "remove it to begin anew, or give another path"
    tensors, about = files.read_tensors(path, again)
    for name, value in {"format": FORMAT, **settings}.items():
        if (was := about.get(name)) != value:
            other = f"{files.printable(' '.join(str(was).split())):.80}, not {value:.80}"
            raise ValueError(f"{path} is a checkpoint of another {name} ({other}): {again}")
    with files.refusing(path, again):
        history, start_loss = tensors.pop(HISTORY), float(tensors.pop(START_LOSS).reshape(()))
        checks = [(int(step), loss, held_out) for step, loss, held_out in history.tolist()]
    wanted = {name: (leaf.shape, leaf.dtype) for name, leaf in _named(like)}
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    if found != wanted:
        wrong = next(n for n in wanted | found if wanted.get(n) != found.get(n))
        raise ValueError(f"{path} holds another state (at {wrong}): {again}")
    leaves = [jnp.asarray(tensors[name]) for name in wanted]
    state = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return state, start_loss, checks


def _named(state: Any) -> list[tuple[str, Any]]:
    """The arrays of a state, by where they sit."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
