"""How `mosaic.scaled_matmul` cuts its work into tiles that fit an SM of Blackwell.

A tile of R rows and C columns computes R C K products from (R + C) K elements, so large tiles move
few bytes. The SM bounds their size: an accumulator takes C of the 512 columns of tensor memory,
scales take others, and the ring of slots has to fit in shared memory.

Source: PTX ISA 9.0, "Tensor Memory"; CUDA C++ Programming Guide, compute capability 10.0.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from duquantpp_jax.kernels.operand import DEPTH_BYTES, depth_of
from duquantpp_jax.kernels.specifications import CORES

ROWS = 128  # lanes of tensor memory: rows of an output tile in one CTA
COLUMNS = 512  # 32-bit columns of tensor memory
SHARED_BYTES = 227 * 1024  # shared memory a CTA may own (CUDA programming guide, 10.x)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the work is cut; every tiling gives the same sums in another order.

    Attributes:
      columns: Output columns of a tile, 128 or 256.
      stages: Slots of the ring between load and multiply.
      collective: Whether two CTAs share a tile of 256 rows; else one CTA has 128.
      store_columns: Output columns of one TMA store.
      splits: Parts of K that are summed separately, for problems with fewer tiles than cores.
      group: Rows of tiles that are walked together, for reuse in L2.
      cores: Streaming multiprocessors to fill.
    """

    columns: int = 256
    stages: int = 4
    collective: bool = True
    store_columns: int = 32
    splits: int = 1
    group: int = 8
    cores: int = CORES

    @property
    def ctas(self) -> int:
        """CTAs of a cluster."""
        return 2 if self.collective else 1

    @property
    def rows(self) -> int:
        """Output rows of a tile."""
        return ROWS * self.ctas

    def scale_columns(self, depth: int, block: int) -> int:
        """Columns of tensor memory for the scales of a slot: 4 rows a lane, multiples of 8."""
        return sum(-(-tiles * depth // block // 8) * 8 for tiles in (1, self.columns // ROWS))

    def stride(self, depth: int, block: int) -> int:
        """Columns from the first accumulator to the second; they overlap if below `columns`."""
        free = COLUMNS - self.stages * self.scale_columns(depth, block)
        return min(self.columns, free - self.columns)

    def shared_bytes(self, depth: int, block: int, out_dtype: Any) -> int:
        """Shared memory of a CTA: each array rounded up to 1 KiB, and 1 KiB for barriers."""
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
    cores: int = CORES,
    collective: bool | None = None,
) -> Tiling:
    """The tiling that takes the least time, with as many slots as memory has room for.

    Two CTAs share a tile if there are rows for both. Of 128 and 256 columns the faster is chosen.
    If there are fewer tiles than half the cores, K is split into equal parts of at least four
    steps.
    """
    depth = depth_of(dtype)
    if collective is None:
        collective = m > ROWS
    ctas = 2 if collective else 1
    rows, clusters = ROWS * ctas, cores // ctas

    def time(columns: int) -> int:
        # A step costs the tensor core 2 cycles a column. It costs shared memory 2 cycles for each
        # row of 128 bytes: one to write and one to read the row.
        in_sequence = pl.cdiv(pl.cdiv(m, rows) * pl.cdiv(n, columns), clusters)
        return in_sequence * max(2 * columns, 2 * (ROWS + columns // ctas))

    columns = 256 if time(256) <= time(128) else 128
    tiles, steps = pl.cdiv(m, rows) * pl.cdiv(n, columns), pl.cdiv(k, depth)
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
