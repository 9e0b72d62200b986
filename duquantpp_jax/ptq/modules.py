"""Any flax nnx module, quantized: its linears are found, calibrated, fitted, rounded and replaced.

    stats  = Stats of what each linear is called with, while the float module runs on the batches
    fitted = fit(weights of the linears that share an input, stats)
    moved  = Stats of the moved and quantized inputs       for roundings that need them
    weight = round(transform.weights(W), moved)

It is the walk (walk.py) without its layers: the same parts in the same order, so that a decoder
made of nnx.Linear gets the codes that `quantize_decoder` gives. Linears share an input, and then a
transform, if they are called with the same array. All inputs of a batch are in memory at once.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from duquantpp_jax.core import MXArray, Needs, Recipe
from duquantpp_jax.core.notices import about, warn
from duquantpp_jax.models import Decoder
from duquantpp_jax.ptq.calibration import keep
from duquantpp_jax.ptq.mx_linear import LINEARS, Contraction, MXLinear, Quantized
from duquantpp_jax.ptq.report import ModuleReport, module_rows
from duquantpp_jax.ptq.site import fit_linear, pad_channels, quantize_linear
from duquantpp_jax.ptq.walk import check_fit, check_input, warn_of_few_tokens
from duquantpp_jax.ptq.watching import (
    Log,
    Watched,
    calibrate_sites,
    find_sites,
    hidden_in,
    inputs_of,
    token_rows,
)
from duquantpp_jax.recipes import recipe as named
from duquantpp_jax.rounding import Rtn
from duquantpp_jax.rounding.gptq import steady

M = TypeVar("M", bound=nnx.Module)
Patterns = str | Sequence[str]


def run(module: nnx.Module, batch: Any) -> Any:
    """Calls the module with a batch; with its members, if the batch is a tuple."""
    return module(*batch) if isinstance(batch, tuple) else module(batch)  # type: ignore[operator]


def quantize(
    module: M,
    recipe: Recipe | str,
    batches: Iterable[Any],
    *,
    include: Patterns = "*",
    exclude: Patterns = (),
    pad: bool = False,
    seed: int = 0,
    qat: bool = False,
    call: Callable[[M, Any], Any] = run,
) -> tuple[M, ModuleReport]:
    """Quantizes the linears of a flax nnx module.

    Every nnx.Linear, nnx.LinearGeneral and nnx.Einsum that is a product with one matrix becomes an
    `MXLinear`. What cannot be treated is left in float, and the report says why. The given module
    stays as it is. Calibration runs a copy in evaluation mode (`module.eval()`); the result is in
    the mode of the given module.

    >>> import numpy as np
    >>> from flax import nnx
    >>> linears = [nnx.Linear(64, 64, rngs=nnx.Rngs(seed)) for seed in range(2)]
    >>> mlp = nnx.Sequential(linears[0], nnx.relu, linears[1])
    >>> x = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    >>> quantized, report = quantize(mlp, "rtn", [x])
    >>> isinstance(quantized.layers[0], MXLinear)
    True
    >>> quantized(x).shape, [row["linear"] for row in report.linears]
    ((64, 64), ['layers.0', 'layers.2'])

    Args:
      recipe: The method, or the name of a fit, as `recipes.recipe` takes it.
      batches: What the module is calibrated on, each as `call` takes it.
      include: Patterns of the paths that are quantized, such as `blocks.*.mlp.*`.
      exclude: Patterns of paths among these that are left in float.
      pad: Widen inputs that blocks do not divide, with zeros (exact).
      seed: For fits that draw random numbers.
      qat: Keep the moved weights as float parameters (nnx.Param) that are rounded at each call, to
        train them; `convert` then stores them as codes. They start as the rounding left them (a
        warning counts those that the format, which chooses scales anew, rounds otherwise), and
        unrounded where they are rounded to nearest.
      call: Runs the module on a batch.

    Returns:
      A module that is called as the given one, and the report.

    Raises:
      ValueError: Nothing can be quantized, a pattern matches no linear, an input or a fit has NaN,
        or the rounding compares the quantized path with the float one, which takes a walk.
    """
    method = named(recipe) if isinstance(recipe, str) else recipe
    batches = list(batches)
    _check(module, method, batches)
    found, left = _find(module)
    chosen = _chosen(found, left, include, exclude)

    def watching(chosen: Mapping[str, Any]) -> tuple[Callable[..., Any], Any, Log]:
        watched, log = nnx.clone(module), Log()
        watched.eval()
        makers = {path: functools.partial(Watched, path=path, log=log) for path in chosen}
        graph, state = nnx.split(_replaced(watched, makers))
        return functools.partial(inputs_of, graph, call, log), state, log

    sites, given = [], (batches, method, left, pad)
    look_at, state, log = watching(chosen)
    try:
        if chosen:
            sites = find_sites(look_at, state, log, chosen, *given)
    except Exception:  # whatever JAX and flax say of state that changes where it must not
        if not (hidden := hidden_in(look_at, state, log, batches)):
            raise
        left |= hidden
        chosen = {path: linear for path, linear in chosen.items() if path not in hidden}
        look_at, state, log = watching(chosen)
        sites = find_sites(look_at, state, log, chosen, *given)
    if not sites:
        why = "; ".join(f"{path} {reason}" for path, reason in left.items())
        raise ValueError(f"no linear of the module can be quantized: {why or 'it has none'}")

    @jax.jit
    def rows_of(state: Any, batch: Any) -> dict[str, list[Array]]:
        inputs = look_at(state, batch)
        return {s.name: [token_rows(s.contraction, x) for x in inputs[s.name]] for s in sites}

    given = functools.partial(rows_of, state), sites, batches
    calibrate = functools.partial(calibrate_sites, *given)
    plain, fits, rows, made = calibrate(method.needs), {}, [], {}
    for site in sites:
        warn_of_few_tokens(site.name, method, site.width, int(plain[site.name].count))
        check_input(site.name, plain[site.name], "before it is moved")
        key = jax.random.fold_in(jax.random.key(seed), list(found).index(site.name))
        weights = site.matrices(chosen)
        with about(site.name):
            fits[site.name] = fit_linear(method, weights, plain[site.name], key)
        check_fit(site.name, fits[site.name])
    if needs := method.rounding.needs:
        moved = calibrate(needs, fits, method)
    else:
        moved = {
            name: keep(stats, Needs.NOTHING).through(fits[name].transform)
            for name, stats in plain.items()
        }
    for site in sites:
        fitted, own, weights = fits[site.name], moved[site.name], site.matrices(chosen)
        check_input(site.name, own, "after it is moved")
        with about(site.name):
            steadied = dataclasses.replace(method, rounding=steady(method.rounding, own))
            rounded = quantize_linear(steadied, weights, own, fitted, own)
        moves = Quantized(dataclasses.replace(rounded, weights=()))
        rows += module_rows(site.paths, method, plain[site.name], weights, rounded)
        for path, w, q in zip(site.paths, fitted.weights or weights, rounded.weights, strict=True):
            start: Any = q
            if qat and isinstance(q, MXArray):
                wide = pad_channels(w.astype(jnp.float32), site.width)
                nearest = isinstance(method.rounding, Rtn)
                start = fitted.transform.weights(wide) if nearest else _start(path, method, q)
            made[path] = functools.partial(MXLinear, moves=moves, weight=start, recipe=method)
    return _replaced(nnx.clone(module), made), ModuleReport(rows, dict(sorted(left.items())))


def _start(path: str, recipe: Recipe, rounded: MXArray) -> Array:
    """Rounded weights as parameters; warns of those that the format rounds to other numbers."""
    start = rounded.dequantize()
    other = int(jnp.sum(recipe.weight_format.fake_quantize(start) != start))
    if other:
        warn("%s: %d of %d weights start elsewhere than the rounding left them: the format chooses "
             "other scales for them", path, other, start.size)  # fmt: skip
    return start


def convert(module: M) -> M:
    """The module with the weights that were trained (`qat=True`) rounded and stored as codes.

    >>> import numpy as np
    >>> from flax import nnx
    >>> linear = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    >>> x = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    >>> trained, _ = quantize(linear, "rtn", [x], qat=True)  # train it, then
    >>> convert(trained).weight.get_value().elements.dtype.name
    'float4_e2m1fn'
    """

    def stored(_: Any, node: Any) -> Any:
        if isinstance(node, MXLinear) and isinstance(node.weight, nnx.Param):
            node.weight = Quantized(node.formats[0].quantize(node.weight[...]))
        return node

    return nnx.recursive_map(stored, nnx.clone(module))


def _check(module: nnx.Module, recipe: Recipe, batches: Sequence[Any]) -> None:
    """Raises ValueError where nothing of this can be done."""
    if isinstance(module, Decoder):
        raise ValueError("a Decoder is quantized by quantize_decoder, with a Plan")
    if not isinstance(module, nnx.Module):
        raise ValueError(f"a {type(module).__name__} is no flax nnx module: give an nnx.Module")
    if not batches:
        raise ValueError("there are no batches: give at least one to calibrate on")
    if Needs.CROSS in recipe.needs | recipe.rounding.needs:
        raise ValueError(
            "a rounding that compares the quantized path with the float one (asymmetric) takes a "
            "walk over the layers of a Decoder: use gptq"
        )


def _name(path: tuple[Any, ...]) -> str:
    """As in `blocks.0.attention.query`; a point for the module itself."""
    return ".".join(map(str, path)) or "."


def _modules(module: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Each module inside, once, by its path."""
    for path, inner in nnx.iter_modules(module):
        yield _name(path), inner


def _find(module: nnx.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """The linears by their paths, and what else holds a matrix, with the reason why it stays."""
    owners: dict[int, list[str]] = {}
    for path, inner in _modules(module):
        for value in vars(inner).values():
            if isinstance(value, nnx.Variable):
                owners.setdefault(id(value), []).append(path)
    found, left = {}, {}
    for path, inner in _modules(module):
        if not isinstance(inner, LINEARS):
            own = {name: v for name, v in vars(inner).items() if isinstance(v, nnx.Param)}
            matrices = [name for name, value in own.items() if jnp.ndim(value.get_value()) > 1]
            if matrices:
                left[path] = f"is no linear: {type(inner).__name__} with {', '.join(matrices)}"
            continue
        others = [other for other in owners[id(inner.kernel)] if other != path]
        try:
            Contraction.of(inner)
            if others:
                raise ValueError(f"shares its kernel with {', '.join(others)}")
            found[path] = inner
        except ValueError as error:
            left[path] = str(error)
    return found, left


def _chosen(
    found: Mapping[str, Any], left: dict[str, str], include: Patterns, exclude: Patterns
) -> dict[str, Any]:
    """The linears that are asked for; the paths of the others go to what is left."""
    matched = {}
    for option, given in {"include": include, "exclude": exclude}.items():
        patterns = (given,) if isinstance(given, str) else given
        matched[option] = set()
        for pattern in patterns:
            names = fnmatch.filter(found, pattern)
            if not names and pattern != "*":
                like = f": their paths are like {min(found)}" if found else ""
                raise ValueError(f"{option}={pattern!r} matches no linear{like}")
            matched[option] |= set(names)
    left |= {path: "is not included" for path in found if path not in matched["include"]}
    left |= dict.fromkeys(matched["exclude"], "is excluded")
    return {path: found[path] for path in found if path in matched["include"] - matched["exclude"]}


def _replaced(module: M, makers: Mapping[str, Callable[[Any], nnx.Module]]) -> M:
    """The module with what `makers` make of the modules at these paths, wherever they are used."""

    def replace(path: tuple[Any, ...], node: Any) -> Any:
        make = makers.get(_name(path)) if isinstance(node, LINEARS) else None
        return node if make is None else make(node)

    return nnx.recursive_map(replace, module)
