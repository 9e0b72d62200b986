"""GPTQ on MX blocks: later columns compensate for the rounding error of each column.

With H = X^T X / tokens of the input as the linear will see it (moved and quantized), damped, and
H^-1 = U^T U, U upper triangular, the columns j of W are rounded in order:

    q_j = round(w_j),    w_i <- w_i - (w_j - q_j) U_ji / U_jj    for i > j.

The scale of a block is chosen when its first column is reached, from the block as it then is.
A row that ends with a larger (w - q) H (w - q)^T than round-to-nearest has is rounded to nearest.

Source: GPTQ, Frantar et al., arXiv 2210.17323; on MX blocks as MR-GPTQ, arXiv 2509.23202.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from duquantpp_jax.core import Format, MXArray, Needs, Rounding, Stats
from duquantpp_jax.core.notices import NotFinite, warn
from duquantpp_jax.formats.elements import encode
from duquantpp_jax.rounding.clip import Search

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """Columns in turn; later ones compensate for the error of each (GPTQ).

    Attributes:
      damping: Added to H's diagonal, in units of its mean.
      search: Of each block's scale when the block is reached, weighted by H's diagonal; each block
        has a scale of its own, also where the search shares one in a row.
    """

    damping: float = 0.01
    search: Search | None = None
    needs = Needs.GRAM

    def __call__(self, w: Float[Array, "n k"], format: Format, stats: Stats) -> MXArray:
        """See `gptq`; ValueError if the Stats hold no Gram matrix."""
        return gptq(w, format, mean_gram(stats, "GPTQ"), self.damping, self.search)


@functools.partial(jax.jit, static_argnames=("format", "search"))
def gptq(
    w: Float[Array, "n k"],
    format: Format,
    gram: Float[Array, "k k"],
    damping: float | Float[Array, ""] = 0.01,
    search: Search | None = None,
) -> MXArray:
    """W rounded to the format, columns in order, each block's scale chosen when it is reached.

    Args:
      format: Of the weight. A scale that depends on the whole tensor (log256) depends on the block
        of columns here.
      gram: X^T X / tokens of the moved and quantized input.
    """
    (rows, width), size = w.shape, format.block_size
    h = damped(gram, damping)
    u = inverse_factor(h)
    importance = jnp.diagonal(gram)

    def to_nearest(w: Array, importance: Array, **given: Array) -> MXArray:
        return (
            search.encode(w, format, importance, **given) if search else format.encode(w, **given)
        )

    nearest = to_nearest(w, importance)
    given = {} if nearest.tensor_scale is None else {"tensor_scale": nearest.tensor_scale}
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size)

    def block(w: Float[Array, "n k"], first: Array) -> tuple[Array, MXArray]:
        part, u_rows = cut(w, first, axis=1), cut(u, first, axis=0)
        u_part = cut(u_rows, first, axis=1)
        grid = to_nearest(part, cut(importance, first), **given)
        scale = grid.limit()[:, 0] / jnp.float32(grid.element.max)
        scale = jnp.where(scale > 0, scale, 1.0)  # of zeros, the least scale there is: subnormal

        def column(part: Float[Array, "n size"], j: Array) -> tuple[Array, tuple[Array, Array]]:
            x = part[:, j]
            codes = encode(x / scale, jnp.zeros((), jnp.int32), grid.element)
            error = (x - grid.element.decode(codes) * scale) / u_part[j, j]
            return part - error[:, None] * u_part[j], (codes, error)

        _, (codes, errors) = jax.lax.scan(column, part, jnp.arange(size))
        # U is zero left of its diagonal, and this block's columns are done with.
        w = w - jnp.matmul(errors.T, u_rows, precision=HIGHEST)
        return w, dataclasses.replace(grid, elements=codes.T, tensor_scale=None)

    _, blocks = jax.lax.scan(block, w, jnp.arange(0, width, size))
    rounded = dataclasses.replace(
        nearest,
        elements=blocks.elements.swapaxes(0, 1).reshape(rows, width),
        scales=blocks.scales[..., 0].T,
    )
    # Not `>`, which NaN passes.
    fine = weighted_error(w, rounded, h) <= weighted_error(w, nearest, h)
    return nearest.where(~fine[:, None], rounded).stored()


def steady(rounding: Rounding, stats: Stats) -> Rounding:
    """The rounding with its damping times the least power of ten that lets the Gram matrix be
    factorized; warns if that is not one.

    Args:
      rounding: One with a field `damping`, or with a rounding inside that has one; another is
        returned as it is.

    Raises:
      NotFinite: No damping does: the matrix has NaN or Inf.
    """
    if (inner := getattr(rounding, "rounding", None)) is not None:
        rounding = dataclasses.replace(rounding, rounding=steady(inner, stats))  # type: ignore
    damping = getattr(rounding, "damping", None)
    if stats.gram is None or damping is None:
        return rounding
    gram = mean_gram(stats, who := type(rounding).__name__)
    for times in 10.0 ** np.arange(8):
        if bool(_factorizes(gram, damping * times)):
            break
    else:
        wrong = np.count_nonzero(~np.isfinite(np.asarray(gram)))
        raise NotFinite(
            f"the Gram matrix of the moved input has NaN or Inf in {wrong} of {gram.size} numbers"
            if wrong
            else f"the Gram matrix of the moved input cannot be factorized, damped by {damping:g}"
        )
    if times == 1:
        return rounding
    warn("%s: damping raised from %g to %g, so that the Gram matrix of %d tokens can be "
         "factorized", who, damping, damping * times, int(stats.count))  # fmt: skip
    return dataclasses.replace(rounding, damping=float(damping * times))  # type: ignore[type-var]


@jax.jit
def _factorizes(gram: Float[Array, "k k"], damping: Float[Array, ""] | float) -> Bool[Array, ""]:
    return jnp.all(jnp.isfinite(jnp.linalg.cholesky(damped(gram, damping))))


def mean_gram(stats: Stats, who: str) -> Float[Array, "k k"]:
    """X^T X / tokens; if the Stats hold no Gram matrix, ValueError says that `who` needs it."""
    return stats.require(Needs.GRAM, who) / jnp.maximum(stats.count, 1).astype(jnp.float32)


def damped(gram: Float[Array, "k k"], damping: float | Float[Array, ""]) -> Float[Array, "k k"]:
    """gram + damping * mean(diagonal) * I, so that dead channels do not make it singular."""
    mean = jnp.mean(jnp.diagonal(gram))
    ridge = jnp.where(mean > 0, damping * mean, 1.0)
    return gram + ridge * jnp.eye(gram.shape[0], dtype=gram.dtype)


def inverse_factor(h: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """U, upper triangular, with H^-1 = U^T U.

    With the order of channels reversed, Cholesky gives H = V V^T, V upper triangular; U = V^-1.
    """
    v = jnp.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    eye = jnp.eye(h.shape[0], dtype=h.dtype)
    return jax.scipy.linalg.solve_triangular(v, eye, lower=False)


def weighted_error(
    w: Float[Array, "n k"], q: MXArray, h: Float[Array, "k k"]
) -> Float[Array, " n"]:
    """(w - q) H (w - q)^T of each row: the expected squared error of its output."""
    error = w - q.dequantize()
    return jnp.sum(jnp.matmul(error, h, precision=HIGHEST) * error, axis=1)
