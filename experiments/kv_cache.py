"""In what format can keys and values be kept, and does rotating them help?

Hypothesis: keys have a few large channels, the same at every position, which a rotation of the head
  spreads; values have none, so rotating them gains nothing. In 8 bits neither matters.
Method: keys and values as a cache would give them back, blocks of 32 along each head; rotated by a
  Hadamard matrix of the head's width: not at all, the keys (and the queries, so that scores stay),
  or both (values are turned back when they are read). Linears in float, or in MXFP4 after a block
  Hadamard rotation. NVFP4 is left out: its second scale would depend on tokens still to come. The
  baseline of a column is its format without rotation.
Command: duquantpp ablate experiments/kv_cache.py --table
  or python -m experiments.kv_cache --table, with --model DIR --text FILE --calibration-text FILE
  for another model than the embedded one.
Cost: 30 cells; a quarter of an hour for gutenberg-27m on 2 CPU cores.
Last result, 2026-11-25 (commit d2ef735), 65,408 targets, jax 0.12.0.1 on 2 CPU cores
  (results/grid_kv_cache_*.json), KL with the linears in float, not rotated and with rotated keys:
  on gutenberg-27m MXFP4 .0355 and .0185 (floor), .0307 and .0162 (even), MXFP6 e2m3 .0019 and
  .0010, MXFP8 .0017 and .0009 (rceil; floor, which saturates, .0028 and .0012). Rotating the
  values as well changes nothing there (+.0003 to -.0001), as supposed. With the linears in MXFP4
  too, rotated keys gain .02 in an MXFP4 cache and next to nothing in 8 bits.
  A surprise on the embedded model: with the linears in MXFP4, rotating the values gains another
  .02 to .035 in every format, even where the cache has 8 bits and nothing of that size to lose.
  Values that are turned and turned back differ in their last bits, so what o_proj rounds differs:
  the same accident of one token as in position_zero.py is likely, and was not looked into. With
  the linears in float it does not happen.
  On SmolLM2-135M (2026-11-29, 8 development books, H200s), linears in float, not rotated, keys,
  keys and values rotated: MXFP4 .150 .090 .081 (floor), .136 .079 .075 (even), MXFP6 e2m3 .0079
  .0049 .0047, MXFP8 .0066 .0042 .0042 (rceil).
"""

import dataclasses
import sys
from typing import Any

from jaxtyping import Array, Float, Float32

from duquantpp_jax.commands.ablate import main
from duquantpp_jax.core import Format, ScaleRule
from duquantpp_jax.formats import E2M3, E4M3, MX, MXFP4
from duquantpp_jax.lab import Cell
from duquantpp_jax.ptq.stores import HeadStore
from duquantpp_jax.recipes import FITS
from duquantpp_jax.transforms.block import multiply_blocks
from duquantpp_jax.transforms.hadamard import hadamard


@dataclasses.dataclass(frozen=True)
class RotatedStore(HeadStore):
    """Rotates each head when it is encoded, and back when it is decoded."""

    def encode(self, x: Float[Array, "rows length heads head_dim"]) -> Any:
        """Q(x H)."""
        return super().encode(multiply_blocks(x, hadamard(x.shape[-1])[None]))

    def decode(self, entries: Any) -> Float32[Array, "rows length heads head_dim"]:
        """Q(x H) H^T, and Sylvester's H is symmetric."""
        x = super().decode(entries)
        return multiply_blocks(x, hadamard(x.shape[-1]).T[None])


FORMATS = {
    "mxfp4 floor": MXFP4(scale_rule=ScaleRule.FLOOR),
    "mxfp4 even": MXFP4(scale_rule=ScaleRule.EVEN),
    "mxfp6 e2m3": MX(E2M3, scale_rule=ScaleRule.EVEN),
    "mxfp8 e4m3 floor": MX(E4M3, scale_rule=ScaleRule.FLOOR),
    "mxfp8 e4m3 rceil": MX(E4M3, scale_rule=ScaleRule.RCEIL),
}
LINEARS = {"float": {}, "even": {"fit": FITS["block_hadamard"]}}
"""The scale rule of the linears, and how they are rotated."""


def _stores(format: Format) -> dict[str, HeadStore]:
    return {
        "none": HeadStore(format),
        "keys": HeadStore(format, rotate_keys=True),
        "keys and values": RotatedStore(format),
    }


CELLS = [
    Cell(rotation, rule, store=store, **fields)
    for rule, fields in LINEARS.items()
    for format in FORMATS.values()
    for rotation, store in _stores(format).items()
]
BASELINE = "none"


def COLUMNS(cell: Cell) -> str:
    """The format of the cache, and that of the linears."""
    (name,) = (name for name, format in FORMATS.items() if cell.store.format == format)
    return f"{name}, linears {'float' if cell.format == 'float' else 'mxfp4'}"


if __name__ == "__main__":
    main(sys.modules[__name__])
