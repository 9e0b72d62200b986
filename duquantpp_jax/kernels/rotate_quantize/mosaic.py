"""Rotate and quantize in one pass over memory, in Pallas Mosaic GPU (sm_100a).

    y_b = x_b R_b,   E_b = rule(max |y_b|),   code_i = e2m1(y_i 2^-E_b)

for blocks b of 32 columns. Codes leave packed, scale bytes leave in the 128x4 tiles that
`scaled_matmul` reads; the rotated values exist only in tensor memory.

The rotation runs on the tensor cores: the other cores would take several times as long as memory.
x is bfloat16; R is two bfloat16 parts, R = hi + lo to 2^-17, multiplied into one float32 sum.

The exponent comes from the bits of the largest magnitude, without a logarithm. With one mantissa
bit and a largest element of 1.5 * 2^2, a rule is one addition that carries, or not, into the
exponent:

    byte = ((bits(amax) + carry) >> 23) - 2
    FLOOR  carry = 0                    CEIL   carry = 2^23 - 1   (above 1.0)
    EVEN   carry = 2^21  (from 1.75)    RCEIL  carry = 2^22 - 1   (above 1.5)

RCEIL_FLOAT is CEIL of amax / 6 as float32 rounds it. MSE starts at FLOOR and adds up the squared
errors of three scales in the integers of `formats.errors`, so that it too has the reference's bits.

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
from jaxtyping import Array, BFloat16, Float, Int32, Shaped, UInt8

from duquantpp_jax.core import ScaleRule
from duquantpp_jax.formats import E2M1
from duquantpp_jax.kernels import pallas
from duquantpp_jax.kernels.implementation import cores
from duquantpp_jax.kernels.operand import Operand, depth_of, padded_rows
from duquantpp_jax.kernels.pallas import loop, swizzled

__all__ = ["rotate_quantize", "split_bfloat16", "why_not"]

ROWS, WIDTH, BLOCK = 128, 128, 32
BLOCKS = WIDTH // BLOCK
BUFFERS = 4  # accumulators of WIDTH columns: all of tensor memory
STAGES = 3  # slots of the ring between load and multiply
DEPTH = depth_of(E2M1.dtype)
EMAX = 2  # of E2M1
ERROR_BITS = 25  # 32 numbers of so many bits add up to less than 2^31
LEAST_TOP = 127 - 22  # exponent's bits of the least subnormal, 2^-149, by the least scale, 2^-127
LINE = plgpu.Layout.TILED(  # 32 numbers, one a lane, the same in every warp
    plgpu.Tiling(((32,), (1,))), (plgpu.Replicated(4),), (-2,), -1
)
CARRY = {
    ScaleRule.FLOOR: 0,
    ScaleRule.CEIL: (1 << 23) - 1,
    ScaleRule.EVEN: 1 << 21,
    ScaleRule.RCEIL: (1 << 22) - 1,
}


def why_not(dtype: Any) -> str | None:
    """None where the kernel takes such an input, else the reason that it does not."""
    return None if dtype == jnp.bfloat16 else f"it takes bfloat16, and x is {dtype}"


def rotate_quantize(
    x: BFloat16[Array, "m k"],
    rotation: Float[Array, "blocks 32 32"],
    smooth: Float[Array, " k"] | None = None,
    *,
    scale_rule: ScaleRule = ScaleRule.FLOOR,
    interpret: Any = None,
) -> Operand:
    """The kernel on one matrix; `api` says what is checked.

    Args:
      interpret: Parameters of Mosaic's interpret mode; None compiles.
    """
    m, k = x.shape
    matrices = rotation.astype(jnp.float32)
    if smooth is not None:
        matrices = matrices / smooth.astype(jnp.float32).reshape(-1, 32, 1)
    x = jnp.pad(x, ((0, padded_rows(m) - m), (0, 0)))
    width = -(-k // DEPTH) * DEPTH
    elements, scale_bytes = _rotate_quantize(
        x, split_bfloat16(matrices), scale_rule, width, cores(), interpret
    )
    return Operand(
        elements=elements,
        scales=lax.bitcast_convert_type(scale_bytes, jnp.float8_e8m0fnu),
        shape=(m, k),
        element=E2M1,
        block_size=BLOCK,
    )


def split_bfloat16(x: Float[Array, "*shape"]) -> BFloat16[Array, "2 *shape"]:
    """hi and lo with hi + lo = x to 2^-17: what bfloat16 keeps of x, and of the rest."""
    # reduce_precision, as a compiler may drop a cast there and back.
    hi = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return jnp.stack([hi, x - hi]).astype(jnp.bfloat16)


def _rotate_quantize(
    x: BFloat16[Array, "m k"],
    rotation: BFloat16[Array, "2 blocks 32 32"],
    scale_rule: ScaleRule,
    width: int,
    cores: int,
    interpret: Any,
) -> tuple[Shaped[Array, "m {width}"], UInt8[Array, "mt kt 32 16"]]:
    """Elements of `width` columns (zeros beyond those of x), and scale bytes in 128x4 tiles."""
    m = x.shape[0]
    one_for_all = rotation.shape[1] == 1
    r_blocks = 1 if one_for_all else BLOCKS
    stages = STAGES
    r_slots = 1 if one_for_all else stages
    m_tiles, k_tiles = pl.cdiv(m, ROWS), pl.cdiv(width, WIDTH)
    ctas = min(m_tiles * k_tiles, cores)

    def kernel(x_gmem, r_gmem, q_gmem, s_gmem, scratch):
        s = scratch
        cta, role = lax.axis_index("sm"), lax.axis_index("wg")
        tiles = lax.div(m_tiles * k_tiles - cta + ctas - 1, jnp.int32(ctas))

        def where(tile):
            index = cta + tile * ctas
            return lax.div(index, jnp.int32(k_tiles)), lax.rem(index, jnp.int32(k_tiles))

        def load(tile):
            slot = lax.rem(tile, jnp.int32(stages))
            mi, ki = where(tile)

            @pl.when(tile >= stages)
            def _():
                plgpu.barrier_wait(s["empty"].at[slot])

            rows, columns = pl.ds(mi * ROWS, ROWS), pl.ds(ki * WIDTH, WIDTH)
            full = s["full"].at[slot]
            plgpu.copy_gmem_to_smem(x_gmem.at[rows, columns], s["x"].at[slot], full)
            if not one_for_all:
                blocks = pl.ds(ki * BLOCKS, BLOCKS)
                plgpu.copy_gmem_to_smem(r_gmem.at[:, blocks], s["r"].at[slot], full)

        def multiply(tile):
            slot, buffer = lax.rem(tile, jnp.int32(stages)), lax.rem(tile, jnp.int32(BUFFERS))

            @pl.when(tile >= BUFFERS)
            def _():
                plgpu.barrier_wait(s["drained"].at[buffer])

            plgpu.barrier_wait(s["full"].at[slot])
            for b in range(BLOCKS):
                block = pl.ds(b * BLOCK, BLOCK)
                acc = s["acc"].at[:, pl.ds(buffer * WIDTH + b * BLOCK, BLOCK)]
                for part in range(2):
                    r = s["r"].at[0 if one_for_all else slot, part, 0 if one_for_all else b]
                    plgpu.tcgen05_mma(acc, s["x"].at[slot, :, block], r, accumulate=part > 0)
            plgpu.tcgen05_commit_arrive(s["empty"].at[slot])
            plgpu.tcgen05_commit_arrive(s["ready"].at[buffer])

        def quantize(tile):
            buffer = out = lax.rem(tile, jnp.int32(BUFFERS))
            mi, ki = where(tile)
            plgpu.barrier_wait(s["ready"].at[buffer])
            plgpu.wait_smem_to_gmem(2, wait_read_only=True)  # the tile before last is out
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
            # A row's four bytes are one word; row 32 j + i is word j of line i in its tile.
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
                    if one_for_all:
                        plgpu.copy_gmem_to_smem(r_gmem, s["r"].at[0], s["r_full"])
                    loop(0, tiles, load)
                    loop(
                        lax.max(tiles - stages, 0),
                        tiles,
                        lambda t: plgpu.barrier_wait(s["empty"].at[lax.rem(t, jnp.int32(stages))]),
                    )

                @pl.when(warp == 1)
                def _():
                    if one_for_all:
                        plgpu.barrier_wait(s["r_full"])
                    loop(0, tiles, multiply)
                    loop(
                        lax.max(tiles - BUFFERS, 0),
                        tiles,
                        lambda t: plgpu.barrier_wait(
                            s["drained"].at[lax.rem(t, jnp.int32(BUFFERS))]
                        ),
                    )

        @pl.when(role > 0)
        def _():
            mine = lax.div(tiles - role + 2, jnp.int32(2))  # tiles role - 1, role + 1, ...
            loop(0, mine, lambda i: quantize(2 * i + role - 1))
            plgpu.wait_smem_to_gmem(0)

    scratch = {
        "x": swizzled((stages, ROWS, WIDTH), x.dtype, columns=BLOCK),
        "r": swizzled((r_slots, 2, r_blocks, BLOCK, BLOCK), x.dtype),
        "q": plgpu.SMEM((BUFFERS, ROWS, WIDTH), jnp.float4_e2m1fn),
        "word": plgpu.SMEM((BUFFERS, ROWS), jnp.int32),
        "s": plgpu.SMEM((BUFFERS, 32, 4), jnp.int32),
        "acc": plgpu.TMEM((ROWS, BUFFERS * WIDTH), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=1 if one_for_all else 2, num_barriers=stages),
        "empty": plgpu.Barrier(num_barriers=stages, orders_tensor_core=True),
        "ready": plgpu.Barrier(num_barriers=BUFFERS, orders_tensor_core=True),
        "drained": plgpu.Barrier(num_barriers=BUFFERS, orders_tensor_core=True),
        "r_full": plgpu.Barrier(),
    }
    elements, words = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((m, width), jnp.float4_e2m1fn),
            jax.ShapeDtypeStruct((m_tiles, k_tiles, 32, 4), jnp.int32),
        ),
        grid=(ctas,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        scratch_types={"scratch": scratch},
        kernel_name="rotate_quantize",
        compiler_params=pallas.LANE_SEMANTICS,
        **({} if interpret is None else {"interpret": interpret}),
    )(x, rotation)
    scale_bytes = lax.bitcast_convert_type(words, jnp.uint8)  # [..., 32, 4, 4]
    return elements, scale_bytes.reshape(m_tiles, k_tiles, 32, 16)


def _quantize_block(y: Float[Array, "rows 32"], rule: ScaleRule):
    """Scale byte and elements of one block a row; Inf or NaN in it leaves byte 255 and signs."""
    amax = jnp.max(lax.bitcast_convert_type(y, jnp.int32) & 0x7FFFFFFF, axis=1)
    bad = amax >= 0x7F800000
    byte = _scale_byte(y, amax, rule)
    kept = jnp.where(bad, jnp.int32(-(2**31)), jnp.int32(-1))
    z = y * _rows(_power_of_two(jnp.where(bad, 0, 127 - byte)), y)
    z = lax.bitcast_convert_type(z, jnp.int32) & _rows(kept, y)
    z = lax.bitcast_convert_type(z, jnp.float32)
    z = plgpu.layout_cast(z, plgpu.Layout.TCGEN05_TMEM_NATIVE(8))  # a word of codes at a time
    return jnp.where(bad, 255, byte), z.astype(jnp.float4_e2m1fn)


def _scale_byte(
    y: Float[Array, "rows 32"], amax: Int32[Array, " rows"], rule: ScaleRule
) -> Int32[Array, " rows"]:
    """E + 127 of each block, for the bits of its largest magnitude, if that is finite."""
    match rule:
        case ScaleRule.MSE:
            return _least_error_byte(y, amax)
        case ScaleRule.RCEIL_FLOAT:
            # amax = significand * 2^(e - 127), for a product that is normal.
            significand = lax.bitcast_convert_type(amax & 0x7FFFFF | 127 << 23, jnp.float32)
            sixth = lax.bitcast_convert_type(significand * jnp.float32(1 / 6), jnp.int32)
            exponent = (amax >> 23) - 127
            # As formats.scales has it, a subnormal product loses its last bit.
            lost = jnp.where(exponent + (sixth >> 23) == 0, 1, 0)
            return jnp.maximum(exponent + ((sixth + CARRY[ScaleRule.CEIL] - lost) >> 23), 0)
        case _:
            return jnp.maximum(((amax + CARRY[rule]) >> 23) - EMAX, 0)


def _least_error_byte(
    y: Float[Array, "rows 32"], amax: Int32[Array, " rows"]
) -> Int32[Array, " rows"]:
    """Of FLOOR's byte and its two neighbours, the one with the least squared error of the block.

    With z = y / 2^E for FLOOR's E, |z| < 8, and r what a scale 2^(E + step) makes of z,

        error = sum_i (|z_i| - r_i)^2 in units of 2^(2 u), with 2^u above every |z|

    added up as `formats.errors` does: each square in float32, as two integers of ERROR_BITS.
    """
    floor = _scale_byte(y, amax, ScaleRule.FLOOR)
    scale = _power_of_two(127 - floor)
    z = jnp.abs(y * _rows(scale, y))
    top = lax.bitcast_convert_type(lax.bitcast_convert_type(amax, jnp.float32) * scale, jnp.int32)
    unit = jnp.maximum(top >> 23, LEAST_TOP) - 126
    to_units = _rows(_power_of_two(ERROR_BITS - 2 * unit), y)

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

    most = floor | jnp.int32(2**31 - 1)  # above every error, in floor's layout
    # A loop that is not unrolled: three errors at a time would not fit into registers.
    best, _, _ = lax.fori_loop(jnp.int32(0), jnp.int32(3), take_better, (floor, most, most))
    return jnp.where(amax == 0, 0, best)


def _rounded(z: Float[Array, "rows 32"], step: Int32[Array, ""]) -> Float[Array, "rows 32"]:
    """E2M1 of z / 2^step, times 2^step, for z >= 0.

    A sum with 2^22 times z's power of two (2^step at least) keeps one bit below that power.
    """
    binade = jnp.maximum(lax.bitcast_convert_type(z, jnp.int32), (127 + step) << 23) & 0x7F800000
    cut = lax.bitcast_convert_type(binade + (22 << 23), jnp.float32)
    return jnp.minimum((z + cut) - cut, E2M1.max * _power_of_two(step))


def _power_of_two(exponent: Int32[Array, "*rows"]) -> Float[Array, "*rows"]:
    """2^exponent, from 2^-126 to 2^127."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _rows(
    values: Shaped[Array, " rows"], like: Shaped[Array, "rows 32"]
) -> Shaped[Array, "rows 32"]:
    """One value a row, in every column."""
    spread = lax.broadcast_in_dim(values, like.shape, (0,))
    return plgpu.layout_cast(spread, plgpu.Layout.TCGEN05_TMEM_NATIVE)
