"""What does a massive outlier do to each method?

Hypothesis: nothing breaks; rotations pay with precision, and transforms that are fitted to second
  moments with a condition number that only a bound keeps from blowing rounding errors up.
Method: the inputs of one linear of the embedded model, before its second down_proj, as they are;
  with one channel at 1150 times the median channel (as before the second down_proj of
  Llama-3.2-1B) in all tokens, its column of the weight divided by as much, so that the outputs stay
  as they are; and with one such activation, in the first token of each row alone. Each recipe is
  fitted on half of the rows. Reported of its transform, all in float64: the condition number (of
  the worst block, where it keeps blocks of 32 apart), the distance from orthogonal
  max |T T^T - I| (of rotations) and from the law; and of the quantized
  linear, on the other rows without their first token, the mean share of an output's energy that is
  error, in dB. A result that is not finite is an error.
Command: python -m experiments.health [--rule floor] [--rows 8] [--recipes ...] --out FILE
Cost: three minutes on two busy cores.
Last result: see results/gutenberg27m.md.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from duquantpp_jax import files
from duquantpp_jax.checkpoints import load, testbed
from duquantpp_jax.core import Needs, Stats, Transform, diagonal_blocks
from duquantpp_jax.evaluation.subject import environment
from duquantpp_jax.models import dense
from duquantpp_jax.ptq.site import QuantizedLinear, fit_linear, quantize_linear
from duquantpp_jax.recipes import FITS, recipe

SITE, LAYER = "mlp_out", 1
CHANNEL = 37
CASES = ("as is", "channel", "token")
SPIKE = 1150.0
"""The largest channel over the median of Llama-3.2-1B, before its second down_proj."""


class Health(NamedTuple):
    """The numerical errors of a transform; the largest over its blocks, NaN where T is not finite.

        condition            s_max(T) / s_min(T), the most by which T^-1 may amplify rounding errors
        orthogonality_error  max |T T^T - I|
        law_error            max |T (T^-T)^T - I|, the error of the law of transforms

    To bound the condition, use `FitWush(max_condition=...)`.
    """

    condition: float
    orthogonality_error: float
    law_error: float


def matrices(
    transform: Transform, width: int, size: int | None = None
) -> tuple[Float[np.ndarray, "blocks r r"], Float[np.ndarray, "blocks r r"]]:
    """T and T^-T as their diagonal blocks, computed in float64.

    Args:
      transform: Of a single layer.
      width: Channels k.
      size: Side of the diagonal blocks; None for a single block of side k.

    Raises:
      ValueError: T has entries outside the blocks.
    """
    size = width if size is None else size

    def exact(leaf: Array) -> Array:
        return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    with jax.enable_x64(True):
        transform = jax.tree.map(exact, transform)
        t, back, outside = map(np.asarray, diagonal_blocks(transform, width, size))
    if np.isfinite(t).all() and not outside <= 1e-9 * max(1.0, np.abs(t).max()):
        raise ValueError(f"the transform mixes channels beyond blocks of {size}: give no size")
    return t, back


def health(transform: Transform, width: int, size: int | None = None) -> Health:
    """Condition number, orthogonality error and error of the law; arguments as of `matrices`."""
    t, back = matrices(transform, width, size)
    eye = np.eye(t.shape[-1])
    if not (np.isfinite(t).all() and np.isfinite(back).all()):
        return Health(np.nan, np.nan, np.nan)
    return Health(
        condition=float(np.linalg.cond(t).max()),
        orthogonality_error=float(np.abs(t @ t.swapaxes(1, 2) - eye).max()),
        law_error=float(np.abs(t @ back.swapaxes(1, 2) - eye).max()),
    )


def inputs(rows: int) -> tuple[jax.Array, jax.Array]:
    """Inputs of the linear [rows, 511, k], and its weight."""
    model = load(testbed.directory())

    @jax.jit
    def capture(tokens):
        def linear(site, x, weights, state):
            return dense(site, x, weights, state)[0], x if site == SITE else None

        return model(tokens, linear)[1][SITE][LAYER]

    tokens = jnp.asarray(testbed.calibration_rows()[:rows, :-1])
    return capture(tokens), model.weights(SITE)[0][LAYER].astype(jnp.float32)


def planted(x: jax.Array, w: jax.Array, where: str) -> tuple[jax.Array, jax.Array]:
    """The inputs and the weight with the outlier in them."""
    maxima = jnp.max(jnp.abs(x), axis=(0, 1))
    peak = SPIKE * jnp.median(maxima)
    match where:
        case "channel":
            factor = peak / maxima[CHANNEL]
            return x.at[..., CHANNEL].multiply(factor), w.at[:, CHANNEL].divide(factor)
        case "token":
            return x.at[:, 0, CHANNEL].set(peak), w
    return x, w


def measure(name: str, rule: str, x: jax.Array, w: jax.Array) -> dict[str, float]:
    """One recipe on one set of inputs.

    Raises:
      ValueError: Something is not finite.
    """
    half = len(x) // 2
    width = x.shape[-1]
    stats = Stats.init(
        width, half, x.shape[1], needs=Needs.GRAM | Needs.POSITIONS, sample_limit=2048
    ).update(x[:half], jnp.int32(0))
    method = recipe(name, rule)
    fitted = fit_linear(method, (w,), stats, jax.random.key(0))
    site = quantize_linear(method, (w,), stats, fitted)
    seen = x[half:, 1:].reshape(-1, width)
    (y,), _ = QuantizedLinear(method.activation_format)(SITE, seen, (w,), site)
    wanted = np.asarray(seen, np.float64) @ np.asarray(w, np.float64).T
    error = np.sum((np.asarray(y, np.float64) - wanted) ** 2, axis=-1)
    try:
        found = health(fitted.transform, width, method.activation_format.block_size)
    except ValueError:  # it mixes blocks
        found = health(fitted.transform, width)
    row = {
        "condition": found.condition,
        "orthogonality_error": found.orthogonality_error,
        "law_error": found.law_error,
        "sqnr_db": float(-10 * np.log10(np.mean(error / np.sum(wanted**2, axis=-1)))),
    }
    if not np.isfinite(list(row.values())).all():
        raise ValueError(f"{name} under {rule} is not finite: {row}")
    return row


def table(results: dict[str, Any]) -> str:
    """The results as Markdown; errors are the largest of the three cases."""
    heads = [f"dB, {case}" for case in CASES] + [f"condition, {case}" for case in CASES]
    heads += ["orthogonality error", "law error"]
    lines = ["| recipe | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for name, cases in results["recipes"].items():
        rows = [cases[case] for case in CASES]
        numbers = [f"{row['sqnr_db']:.2f}" for row in rows]
        numbers += [f"{row['condition']:.4g}" for row in rows]
        rotates = all(row["condition"] < 1.001 for row in rows)
        off = max(row["orthogonality_error"] for row in rows)
        numbers += [f"{off:.1e}" if rotates else "", f"{max(r['law_error'] for r in rows):.1e}"]
        lines.append(f"| {name} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rule", default="floor")
    parser.add_argument("--rows", type=int, default=8, help="half to fit on, half to measure")
    parser.add_argument("--recipes", nargs="+", default=list(FITS))
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    arguments = parser.parse_args()

    x, w = inputs(arguments.rows)
    found = {
        name: {case: measure(name, arguments.rule, *planted(x, w, case)) for case in CASES}
        for name in arguments.recipes
    }
    results = {
        "scale_rule": arguments.rule,
        "rows": arguments.rows,
        "recipes": found,
        "environment": environment(),
    }
    files.write_whole(arguments.out, files.to_json(results))
    print(table(results))


if __name__ == "__main__":
    main()
