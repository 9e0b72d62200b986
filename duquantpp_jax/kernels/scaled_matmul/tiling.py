"""How `mosaic.scaled_matmul` cuts its work to fit an SM of Blackwell.

A tile of R rows and C columns computes R C K products from (R + C) K elements, so large tiles move
few bytes. What bounds them is the SM: an accumulator takes C columns of tensor memory, scales
take more of its 512, and the ring of slots has to fit in shared memory.

Source: PTX ISA 9.0, "Tensor Memory"; CUDA C++ Programming Guide, compute capability 10.0.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from duquantpp_jax.kernels.operand import DEPTH_BYTES, depth_of

ROWS = 128  # lanes of tensor memory: the rows of an output tile that one CTA holds
COLUMNS = 512  # 32-bit columns of tensor memory
SHARED_BYTES = 227 * 1024  # shared memory a CTA may own (CUDA programming guide, 10.x)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the work is cut. Choices only: every value gives the same sums in another order.

    Attributes:
      columns: Output columns of a tile: 128 or 256.
      stages: Slots of the ring between load and multiply.
      collective: Two CTAs share a tile of 256 rows (else one CTA has 128).
      store_columns: Output columns of one TMA store.
      splits: Parts of K that are summed apart, for problems with fewer tiles than cores.
      group: Rows of tiles walked together, for reuse in L2.
      cores: Streaming multiprocessors to fill.
    """

    columns: int = 256
    stages: int = 4
    collective: bool = True
    store_columns: int = 32
    splits: int = 1
    group: int = 8
    cores: int = 148

    @property
    def ctas(self) -> int:
        """CTAs of a cluster."""
        return 2 if self.collective else 1

    @property
    def rows(self) -> int:
        """Output rows of a tile."""
        return ROWS * self.ctas

    def scale_columns(self, depth: int, block: int) -> int:
        """Columns of tensor memory for one slot's scales: 4 rows' bytes a lane, by eights."""
        return sum(-(-tiles * depth // block // 8) * 8 for tiles in (1, self.columns // ROWS))

    def stride(self, depth: int, block: int) -> int:
        """Columns from the first accumulator to the second; under `columns`, they overlap."""
        free = COLUMNS - self.stages * self.scale_columns(depth, block)
        return min(self.columns, free - self.columns)

    def shared_bytes(self, depth: int, block: int, out_dtype: Any) -> int:
        """Shared memory of a CTA, each array rounded up to 1 KiB, and 1 KiB for barriers."""
        elements = ROWS + self.columns // self.ctas
        scale_bytes = 128 * depth // block * self.stages
        scales = sum(-(-tiles * scale_bytes // 1024) for tiles in (1, self.columns // ROWS)) * 1024
        out = 2 * ROWS * self.store_columns * jnp.dtype(out_dtype).itemsize
        return self.stages * elements * DEPTH_BYTES + scales + out + 1024


def choose_tiling(
    m: int,
    n: int,
    k: int,
    dtype: Any,
    block: int,
    *,
    out_dtype: Any = jnp.bfloat16,
    cores: int = 148,
    collective: bool | None = None,
) -> Tiling:
    """Tiles that finish first, and as many slots as the memories hold.

    Two CTAs share a tile once there are rows for both. Of 128 and 256 columns those win whose
    tiles take less time in sequence; where tiles are fewer than half the cores, K is split, in
    equal parts of at least four steps.

    Args:
      cores: Streaming multiprocessors of the device (B200: 148).
      collective: Overrides the choice of one or two CTAs.
    """
    depth = depth_of(dtype)
    if collective is None:
        collective = m > ROWS
    ctas = 2 if collective else 1
    rows, clusters = ROWS * ctas, cores // ctas

    def time(columns: int) -> int:
        # A step takes the tensor core 2 cycles a column, and shared memory 2 for each of the
        # rows of 128 bytes that it holds: one to be filled and one to be read.
        in_sequence = _cdiv(_cdiv(m, rows) * _cdiv(n, columns), clusters)
        return in_sequence * max(2 * columns, 2 * (ROWS + columns // ctas))

    columns = 256 if time(256) <= time(128) else 128
    tiles, steps = _cdiv(m, rows) * _cdiv(n, columns), _cdiv(k, depth)
    most = max(1, min(clusters // tiles, steps // 4))
    splits = max(parts for parts in range(1, most + 1) if steps % parts == 0)

    if splits > 1:
        out_dtype = jnp.float32  # parts are summed before they are rounded

    def fits(t: Tiling) -> bool:
        little_overlap = columns - t.stride(depth, block) <= columns * 3 // 8 or t.stages == 3
        return little_overlap and t.shared_bytes(depth, block, out_dtype) <= SHARED_BYTES

    candidates = (
        Tiling(columns, stages, collective, splits=splits, cores=cores) for stages in (6, 5, 4, 3)
    )
    return next(t for t in candidates if fits(t))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
