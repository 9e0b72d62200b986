"""What `formats` gives: two passes over x on a GPU, as XLA does not fuse a maximum with its use."""

from jaxtyping import Array, Float, UInt8

from duquantpp_jax.core import ScaleRule
from duquantpp_jax.formats import MXFP4
from duquantpp_jax.formats.packing import pack_elements


def quantize_pack(
    x: Float[Array, "*batch k"], rule: ScaleRule
) -> tuple[UInt8[Array, "*batch bytes"], UInt8[Array, "*batch blocks"]]:
    """Packed codes and scale bytes."""
    q = MXFP4(scale_rule=rule).encode(x)
    return pack_elements(q), q.scale_bytes()
