"""The greedy rotation search of DuQuant and DuQuant++.

The base rotation B spreads channel 0 evenly: every entry of its row 0 is 1 / sqrt(n). With Givens
rotations G_i of the channels (i, i + 1), cos = 1 / sqrt(i + 2), sin = sqrt((i + 1) / (i + 2)),

    B = G_(n-2) ... G_1 G_0, then rows and columns 0 and n - 1 swapped.

B is mixed with a random orthogonal Q of side n - 1,

    T = B diag(1, Q)    as released, or    T = diag(1, Q) B    which keeps the even row 0,

and applied at the largest magnitude again and again. With X_0 the tokens of a block and A_0 = I,

    d_k = channel of max |X_k|,   S_k = T with rows and columns 0 and d_k swapped,
    X_(k+1) = X_k S_k,            A_(k+1) = A_k S_k,

and the result is the A_k of A_0, ..., A_steps whose X_k has the least criterion. DuQuant (2024) is
this search on blocks of 128, a zigzag permutation (permutation.py), and the search again.

Source: DuQuant, Lin et al., arXiv 2406.01721; DuQuant++, arXiv 2604.17789 and its released code,
where d_k is not the channel but the row of the maximum, mod n.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from duquantpp_jax.core import Fitted, Format, Needs, RandomKey, Recipe, Stats, Weights
from duquantpp_jax.transforms.block import BlockRotation, polished, rotation_size

HIGHEST = jax.lax.Precision.HIGHEST
Searched = tuple[Float[Array, "*blocks n n"], Float[Array, "*blocks"]]
"""Rotations and their criteria."""
MANY_ROWS = 1024
"""Least number of rows for which a CPU tries the rows with the largest norms first."""


def base_rotation(size: int) -> Float[np.ndarray, "size size"]:
    """B, in float64."""
    product = np.eye(size)
    for i in range(size - 1):
        cos, sin = 1 / np.sqrt(i + 2), np.sqrt((i + 1) / (i + 2))
        product[i : i + 2] = np.array([[cos, -sin], [sin, cos]]) @ product[i : i + 2]
    swap = np.r_[size - 1, 1 : size - 1, 0] if size > 1 else np.array([0])
    return product[np.ix_(swap, swap)]


def mixed_rotations(
    key: RandomKey, count: int, size: int, side: Literal["left", "right"]
) -> Float[Array, "count size size"]:
    """`count` draws of T: diag(1, Q) B for "left", B diag(1, Q) for "right"."""
    base = jnp.asarray(base_rotation(size), jnp.float32)
    q = jax.random.orthogonal(key, size - 1, (count,))
    mix = jnp.zeros((count, size, size)).at[:, 0, 0].set(1.0).at[:, 1:, 1:].set(q)
    a, b = (mix, base) if side == "left" else (base, mix)
    return jnp.matmul(a, b, precision=HIGHEST)


def greedy_search(
    x: Float[Array, "rows n"],
    rotations: Float[Array, "draws n n"],
    *,
    steps: int,
    index: Literal["channel", "released"] = "channel",
    criterion: Literal["absmax", "range", "mse"] = "absmax",
    format: Format | None = None,
) -> Searched:
    """The rotation A_k of least criterion over steps 0..steps, and this criterion.

    Args:
      x: X_0, the tokens of a block.
      rotations: T of each step, or a single T for all.
      index: d_k is the channel of the largest magnitude, or, as released, its row mod n.
      criterion: Of X_k: max |X|, max X - min X, or the squared error of `format`.
    """
    size = x.shape[1]
    channels = jnp.arange(size)

    def look(x: Float[Array, "rows n"]) -> tuple[Int[Array, ""], Float[Array, ""]]:
        """d and the criterion."""
        maxima = _largest(jnp.abs(x)) if index == "channel" else jnp.max(jnp.abs(x), axis=1)
        d = jnp.argmax(maxima) % size
        match criterion:
            case "absmax":
                return d, jnp.max(maxima)
            case "range":
                return d, jnp.max(x) - jnp.min(x)
            case "mse":
                if format is None:
                    raise ValueError("criterion mse measures a format's error: give the format")
                return d, jnp.mean(jnp.square(x - format.fake_quantize(x)))

    def step(carry: tuple) -> tuple:
        k, x, d, product, best, least = carry
        swap = jnp.where(channels == 0, d, jnp.where(channels == d, 0, channels))
        rotation = rotations[jnp.minimum(k, rotations.shape[0] - 1)][swap][:, swap]
        x = jnp.matmul(x, rotation, precision=HIGHEST)
        product = jnp.matmul(product, rotation, precision=HIGHEST)
        d, score = look(x)
        best = jnp.where(score < least, product, best)
        return k + 1, x, d, product, best, jnp.minimum(score, least)

    def search(x: Float[Array, "rows n"], bound: Array | None = None) -> Searched:
        """The result on these rows; stops early when the criterion falls below a bound."""

        def going(carry: tuple) -> Bool[Array, ""]:
            k, *_, least = carry
            return k < steps if bound is None else (k < steps) & (least >= bound)

        eye = jnp.eye(size, dtype=x.dtype)
        d, score = look(x)
        *_, best, least = jax.lax.while_loop(going, step, (jnp.int32(0), x, d, eye, eye, score))
        return best, least

    if (index, criterion) != ("channel", "absmax") or not _on_cpu() or len(x) < MANY_ROWS:
        return search(x)
    # A rotation makes no entry larger than the norm of its row, so rows whose norm is below the
    # least criterion do not matter: try the largest eighth of the rows, then the larger half.
    norms = jnp.nan_to_num(jnp.linalg.norm(x, axis=1), nan=jnp.inf, posinf=jnp.inf)
    order = jnp.argsort(-norms)
    x, norms = x[order], norms[order]

    def among_largest(parts: tuple[int, ...]) -> Searched:
        if not parts:
            return search(x)
        count = len(x) // parts[0]
        bound = 1.001 * norms[count]  # norms drift by 1e-5 in float32
        found = search(x[:count], bound)
        enough = found[1] >= bound
        return jax.lax.cond(enough, lambda: found, lambda: among_largest(parts[1:]))

    return among_largest((8, 2))


def _largest(x: Float[Array, "rows n"]) -> Float[Array, " n"]:
    """The maximum over rows; on a CPU by halves, which XLA vectorizes as it does not jnp.max."""
    if not _on_cpu():
        return jnp.max(x, axis=0)
    while (rows := x.shape[0]) > 1:
        half = (rows + 1) // 2
        x = jnp.maximum(x[:half], x[rows - half :])
    return x[0]


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


@dataclasses.dataclass(frozen=True)
class FitDuquantpp:
    """DuQuant++: the greedy search, for each block or for all blocks pooled.

    Attributes:
      index, criterion, steps: As in `greedy_search`.
      sharing: "per_block" fits a rotation for each block, "shared" a single rotation.
      fresh_q: Draw Q at each step, or once for the search. All blocks share the draws.
      q_side: Side of B on which diag(1, Q) is.
      averaged: Search on the mean over calibration rows at each position, as released, and not on
        a sample of tokens.
      size: Rotation size, or None for the full width, for which `fresh_q=False` saves memory.
      seeds: Number of searches with other draws; each block keeps the result of least criterion.
      polish: Make the result orthogonal to the last bit; without, it is off by about 1e-6.
    """

    index: Literal["channel", "released"] = "channel"
    criterion: Literal["absmax", "range", "mse"] = "absmax"
    sharing: Literal["per_block", "shared"] = "per_block"
    fresh_q: bool = True
    q_side: Literal["left", "right"] = "left"
    averaged: bool = False
    steps: int = 128
    size: int | None = 32
    seeds: int = 1
    polish: bool = True
    draws = True

    def shared(self) -> "FitDuquantpp":
        return dataclasses.replace(self, sharing="shared")

    @property
    def needs(self) -> Needs:
        """Means by position if `averaged`, the formats for "mse"."""
        positions = Needs.POSITIONS if self.averaged else Needs.NOTHING
        return positions | (Needs.FORMATS if self.criterion == "mse" else Needs.NOTHING)

    def __call__(self, weights: Weights, stats: Stats, recipe: Recipe, key: RandomKey) -> Fitted:
        tokens = stats.sample
        if self.averaged:
            tokens = stats.position_mean("DuQuant++ averaged over rows")
        format = recipe.activation_format if self.criterion == "mse" else None
        search = functools.partial(_fit_blocks, tokens, fit=self, format=format)
        best, least = search(key)
        for seed in range(1, self.seeds):
            rotations, criterion = search(jax.random.fold_in(key, seed))
            best = jnp.where((criterion < least)[:, None, None], rotations, best)
            least = jnp.minimum(criterion, least)
        return Fitted(BlockRotation(polished(best) if self.polish else best))


@functools.partial(jax.jit, static_argnames=("fit", "format"))
def _fit_blocks(
    tokens: Float[Array, "tokens k"], key: RandomKey, *, fit: FitDuquantpp, format: Format | None
) -> Searched:
    size = rotation_size(fit.size, tokens.shape[-1])
    draws = fit.steps if fit.fresh_q else 1
    rotations = mixed_rotations(key, draws, size, fit.q_side)
    how = {"steps": fit.steps, "index": fit.index, "criterion": fit.criterion, "format": format}
    search = functools.partial(greedy_search, rotations=rotations, **how)
    if fit.sharing == "shared":
        best, least = search(tokens.reshape(-1, size))
        return best[None], least[None]
    blocks = tokens.reshape(tokens.shape[0], -1, size).swapaxes(0, 1)
    # A single block fits into the cache of a CPU; a GPU needs many at once.
    return jax.lax.map(search, blocks, batch_size=None if _on_cpu() else 64)
