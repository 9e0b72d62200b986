"""Rotate and quantize in one pass over memory, in Pallas Mosaic GPU (sm_100a).

    y_b = x_b R_b,   E_b = rule(max |y_b|),   code_i = e2m1(y_i 2^-E_b)

for blocks b of 32 columns. Codes are written packed, scale bytes in the 128x4 tiles that
`scaled_matmul` reads; the rotated values are only in tensor memory.

The rotation runs on the tensor cores: the other cores would take several times as long as memory.
x is bfloat16; R is two bfloat16 parts, R = hi + lo to 2^-17, multiplied into one float32 sum.

The exponent comes from the bits of the largest magnitude, without a logarithm. E2M1 has one
mantissa bit and a largest element of 1.5 * 2^2, so a rule is one addition that may carry into the
exponent:

    byte = ((bits(amax) + carry) >> 23) - 2
    FLOOR  carry = 0                    CEIL   carry = 2^23 - 1   (above 1.0)
    EVEN   carry = 2^21  (from 1.75)    RCEIL  carry = 2^22 - 1   (above 1.5)

RCEIL_FLOAT is CEIL of amax / 6, rounded to float32. MSE adds up the squared errors of FLOOR's scale
and its neighbours in the integers of `formats.errors`, to have the bits of the reference.

Roles in a CTA, as in scaled_matmul: a warp loads, a warp multiplies, two warpgroups quantize
alternate tiles. A tile is 128 rows by 128 columns: four blocks a row, one scale tile.

Source: OCP MX v1.0, section 6.3; PTX ISA 9.0, tcgen05 and cvt.rn.satfinite.e2m1x2.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int32, Shaped

from duquantpp_jax.core import ScaleRule
from duquantpp_jax.formats import E2M1
from duquantpp_jax.formats.division import power_of_two
from duquantpp_jax.kernels import pallas
from duquantpp_jax.kernels.implementation import cores
from duquantpp_jax.kernels.operand import Operand, depth_of, padded_rows
from duquantpp_jax.kernels.pallas import launch, loop, swizzled, wait_for_last

ROWS, WIDTH, BLOCK = 128, 128, 32
BLOCKS = WIDTH // BLOCK
BUFFERS = 4  # accumulators of WIDTH columns: all of tensor memory
STAGES = 3  # slots of the ring between load and multiply
DEPTH = depth_of(E2M1.dtype)
ERROR_BITS = 25  # the sum of 32 numbers of 25 bits is below 2^31
LEAST_TOP = 127 - 22  # exponent bits of the least subnormal, 2^-149, over the least scale, 2^-127
LINE = plgpu.Layout.TILED(  # 32 numbers, one for each lane, the same in every warp
    plgpu.Tiling(((32,), (1,))), (plgpu.Replicated(4),), (-2,), -1
)
CARRY = {
    ScaleRule.FLOOR: 0,
    ScaleRule.CEIL: (1 << 23) - 1,
    ScaleRule.EVEN: 1 << 21,
    ScaleRule.RCEIL: (1 << 22) - 1,
}


def why_not(dtype: Any) -> str | None:
    """Why the kernel does not take inputs of this type; None if it does."""
    return None if dtype == jnp.bfloat16 else f"it takes bfloat16, and x is {dtype}"


def rotate_quantize(
    x: BFloat16[Array, "m k"],
    rotation: Float[Array, "blocks 32 32"],
    smooth: Float[Array, " k"] | None = None,
    *,
    scale_rule: ScaleRule = ScaleRule.FLOOR,
    interpret: Any = None,
) -> Operand:
    """Elements and scales of one matrix that `api` has checked."""
    (m, k), matrices = x.shape, rotation.astype(jnp.float32)
    if smooth is not None:
        matrices = matrices / smooth.astype(jnp.float32).reshape(-1, 32, 1)
    x = jnp.pad(x, ((0, padded_rows(m) - m), (0, 0)))
    shared = len(matrices) == 1  # by all blocks
    r_blocks, r_slots = (1, 1) if shared else (BLOCKS, STAGES)
    width = -(-k // DEPTH) * DEPTH  # zeros beyond the columns of x
    m_tiles, k_tiles = pl.cdiv(len(x), ROWS), pl.cdiv(width, WIDTH)
    ctas = min(m_tiles * k_tiles, cores())

    def kernel(x_gmem, r_gmem, q_gmem, s_gmem, s):
        cta, role = lax.axis_index("sm"), lax.axis_index("wg")
        tiles = lax.div(m_tiles * k_tiles - cta + ctas - 1, jnp.int32(ctas))

        def where(tile):
            index = cta + tile * ctas
            return lax.div(index, jnp.int32(k_tiles)), lax.rem(index, jnp.int32(k_tiles))

        def load(tile):
            slot = lax.rem(tile, jnp.int32(STAGES))
            mi, ki = where(tile)
            pl.when(tile >= STAGES)(lambda: plgpu.barrier_wait(s["empty"].at[slot]))
            rows, columns = pl.ds(mi * ROWS, ROWS), pl.ds(ki * WIDTH, WIDTH)
            full = s["full"].at[slot]
            plgpu.copy_gmem_to_smem(x_gmem.at[rows, columns], s["x"].at[slot], full)
            if not shared:
                blocks = pl.ds(ki * BLOCKS, BLOCKS)
                plgpu.copy_gmem_to_smem(r_gmem.at[:, blocks], s["r"].at[slot], full)

        def multiply(tile):
            slot, buffer = lax.rem(tile, jnp.int32(STAGES)), lax.rem(tile, jnp.int32(BUFFERS))
            pl.when(tile >= BUFFERS)(lambda: plgpu.barrier_wait(s["drained"].at[buffer]))
            plgpu.barrier_wait(s["full"].at[slot])
            for b in range(BLOCKS):
                block = pl.ds(b * BLOCK, BLOCK)
                acc = s["acc"].at[:, pl.ds(buffer * WIDTH + b * BLOCK, BLOCK)]
                for part in range(2):
                    r = s["r"].at[0 if shared else slot, part, 0 if shared else b]
                    plgpu.tcgen05_mma(acc, s["x"].at[slot, :, block], r, accumulate=part > 0)
            plgpu.tcgen05_commit_arrive(s["empty"].at[slot])
            plgpu.tcgen05_commit_arrive(s["ready"].at[buffer])

        def quantize(tile):
            buffer = out = lax.rem(tile, jnp.int32(BUFFERS))
            mi, ki = where(tile)
            plgpu.barrier_wait(s["ready"].at[buffer])
            plgpu.wait_smem_to_gmem(2, wait_read_only=True)  # for the tile before the last
            word = None
            for b in range(BLOCKS):
                acc = s["acc"].at[:, pl.ds(buffer * WIDTH + b * BLOCK, BLOCK)]
                y = plgpu.async_load_tmem(acc, layout=plgpu.Layout.TCGEN05_TMEM_NATIVE)
                byte, elements = _quantize_block(y, scale_rule)
                pallas.store(s["q"].at[out, :, pl.ds(b * BLOCK, BLOCK)], elements)
                word = byte if word is None else word | (byte << (8 * b))
            plgpu.wait_load_tmem()
            plgpu.barrier_arrive(s["drained"].at[buffer])
            pallas.store(s["word"].at[out], word)
            plgpu.commit_smem()
            # The four bytes of a row are a word; row 32 j + i is word j of line i in its tile.
            for j in range(4):
                words = pallas.load(s["word"].at[out, pl.ds(32 * j, 32)], LINE)
                pallas.store(s["s"].at[out, :, j], words)
            plgpu.commit_smem()
            rows, columns = pl.ds(mi * ROWS, ROWS), pl.ds(ki * WIDTH, WIDTH)
            plgpu.copy_smem_to_gmem(s["q"].at[out], q_gmem.at[rows, columns])
            plgpu.copy_smem_to_gmem(s["s"].at[out], s_gmem.at[mi, ki])

        @pl.when(role == 0)
        def _():
            @plgpu.warp_map
            def _(warp):
                @pl.when(warp == 0)
                def _():
                    if shared:
                        plgpu.copy_gmem_to_smem(r_gmem, s["r"].at[0], s["r_full"])
                    loop(0, tiles, load)
                    wait_for_last(s["empty"], STAGES, tiles, STAGES)

                @pl.when(warp == 1)
                def _():
                    if shared:
                        plgpu.barrier_wait(s["r_full"])
                    loop(0, tiles, multiply)
                    wait_for_last(s["drained"], BUFFERS, tiles, BUFFERS)

        @pl.when(role > 0)
        def _():
            mine = lax.div(tiles - role + 2, jnp.int32(2))  # tiles role - 1, role + 1, ...
            loop(0, mine, lambda i: quantize(2 * i + role - 1))
            plgpu.wait_smem_to_gmem(0)

    scratch = {
        "x": swizzled((STAGES, ROWS, WIDTH), x.dtype, columns=BLOCK),
        "r": swizzled((r_slots, 2, r_blocks, BLOCK, BLOCK), x.dtype),
        "q": plgpu.SMEM((BUFFERS, ROWS, WIDTH), jnp.float4_e2m1fn),
        "word": plgpu.SMEM((BUFFERS, ROWS), jnp.int32),
        "s": plgpu.SMEM((BUFFERS, 32, 4), jnp.int32),
        "acc": plgpu.TMEM((ROWS, BUFFERS * WIDTH), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=1 if shared else 2, num_barriers=STAGES),
        "empty": plgpu.Barrier(num_barriers=STAGES, orders_tensor_core=True),
        "ready": plgpu.Barrier(num_barriers=BUFFERS, orders_tensor_core=True),
        "drained": plgpu.Barrier(num_barriers=BUFFERS, orders_tensor_core=True),
        "r_full": plgpu.Barrier(),
    }
    out_type = (
        jax.ShapeDtypeStruct((len(x), width), jnp.float4_e2m1fn),
        jax.ShapeDtypeStruct((m_tiles, k_tiles, 32, 4), jnp.int32),
    )
    named = {"kernel_name": "rotate_quantize", "num_threads": 3}
    run = launch(kernel, interpret, ctas, scratch, out_type=out_type, **named)
    elements, words = run(x, split_bfloat16(matrices))
    scale_bytes = lax.bitcast_convert_type(words, jnp.uint8).reshape(m_tiles, k_tiles, 32, 16)
    scales = lax.bitcast_convert_type(scale_bytes, jnp.float8_e8m0fnu)
    return Operand(elements, scales, shape=(m, k), element=E2M1, block_size=BLOCK)


def split_bfloat16(x: Float[Array, "*shape"]) -> BFloat16[Array, "2 *shape"]:
    """hi = bfloat16(x) and lo = bfloat16(x - hi); hi + lo is x to 2^-17."""
    # A compiler may drop a cast to bfloat16 and back, but not reduce_precision.
    hi = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return jnp.stack([hi, x - hi]).astype(jnp.bfloat16)


def _quantize_block(y: Float[Array, "rows 32"], rule: ScaleRule):
    """Scale byte and elements of a block a row; byte 255 and signed zeros for Inf or NaN."""
    amax = jnp.max(lax.bitcast_convert_type(y, jnp.int32) & 0x7FFFFFFF, axis=1)
    bad = amax >= 0x7F800000
    byte = _scale_byte(y, amax, rule)
    kept = jnp.where(bad, jnp.int32(-(2**31)), jnp.int32(-1))
    z = y * _rows(power_of_two(jnp.where(bad, 0, 127 - byte)), y)
    z = lax.bitcast_convert_type(z, jnp.int32) & _rows(kept, y)
    z = lax.bitcast_convert_type(z, jnp.float32)
    z = plgpu.layout_cast(z, plgpu.Layout.TCGEN05_TMEM_NATIVE(8))  # a word of codes at a time
    return jnp.where(bad, 255, byte), z.astype(jnp.float4_e2m1fn)


def _scale_byte(
    y: Float[Array, "rows 32"], amax: Int32[Array, " rows"], rule: ScaleRule
) -> Int32[Array, " rows"]:
    """E + 127 of each block, for the bits of its largest magnitude, if this is finite."""
    match rule:
        case ScaleRule.MSE:
            return _least_error_byte(y, amax)
        case ScaleRule.RCEIL_FLOAT:
            # amax = significand * 2^(e - 127), for a product that is normal.
            significand = lax.bitcast_convert_type(amax & 0x7FFFFF | 127 << 23, jnp.float32)
            sixth = lax.bitcast_convert_type(significand * jnp.float32(1 / 6), jnp.int32)
            exponent = (amax >> 23) - 127
            # A subnormal product loses its last bit, as in formats.scales.
            lost = jnp.where(exponent + (sixth >> 23) == 0, 1, 0)
            return jnp.maximum(exponent + ((sixth + CARRY[ScaleRule.CEIL] - lost) >> 23), 0)
        case _:
            return jnp.maximum(((amax + CARRY[rule]) >> 23) - E2M1.emax, 0)


def _least_error_byte(
    y: Float[Array, "rows 32"], amax: Int32[Array, " rows"]
) -> Int32[Array, " rows"]:
    """FLOOR's byte or a neighbour: the byte with the least squared error of the block.

    With z = y / 2^E for FLOOR's E, |z| < 8, and r the value of z under the scale 2^(E + step),

        error = sum_i (|z_i| - r_i)^2 in units of 2^(2 u), with 2^u above every |z|

    summed as in `formats.errors`: each square in float32, as two integers of ERROR_BITS.
    """
    floor = _scale_byte(y, amax, ScaleRule.FLOOR)
    scale = power_of_two(127 - floor)
    z = jnp.abs(y * _rows(scale, y))
    top = lax.bitcast_convert_type(lax.bitcast_convert_type(amax, jnp.float32) * scale, jnp.int32)
    unit = jnp.maximum(top >> 23, LEAST_TOP) - 126
    to_units = _rows(power_of_two(ERROR_BITS - 2 * unit), y)

    def take_better(i, best_so_far):
        best, high, low = best_so_far
        step = 1 - i
        square = jnp.square(z - _rounded(z, step)) * to_units
        whole = square.astype(jnp.int32)
        rest = ((square - whole.astype(jnp.float32)) * 2.0**ERROR_BITS).astype(jnp.int32)
        its_high, its_low = jnp.sum(whole, axis=1), jnp.sum(rest, axis=1)
        its_high += its_low >> ERROR_BITS
        its_low &= (1 << ERROR_BITS) - 1
        better = (its_high < high) | ((its_high == high) & (its_low < low))
        better &= floor + step >= 0
        return (
            jnp.where(better, floor + step, best),
            jnp.where(better, its_high, high),
            jnp.where(better, its_low, low),
        )

    most = floor | jnp.int32(2**31 - 1)  # above every error, in the layout of floor
    # Not unrolled: registers cannot hold three errors at a time.
    best, _, _ = lax.fori_loop(jnp.int32(0), jnp.int32(3), take_better, (floor, most, most))
    return jnp.where(amax == 0, 0, best)


def _rounded(z: Float[Array, "rows 32"], step: Int32[Array, ""]) -> Float[Array, "rows 32"]:
    """E2M1 of z / 2^step, times 2^step, for z >= 0.

    A sum with 2^22 times the power of two of z (at least 2^step) keeps one bit below this power.
    """
    binade = jnp.maximum(lax.bitcast_convert_type(z, jnp.int32), (127 + step) << 23) & 0x7F800000
    cut = lax.bitcast_convert_type(binade + (22 << 23), jnp.float32)
    return jnp.minimum((z + cut) - cut, E2M1.max * power_of_two(step))


def _rows(
    values: Shaped[Array, " rows"], like: Shaped[Array, "rows 32"]
) -> Shaped[Array, "rows 32"]:
    """The value of each row in all its columns."""
    spread = lax.broadcast_in_dim(values, like.shape, (0,))
    return plgpu.layout_cast(spread, plgpu.Layout.TCGEN05_TMEM_NATIVE)
