"""Block-scaled matmul on Blackwell's tensor cores, written in Pallas Mosaic GPU (sm_100a).

    out[i, j] = sum_k  a[i, k] * A[i, k // block]  *  b[j, k] * B[j, k // block]

A and B are the scales, which the tensor core applies itself (`tcgen05.mma ... block_scale`);
products and sums are float32. A CTA has three roles that meet only at barriers:

    load      warp 0 of warpgroup 0: TMA of elements and scales into a ring of `stages` slots
    multiply  warp 1 of warpgroup 0: scales to tensor memory, then one tcgen05.mma a slot
    write     warpgroup 1: accumulator -> registers -> shared memory -> TMA store

    full[slot]     load     -> multiply   the slot holds data
    empty[slot]    multiply -> load       the tensor core has read the slot
    ready[buffer]  multiply -> write      the accumulator of a tile is complete
    drained[buffer] write   -> multiply   its columns may be overwritten

The kernel is persistent: each cluster has one flat loop over all K steps of all its output tiles.
So loads of the next tile start early, and with two accumulators the next tile begins while the
last one is written. Two accumulators of 256 columns and the scales do not fit in the 512 columns
of tensor memory: then the accumulators overlap, and the overlapping columns are written first.

With `collective`, two CTAs of a cluster compute one tile of 256 rows: each has half the rows of
`a` and half the rows of `b`, and the leader issues for both. TMA reads zeros beyond the edges of a
matrix and stores nothing there.

Source: PTX ISA 9.0, sections "TensorCore 5th Generation Family Instructions" (block scaling,
scale-factor layouts, which instruction orders which); Pallas Mosaic GPU's documentation.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from duquantpp_jax.kernels.implementation import cores
from duquantpp_jax.kernels.operand import Operand, depth_of
from duquantpp_jax.kernels.pallas import launch, loop, swizzled, wait_for_last
from duquantpp_jax.kernels.scaled_matmul.tiling import ROWS, Tiling, choose_tiling


def scaled_matmul(
    a: Operand,
    b: Operand,
    *,
    out_dtype: Any = jnp.bfloat16,
    tiling: Tiling | None = None,
    interpret: Any = None,
) -> Float[Array, "m n"]:
    """The product of two operands that `api` has checked; the tiling is by default chosen."""
    (m, k), n = a.shape, b.shape[0]
    tensor_scales = [s for s in (a.tensor_scale, b.tensor_scale) if s is not None]
    wide = jnp.float32 if tensor_scales else out_dtype
    if tiling is None:
        dtype = a.elements.dtype
        tiling = choose_tiling(m, n, k, dtype, a.block_size, out_dtype=wide, cores=cores())
    if tiling.splits > 1:
        wide = jnp.float32
    parts = _matmul(a, b, wide, tiling, interpret)
    out = (jnp.sum(parts, axis=0) if tiling.splits > 1 else parts[0])[:m, :n]
    for scale in tensor_scales:
        out = out * scale
    return out.astype(out_dtype)


def _matmul(
    a: Operand, b: Operand, out_dtype: Any, tiling: Tiling, interpret: Any
) -> Float[Array, "splits m n"]:
    """The kernel: one output for each part of K, padded to what TMA stores."""
    (m, k), n = a.elements.shape, b.elements.shape[0]
    t, block, dtype = tiling, a.block_size, a.elements.dtype
    depth, stages, store = depth_of(dtype), t.stages, t.store_columns
    k_steps = _steps(k, depth, t.splits)
    m_tiles, n_tiles = pl.cdiv(m, t.rows), pl.cdiv(n, t.columns)
    all_tiles = m_tiles * n_tiles * t.splits
    clusters = min(all_tiles, t.cores // t.ctas)
    scale_tiles = depth // (4 * block)  # 128x4 scale tiles along K of one step
    stride = t.stride(depth, block)
    overlap, lag = t.columns - stride, _lag(t.columns - stride)
    chunks = t.columns // store
    axis = "cta" if t.collective else None

    halves, both = {}, {}
    if t.collective:  # each CTA of the pair loads its half; the leader's barrier counts both
        part = plgpu.CopyPartition
        halves = {"collective_axes": "cta", "leader_tracked": part.PARTITIONED(0)}
        both = {"collective_axes": "cta", "leader_tracked": part.REPLICATED}

    def kernel(a_gmem, b_gmem, sa_gmem, sb_gmem, out_gmem, s):
        cta, cluster, role = lax.axis_index("cta"), lax.axis_index("sm"), lax.axis_index("wg")
        tiles = lax.div(all_tiles - cluster + clusters - 1, jnp.int32(clusters))
        steps = tiles * k_steps

        def where(tile):
            """Part of K, row and column of this cluster's tile-th tile, in units of tiles."""
            index, part_size = cluster + tile * clusters, jnp.int32(m_tiles * n_tiles)
            row, column = _grouped(lax.rem(index, part_size), m_tiles, n_tiles, t.group)
            return lax.div(index, part_size), row, column

        def load(step):
            slot = lax.rem(step, jnp.int32(stages))
            tile, ki = lax.div(step, jnp.int32(k_steps)), lax.rem(step, jnp.int32(k_steps))
            part, mi, ni = where(tile)
            ki = part * k_steps + ki
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(s["empty"].at[slot]))
            ks = pl.ds(ki * depth, depth)
            kt = pl.ds(ki * scale_tiles, scale_tiles)
            rows, columns = pl.ds(mi * t.rows, t.rows), pl.ds(ni * t.columns, t.columns)
            row_tiles = pl.ds(mi * t.ctas, t.ctas)
            column_tiles = pl.ds(ni * (t.columns // ROWS), t.columns // ROWS)
            full = s["full"].at[slot]
            plgpu.copy_gmem_to_smem(a_gmem.at[rows, ks], s["a"].at[slot], full, **halves)
            plgpu.copy_gmem_to_smem(b_gmem.at[columns, ks], s["b"].at[slot], full, **halves)
            plgpu.copy_gmem_to_smem(sa_gmem.at[row_tiles, kt], s["sa"].at[slot], full, **halves)
            plgpu.copy_gmem_to_smem(sb_gmem.at[column_tiles, kt], s["sb"].at[slot], full, **both)

        def multiply(step, slot):
            tile, ki = lax.div(step, jnp.int32(k_steps)), lax.rem(step, jnp.int32(k_steps))
            buffer = lax.rem(tile, jnp.int32(2))

            @pl.when(jnp.logical_and(ki == 0, tile >= lag))
            def _():
                plgpu.barrier_wait(s["drained"].at[lax.rem(tile - lag, jnp.int32(2))])

            @pl.when(cta == 0)
            def _():
                plgpu.barrier_wait(s["full"].at[slot])
                sa, sb = _scale_buffers(s, slot)
                plgpu.async_copy_scales_to_tmem(s["sa"].at[slot], sa, collective_axis=axis)
                plgpu.async_copy_scales_to_tmem(s["sb"].at[slot], sb, collective_axis=axis)
                plgpu.tcgen05_mma(
                    s["acc"].at[:, pl.ds(buffer * stride, t.columns)],
                    s["a"].at[slot],
                    s["b"].at[slot].transpose((1, 0)),
                    s["empty"].at[slot],
                    a_scale=sa,
                    b_scale=sb,
                    accumulate=ki > 0,
                    collective_axis=axis,
                )

                @pl.when(ki == k_steps - 1)
                def _():
                    plgpu.tcgen05_commit_arrive(s["ready"].at[buffer], collective_axis=axis)

        def write(tile):
            buffer = lax.rem(tile, jnp.int32(2))
            part, mi, ni = where(tile)
            rows = pl.ds((mi * t.ctas + cta) * ROWS, ROWS)
            plgpu.barrier_wait(s["ready"].at[buffer])
            for c in range(chunks):
                # Overlapping columns first: the last ones of accumulator 0, the first of 1.
                first, second = (chunks - 1 - c) * store if overlap else c * store, c * store
                column = first + buffer * (second - first)
                in_tmem = first + buffer * (stride + second - first)
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                acc = plgpu.async_load_tmem(s["acc"].at[:, pl.ds(in_tmem, store)])
                s["out"][c % 2] = acc.astype(out_dtype)
                if c == (pl.cdiv(overlap, store) or chunks) - 1:
                    plgpu.wait_load_tmem()
                    plgpu.barrier_arrive(s["drained"].at[buffer])
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    s["out"].at[c % 2],
                    out_gmem.at[part, rows, pl.ds(ni * t.columns + column, store)],
                )

        @pl.when(role == 0)
        def _():
            @plgpu.warp_map
            def _(warp):
                @pl.when(warp == 0)
                def _():
                    loop(0, steps, load)
                    wait_for_last(s["empty"], stages, steps, stages)

                @pl.when(warp == 1)
                def _():
                    # Unrolled over the ring: buffers of scales have static names.
                    def round_(r):
                        for slot in range(stages):
                            step = r * stages + slot
                            pl.when(step < steps)(functools.partial(multiply, step, slot))

                    loop(0, lax.div(steps + stages - 1, jnp.int32(stages)), round_)
                    wait_for_last(s["drained"], lag, tiles, 2)

        @pl.when(role == 1)
        def _():
            loop(0, tiles, write)
            plgpu.wait_smem_to_gmem(0)

    pair = {"num_barriers": 2, "orders_tensor_core": True}
    drained = plgpu.Barrier(**pair)
    if t.collective:
        drained = plgpu.ClusterBarrier(collective_axes=("cta",), **pair)
    layout = {"layout": plgpu.TMEMLayout.SCALES_LAYOUT, "collective": t.collective}
    scales = functools.partial(plgpu.TMEM, dtype=a.scales.dtype, **layout)
    scratch = {
        "a": swizzled((stages, ROWS, depth), dtype),
        "b": swizzled((stages, t.columns // t.ctas, depth), b.elements.dtype),
        "sa": plgpu.SMEM((stages, 1, scale_tiles, 32, 16), a.scales.dtype),
        "sb": plgpu.SMEM((stages, t.columns // ROWS, scale_tiles, 32, 16), a.scales.dtype),
        "out": swizzled((2, ROWS, store), out_dtype),
        "acc": plgpu.TMEM((ROWS, stride + t.columns), jnp.float32, collective=t.collective),
        "sa_tmem": [scales((ROWS, depth // block)) for _ in range(stages)],
        "sb_tmem": [scales((t.columns, depth // block)) for _ in range(stages)],
        "full": plgpu.Barrier(num_arrivals=4, num_barriers=stages),
        "empty": plgpu.Barrier(num_barriers=stages, orders_tensor_core=True),
        "ready": plgpu.Barrier(**pair),
        "drained": drained,
    }
    cluster = {"cluster": (t.ctas,), "cluster_names": ("cta",)}
    out_type = jax.ShapeDtypeStruct((t.splits, m, pl.cdiv(n, store) * store), out_dtype)
    named = {"kernel_name": "scaled_matmul", "num_threads": 2}
    run = launch(kernel, interpret, clusters, scratch, out_type=out_type, **named, **cluster)
    return run(a.elements, b.elements, a.scales, b.scales)


def _grouped(index, m_tiles: int, n_tiles: int, group: int):
    """Row and column of a tile, walking `group` rows column by column for reuse in L2."""
    width = jnp.int32(group * n_tiles)
    top = lax.div(index, width) * group
    height = lax.min(jnp.int32(group), m_tiles - top)
    inside = lax.rem(index, width)
    return top + lax.rem(inside, height), lax.div(inside, height)


def _steps(k: int, depth: int, splits: int) -> int:
    """Steps of each part of K; zeros fill up the last step."""
    steps = -(-k // depth)
    if steps % splits:
        raise ValueError(f"{steps} steps of K do not split into {splits} equal parts")
    return steps // splits


def _lag(overlap: int) -> int:
    """Number of tiles from the tile of an accumulator to the tile that overwrites it."""
    return 1 if overlap else 2


def _scale_buffers(scratch, slot: int):
    """Buffers of one slot: the hardware orders copy -> mma, but not mma -> the next copy."""
    return scratch["sa_tmem"][slot], scratch["sb_tmem"][slot]
