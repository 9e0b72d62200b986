"""RTN: every number of a moved weight to the nearest that its format has."""

import dataclasses

from jaxtyping import Array, Float

from duquantpp_jax.core import Format, MXArray, Needs, Stats


@dataclasses.dataclass(frozen=True)
class Rtn:
    """Every number to the nearest that its format has.

    Source: OCP MX v1.0, section 6.3.
    """

    needs = Needs.NOTHING

    def __call__(self, w: Float[Array, "n k"], format: Format, stats: Stats) -> MXArray:
        """format.quantize(w), whatever the input looks like."""
        return format.quantize(w)


rtn = Rtn()
