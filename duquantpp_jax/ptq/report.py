"""Reports: what quantizing each linear alone costs, and what stays to be done online."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from duquantpp_jax.core import Format, MXArray, Recipe, Stats
from duquantpp_jax.core.notices import NotFinite
from duquantpp_jax.models.parameters import SITES, expert_name, experts, layer_prefix
from duquantpp_jax.models.products import matmul
from duquantpp_jax.ptq.experts import FEWEST, parts_of
from duquantpp_jax.ptq.fuse import online_cost
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.site import QuantizedSite, layer_of, pad_channels, quantize_input
from duquantpp_jax.ptq.walk import QuantizedLayer, State
from duquantpp_jax.recipes import format_name


def report_layer(plan: Plan, number: int, layer: QuantizedLayer) -> list[dict[str, Any]]:
    """A row for each quantized linear of a layer, as report.json has it (docs/quantize.md)."""
    report = []
    for site, sample in layer.samples.items():
        names = plan.names(site, number)
        weights = tuple(layer.parameters[name].astype(jnp.float32) for name in names)
        rounded = tuple(q for q in layer.sites[site].weights if isinstance(q, MXArray))
        quantized = dataclasses.replace(layer.sites[site], weights=rounded)
        format = plan.recipes[site].activation_format
        count = experts(plan.config, site)
        for number_of, part in enumerate(parts_of(count, sample, weights, quantized)):
            seen: dict[str, Any] = {}
            if count:
                tokens = int(layer.counts[site][number_of])
                seen = {"tokens": tokens, "pooled": tokens < FEWEST}
            energies = sensitivity(*part, format=format)
            inside = (expert_name(name, number_of) if count else name for name in names)
            own = [layer_prefix(number) + name for name in inside]
            report += [row | seen for row in _rows(own, part[2], energies, sample.shape[-1])]
    return report


def _rows(
    names: Sequence[str], site: QuantizedSite, energies: Any, width: int
) -> list[dict[str, Any]]:
    """A row for each linear of a site, of what `sensitivity` says of it; NotFinite if that is NaN
    or Inf."""
    for name, sums in zip(names, energies, strict=True):
        if wrong := np.count_nonzero(~np.isfinite(np.asarray(sums))):
            raise NotFinite(
                f"{name}: {wrong} of {len(sums)} sums of squares, of its outputs, its weights and "
                "their errors on the calibration rows, are NaN or Inf: the model overflows in "
                "float32, and cannot be quantized on them"
            )
    online = online_cost(site.transform, width)
    return [
        {
            "linear": name,
            "bytes": storage_bytes(q),  # type: ignore[arg-type]
            "sqnr_db": _decibel(signal, error),
            "weight_error": float(weight_error) / max(float(signal), 1e-30),
            "online_multiply_adds": online.multiply_adds,
            "online_bytes": online.bytes,
        }
        for name, q, (signal, error, weight_error, *_) in zip(
            names, site.weights, energies, strict=True
        )
    ]


@dataclasses.dataclass(frozen=True)
class ModuleReport:
    """What `quantize` made of a module; printed, a table.

    Attributes:
      linears: A row for each quantized linear, in the order of the calls: those of report.json
        (docs/quantize.md), the tokens that it saw, its formats, its number of weights and the SQNR
        of its moved weight.
      left: The paths of what is left in float, and why.
    """

    linears: list[dict[str, Any]]
    left: dict[str, str]

    def __str__(self) -> str:
        paths = [row["linear"] for row in self.linears] + [*self.left]
        wide = max(map(len, ["linear", *paths]))
        lines = [f"{'linear':{wide}}  {'weight':13}{'input':13} bits  SQNR of W  of y, dB"]
        for row in self.linears:
            formats = f"{row['weight_format']:13}{row['activation_format']:13}"
            sqnr = (row["weight_sqnr_db"], row["sqnr_db"])
            weight, output = ("-" if x is None else f"{x:.1f}" for x in sqnr)
            bits = 8 * row["bytes"] / row["weights"]
            lines.append(f"{row['linear']:{wide}}  {formats}{bits:5.2f}{weight:>11}{output:>10}")
        lines += [f"{path:{wide}}  float: {why}" for path, why in self.left.items()]
        return "\n".join(lines)


def module_rows(
    names: Sequence[str],
    recipe: Recipe,
    stats: Stats,
    weights: tuple[Float[Array, "_ _"], ...],
    site: QuantizedSite,
) -> list[dict[str, Any]]:
    """The rows of a ModuleReport for the linears of a site.

    Args:
      stats: Of its float input, as wide as the quantized weights.
      weights: In float, before they are moved.
    """
    weights = tuple(w.astype(jnp.float32) for w in weights)
    energies = sensitivity(stats.sample, weights, site, format=recipe.activation_format)
    rows = _rows(names, site, energies, stats.sample.shape[-1])
    about = {
        "tokens": int(stats.count),
        "weight_format": format_name(recipe.weight_format),
        "activation_format": format_name(recipe.activation_format),
    }
    for row, w, (*_, moved, error) in zip(rows, weights, energies, strict=True):
        row |= about | {"weights": w.size, "weight_sqnr_db": _decibel(moved, error)}
    return rows


def costs_by_site(state: State) -> dict[str, dict[str, float]]:
    """What moving the inputs of each site costs while the model runs.

    `multiply_adds` are for each value of its input, mean over layers and experts; `bytes` are of
    all of them.
    """
    runs = state if isinstance(state, tuple) else (state,)
    found = {}
    for site in SITES:
        costs = [
            online_cost(transform, shape[-1])
            for run in runs
            for shape in [run[site].weights[0].shape]
            for number in range(shape[0])
            for (transform,) in parts_of(sum(shape[1:-2]), layer_of(run[site].transform, number))
        ]
        found[site] = {
            "multiply_adds": sum(cost.multiply_adds for cost in costs) / len(costs),
            "bytes": sum(cost.bytes for cost in costs),
        }
    return found


def storage_bytes(q: MXArray) -> int:
    """Bytes of an array as it is stored: packed codes, scales, tensor scale; of shapes alone."""
    scale = q.scales.size * q.scales.dtype.itemsize
    return -(-q.elements.size * q.element.bits // 8) + scale + 4 * (q.tensor_scale is not None)


@functools.partial(
    jax.jit, static_argnames="format", compiler_options={"xla_gpu_autotune_level": 0}
)  # its products run once a layer: trying tilings for them took longer than all of them
def sensitivity(
    sample: Float[Array, "tokens k"],
    weights: tuple[Float[Array, "_ _"], ...],
    site: QuantizedSite,
    *,
    format: Format,
) -> list[tuple[Float[Array, ""], ...]]:
    """What quantizing costs each linear alone, on a sample of its float input.

    Args:
      sample: Tokens, as wide as the quantized weights.
      weights: In float; maybe narrower.

    Returns:
      For each linear the energies sum y^2, sum (y - y^)^2 and sum (x^ (W' - W^)^T)^2: of the
      output, of its error, and of the part of it that rounding the weights alone gives; W' is
      moved, W^ rounded, x^ the moved and quantized input. Then sum W'^2 and sum (W' - W^)^2.
    """
    seen = quantize_input(sample, site, format)

    def energies(w: Float[Array, "n _"], q: MXArray) -> tuple[Array, ...]:
        y, rounded = matmul(sample[:, : w.shape[-1]], w), q.dequantize()
        moved = site.transform.weights(pad_channels(w, sample.shape[-1]))
        off = moved - rounded
        parts = (y, y - matmul(seen, rounded), matmul(seen, off), moved, off)
        return tuple(jnp.sum(jnp.square(part)) for part in parts)

    return [energies(w, q) for w, q in zip(weights, site.weights, strict=True)]  # type: ignore[arg-type]


def _decibel(signal: Float[Array, ""], error: Float[Array, ""]) -> float | None:
    """Signal to noise in dB; None if either is zero."""
    if not (signal > 0 and error > 0):
        return None
    return float(10 * np.log10(np.float64(signal) / np.float64(error)))
