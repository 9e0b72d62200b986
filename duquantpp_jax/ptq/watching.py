"""The inputs of a flax nnx module's linears: who shares them, and their Stats.

Linears that are to be watched keep, in a variable, what they are called with; a program runs the
module on a batch and returns it, and another folds it into Stats (calibration.py). Two linears
share an input if all their calls get the same arrays.

What a linear is called with inside nnx.jit or nnx.remat comes out of them with the module's state.
Out of nnx.scan, nnx.cond or jax.lax.scan it does not: linears inside those stay as they are
(`hidden_in`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Array

from duquantpp_jax.core import Fitted, Needs, Recipe, Stats
from duquantpp_jax.formats.mx import FLOAT_TYPES
from duquantpp_jax.ptq.calibration import SAMPLE_LIMIT, fold_input
from duquantpp_jax.ptq.mx_linear import Contraction


class _Seen(nnx.Variable):
    """The inputs of a linear, call after call."""


class Log:
    """What is seen of linears while a module is traced.

    Attributes:
      paths: In the order of the calls.
      nested: Paths of those that are called inside a transformation of JAX.
      keeps: Paths of those whose inputs are kept; None for all.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.nested: set[str] = set()
        self.keeps: set[str] | None = None
        self._outside: Any = None

    def begin(self) -> None:
        """Calls from here on are not nested."""
        self._outside = get_opaque_trace_state(convention="nnx")

    def call(self, path: str) -> None:
        """Notes a call."""
        self.paths.append(path)
        if get_opaque_trace_state(convention="nnx") != self._outside:
            self.nested.add(path)


class Watched(nnx.Module):
    """A linear that keeps what it is called with."""

    def __init__(self, linear: Any, path: str, log: Log):
        self.linear, self.seen, self.path, self.log = linear, _Seen(()), path, log

    def __call__(self, inputs: Array, *arguments: Any, **options: Any) -> Array:
        self.log.call(self.path)
        if self.log.keeps is None or self.path in self.log.keeps:
            self.seen.set_value((*self.seen.get_value(), inputs))
        return self.linear(inputs, *arguments, **options)


def inputs_of(
    graph: Any, call: Callable[..., Any], log: Log, state: Any, batch: Any
) -> dict[str, tuple[Array, ...]]:
    """What each watched linear is called with on a batch; ValueError if that is lost."""
    module, first = nnx.merge(graph, state), len(log.paths)
    log.begin()
    call(module, batch)
    watched = [inner for _, inner in nnx.iter_modules(module) if isinstance(inner, Watched)]
    found = {inner.path: inner.seen.get_value() for inner in watched}
    kept = log.paths[first:] if log.keeps is None else log.keeps
    if lost := [path for path in kept if not found[path]]:
        raise ValueError(f"{lost[0]}: its input does not come out of where it is called")
    return found


def hidden_in(
    look_at: Callable[..., Any], state: Any, log: Log, batches: Sequence[Any]
) -> dict[str, str]:
    """The linears that are called inside a transformation of JAX from which their inputs do not
    come out, by their paths, and why they stay as they are."""

    def look(keeps: set[str]) -> None:
        log.keeps = keeps
        for batch in batches:  # a function of its own, for what it has traced JAX keeps
            jax.eval_shape(lambda *given: look_at(*given), state, batch)

    look(set())
    found, why = {}, "is called inside a transformation of JAX which hides its input (as scan)"
    for path in sorted(log.nested):
        try:
            look({path})
        except Exception:  # whatever JAX and flax say of state that changes where it must not
            found[path] = why
    return found


class ModuleSite(NamedTuple):
    """Linears that are called with the same inputs, by their paths in the order of the calls.

    Attributes:
      contraction: Of the first; all sum over the same axes of the input.
      width: Of the input, with the zeros that widen it.
      tokens: In all batches.
      length: Tokens of each row of an input; 1 where they differ from call to call.
    """

    paths: tuple[str, ...]
    contraction: Contraction
    width: int
    tokens: int
    length: int

    @property
    def name(self) -> str:
        """The path of the first."""
        return self.paths[0]

    def matrices(self, linears: Mapping[str, Any]) -> tuple[Array, ...]:
        """The kernels as matrices."""
        own = (linears[path] for path in self.paths)
        return tuple(Contraction.of(linear).matrix(linear.kernel[...]) for linear in own)


def token_rows(contraction: Contraction, x: Array) -> Array:
    """An input as [rows, length, k] in float32; its tokens have the axes [rows, ..., k]."""
    tokens = contraction.tokens(x).astype(jnp.float32)
    rows = tokens.shape[0] if tokens.ndim > 1 else 1
    return tokens.reshape(rows, -1, tokens.shape[-1])


def find_sites(
    look_at: Callable[..., dict[str, tuple[Array, ...]]],
    state: Any,
    log: Log,
    linears: Mapping[str, Any],
    batches: Sequence[Any],
    recipe: Recipe,
    left: dict[str, str],
    pad: bool,
) -> list[ModuleSite]:
    """The sites of these linears in the order of the calls; what cannot be treated goes to left."""
    contractions = {path: Contraction.of(linear) for path, linear in linears.items()}
    alike: dict[str, list[Any]] = {path: [] for path in linears}

    def look(state: Any, batch: Any) -> dict[str, tuple[Array, ...]]:
        inputs = look_at(state, batch)
        for path, xs in inputs.items():
            alike[path] += [(id(x), contractions[path].summed_in(x.ndim)) for x in xs] + [None]
        return inputs

    traced = jax.jit(look)
    seen = [traced.eval_shape(state, batch) for batch in batches]
    left |= {path: "is not called on the batches" for path in linears if path not in log.paths}
    groups: dict[Any, list[str]] = {}
    for path in dict.fromkeys(log.paths):
        groups.setdefault(tuple(alike[path]), []).append(path)
    block = max(recipe.weight_format.block_size, recipe.activation_format.block_size)
    sites = []
    for paths in groups.values():
        contraction = contractions[paths[0]]
        width, wide = contraction.width, -(-contraction.width // block) * block
        inputs = [x for batch in seen for x in batch[paths[0]]]
        as_rows = functools.partial(token_rows, contraction)
        shapes = [jax.eval_shape(as_rows, x).shape for x in inputs]
        lengths = {length for _, length, _ in shapes}
        why = ""
        if kinds := {str(x.dtype) for x in inputs} - {*FLOAT_TYPES}:
            why = f"is called with {kinds.pop()}: only {', '.join(FLOAT_TYPES)} are rounded"
        elif wide != width and not pad:
            why = f"has input width {width}, no multiple of block {block}: pad=True widens it"
        elif len(lengths) > 1 and Needs.POSITIONS in recipe.needs:
            why = "is called with rows of several lengths, and the fit takes means by position"
        if why:
            left |= dict.fromkeys(paths, why)
            continue
        length = lengths.pop() if len(lengths) == 1 else 1
        tokens = sum(rows * length for rows, length, _ in shapes)
        sites.append(ModuleSite(tuple(paths), contraction, wide, tokens, length))
    return sites


def calibrate_sites(
    rows_of: Callable[[Any], dict[str, list[Array]]],
    sites: Sequence[ModuleSite],
    batches: Sequence[Any],
    needs: Needs,
    fits: Mapping[str, Fitted] | None = None,
    recipe: Recipe | None = None,
) -> dict[str, Stats]:
    """Stats of the inputs of all sites; with fits, of the moved and quantized inputs."""
    stats = {
        site.name: Stats.init(
            site.width,
            site.tokens // site.length,
            site.length,
            sample_limit=SAMPLE_LIMIT,
            needs=needs,
        )
        for site in sites
    }
    first = dict.fromkeys(stats, 0)
    for batch in batches:
        for name, inputs in rows_of(batch).items():
            for x in inputs:
                moves = None if fits is None else fits[name], None
                format = None if recipe is None else recipe.activation_format
                at = np.int32(first[name])
                stats[name] = fold_input(stats[name], x, at, *moves, format=format, mesh=None)
                first[name] += x.shape[0] * x.shape[1]
    return stats
