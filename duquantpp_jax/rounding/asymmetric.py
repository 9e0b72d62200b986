"""Asymmetric regression: weights first fitted to what the float model does, on quantized inputs.

With W the moved weight, X the moved input of the float model and X^ the moved and quantized input
of the quantized one, all before the linear already rounded, the output X^ W*^T is nearest to the
float one, X W^T, for the ridge regression

    W* = argmin |X^ W*^T - X W^T|^2 + l |W* - W|^2 = W (X^T X^ + l I) (X^^T X^ + l I)^-1,

which another rounding then rounds for X^. No gradient is taken. The drift of the residual stream
itself is not corrected: no linear sees it in its input.

Source: asymmetric calibration as in GPTAQ, Li et al., arXiv 2504.02692; here solved in closed form.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from duquantpp_jax.core import Format, MXArray, Needs, Rounding, Stats
from duquantpp_jax.rounding.gptq import GPTQ, HIGHEST, damped


@dataclasses.dataclass(frozen=True)
class Asymmetric:
    """Weights fitted to the float output on quantized inputs, then rounded by `rounding`.

    Attributes:
      damping: l, in units of the mean diagonal of X^^T X^.
      rounding: Of W*, for the quantized path's input.
    """

    damping: float = 0.1
    rounding: Rounding = dataclasses.field(default_factory=GPTQ)
    needs = Needs.GRAM | Needs.CROSS

    def __call__(self, w: Float[Array, "n k"], format: Format, stats: Stats) -> MXArray:
        """See the top of this file; ValueError if the Stats lack a matrix."""
        gram, cross = (stats.require(n, "asymmetric") for n in (Needs.GRAM, Needs.CROSS))
        return self.rounding(regressed(w, gram, cross, self.damping), format, stats)


def regressed(
    w: Float[Array, "n k"], gram: Float[Array, "k k"], cross: Float[Array, "k k"], damping: float
) -> Float[Array, "n k"]:
    """W*, from X^^T X^ and X^T X^."""
    wanted = jnp.matmul(w, cross - gram, precision=HIGHEST)
    return w + jax.scipy.linalg.solve(damped(gram, damping), wanted.T, assume_a="pos").T
