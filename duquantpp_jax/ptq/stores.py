"""Formats of the key-value cache: float32, bfloat16, MXFP8, MXFP4, with keys rotated or not.

    k is kept as Q(k H),  v as Q(v),  and q is moved to q H:    (q H) (k H)^T = q k^T

for an orthogonal H, so that rotating costs no accuracy by itself. Keys have a few large channels
that are the same at every position; H = Hadamard / sqrt(d) spreads them over the head before they
are rounded. MX blocks lie along each head's channels.

Source: Ashkboos et al., QuaRot (arXiv:2404.00456), section 4, for rotated keys; OCP Microscaling
Formats v1.0 for the blocks.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from duquantpp_jax.core import MXArray, ScaleRule
from duquantpp_jax.formats import MX, MXFP4, MXFP8
from duquantpp_jax.formats.packing import pack_nibbles, unpack_nibbles
from duquantpp_jax.kernels.decode_attention.api import EVERYTHING, decode_attention, why_not
from duquantpp_jax.kernels.flash_attention.api import flash_attention
from duquantpp_jax.kernels.implementation import why_not_nvidia
from duquantpp_jax.models import Store
from duquantpp_jax.models.in_place import InPlace
from duquantpp_jax.recipes import known
from duquantpp_jax.transforms.block import multiply_blocks
from duquantpp_jax.transforms.hadamard import hadamard

FORMATS: dict[str, MX | np.dtype] = {
    "float32": jnp.dtype(jnp.float32),
    "bf16": jnp.dtype(jnp.bfloat16),
    "mxfp8": MXFP8(scale_rule=ScaleRule.RCEIL),
    "mxfp4": MXFP4(scale_rule=ScaleRule.EVEN),
}
"""By the names of `--cache`. MXFP8 has E4M3 elements.

The scale rules are those that cost least of floor, even and rceil on gutenberg-27m: under `floor`
the largest of a block saturates at 448 whenever it lies in (448, 512) times its scale, and KL is
1.6 times that of `rceil`, under which nothing saturates.
"""


def store(
    name: str, head_dim: int, *, rotate_keys: bool = False, implementation: str | None = None
) -> Store:
    """The store of a name in `FORMATS`; `rotate_keys` rotates queries and keys by H.

    >>> store("mxfp4", head_dim=32).format.block_size
    32

    Args:
      implementation: Of attention: "xla", or None for kernels where the device runs them: of a
        token over entries in bfloat16 `decode_attention`, of a prompt `flash_attention`.

    Raises:
      ValueError: An unknown name, or a head that the format's blocks or the matrix do not fit.
    """
    format = FORMATS[known("cache format", name, FORMATS)]
    if isinstance(format, MX) and head_dim % format.block_size:
        raise ValueError(
            f"head_dim {head_dim} is not a multiple of block {format.block_size}, which a cache "
            f"in {name} needs: choose --cache bf16 or float32"
        )
    if rotate_keys and head_dim & (head_dim - 1):
        raise ValueError(
            f"--rotate-keys needs a head_dim that is a power of two, and this model's is "
            f"{head_dim}: leave it out"
        )
    return HeadStore(format, rotate_keys, kernels=implementation != "xla")


@dataclasses.dataclass(frozen=True)
class HeadStore(Store):
    """Each head of each position in one format by itself."""

    format: MX | np.dtype
    rotate_keys: bool = False
    kernels: bool = True

    def attend(
        self,
        q: Float[Array, "rows length kv_heads groups head_dim"],
        entries: InPlace,
        positions: Int32[Array, "*rows length"],
        window: Int32[Array | np.ndarray, ""] | None,
        scalar: float,
        sinks: Float[Array, "kv_heads groups"] | None,
    ) -> Float[Array, "rows length kv_heads groups head_dim"]:
        """As `Store.attend`, by a kernel where there is one for it."""
        if not self.kernels:
            return super().attend(q, entries, positions, window, scalar, sinks)
        if sinks is not None or not self._of_a_token(q, entries):
            k, v = (self.decode(part).astype(q.dtype) for part in entries.own())
            return flash_attention(q, k, v, positions, window, scalar, sinks)
        at, (keys, values) = jnp.broadcast_to(positions[..., 0], q.shape[:1]), entries.arrays
        seen = EVERYTHING if window is None else jnp.asarray(window)
        options: Any = {"scale": scalar**-0.5, "window": seen}
        return decode_attention(q[:, 0], keys, values, entries.layer, at, **options)[:, None]

    def _of_a_token(self, q: Array, entries: InPlace) -> bool:
        """Whether `decode_attention` is for them here."""
        if isinstance(self.format, MX) or q.shape[1] > 1:
            return False
        return (why_not_nvidia() or why_not(q[:, 0], entries.arrays[0])) is None

    def move(self, x: Float[Array, "*batch head_dim"]) -> Float[Array, "*batch head_dim"]:
        """x H."""
        return multiply_blocks(x, hadamard(x.shape[-1])[None]) if self.rotate_keys else x

    def encode(self, x: Float[Array, "rows length heads head_dim"]) -> Any:
        """Bytes of codes (two a byte where they have four bits) and of scales; or x as a float."""
        if not isinstance(self.format, MX):
            return x.astype(self.format)
        q = self.format.encode(x)
        codes = pack_nibbles(q.codes()) if q.element.bits == 4 else q.codes()
        return codes, q.scale_bytes()

    def decode(self, entries: Any) -> Float32[Array, "rows length heads head_dim"]:
        """The numbers that the entries stand for."""
        if not isinstance(self.format, MX):
            return entries.astype(jnp.float32)
        element, (codes, scale_bytes) = self.format.element, entries
        codes = unpack_nibbles(codes) if element.bits == 4 else codes
        scales = jax.lax.bitcast_convert_type(scale_bytes, jnp.float8_e8m0fnu)
        q = MXArray(codes, scales, element=element, block_size=self.format.block_size)
        return q.dequantize()
