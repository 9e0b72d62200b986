"""rotate_quantize: bits against the reference, over the shared cases.

Given the same rotated values all implementations give the same bits. So the bits are compared
where the rotation is exact in any order of additions (integers times a power of two), and, for
rotations that round, with the reference applied to the values that the kernel's own arithmetic
gives; against float32 rotations, codes may differ only next to a tie.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax import MXFP4, ScaleRule
from duquantpp_jax.kernels import Operand, rotate_quantize
from duquantpp_jax.kernels.rotate_quantize import mosaic
from duquantpp_jax.kernels.rotate_quantize.cases import SMALL, Case
from tests.kernels import interpreter

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def interpreted(x, rotation, smooth=None, ctas=None, **options) -> Operand:
    with interpreter.block_scaling(), pytest.MonkeyPatch.context() as patch:
        if ctas is not None:
            patch.setattr(mosaic, "cores", lambda: ctas)
        return jax.block_until_ready(
            mosaic.rotate_quantize(
                x, rotation, smooth, **options, interpret=interpreter.parameters()
            )
        )


def exact_inputs(case: Case):
    """Integers of the case's shape, so that rotation adds without rounding; zeros and signs."""
    draw = np.random.default_rng(case.m + case.k)
    x = draw.integers(-8, 9, (case.m, case.k)) * 2.0 ** draw.integers(-40, 40, (case.m, 1))
    x[0, :32] = 0
    x[-1, 32:64] = -0.0
    blocks = 1 if case.shared else case.k // 32
    rotation = draw.integers(-4, 5, (blocks, 32, 32)) / 8
    smooth = 2.0 ** draw.integers(-2, 3, case.k) if case.smooth else None
    return (
        jnp.asarray(x, jnp.bfloat16),
        jnp.asarray(rotation, jnp.float32),
        None if smooth is None else jnp.asarray(smooth, jnp.float32),
    )


def bits(operand: Operand) -> tuple[np.ndarray, ...]:
    """Codes with what is filled up, and scale bytes in their tiles."""
    tiles = jax.lax.bitcast_convert_type(operand.scales, jnp.uint8)
    return np.asarray(operand.element.codes(operand.elements)), np.asarray(tiles)


QUICK = ("smoothing; edges in m", "edges in m and k", "one token")
CTAS = {"rotation per block": 4, "smoothing; edges in m": 1, "one token": 1}
"""How many CTAs share the tiles of a case: 8, 12 and 2 of them; of the others 8 are shared by two.
So a CTA gets 2, 4 and 12 tiles, which is more than it has slots (3) and accumulators (4), and both
warpgroups get some. With a CTA for each tile, a kernel that waits for nothing passes."""
RUNS = [
    pytest.param(
        case,
        CTAS.get(case.label, 2),
        id=f"{case.name} {case.label}",
        marks=() if case.label in QUICK else pytest.mark.slow,
    )
    for case in SMALL
]


@interpreter.needs_interpreter
@pytest.mark.parametrize(("case", "ctas"), RUNS)
def test_bits_equal_the_reference_where_the_rotation_is_exact(case, ctas):
    x, rotation, smooth = exact_inputs(case)
    options = {"scale_rule": case.scale_rule}
    reference = functools.partial(rotate_quantize, implementation="reference", **options)
    expected = jax.jit(reference)(x, rotation, smooth)
    out = interpreted(x, rotation, smooth, ctas, **options)
    assert out.shape == expected.shape == (case.m, case.k)
    for mine, law in zip(bits(out), bits(expected), strict=True):
        np.testing.assert_array_equal(mine, law)
    assert not interpreter.races_found()


@interpreter.needs_interpreter
@pytest.mark.parametrize(
    "rule",
    [r if r is ScaleRule.RCEIL else pytest.param(r, marks=pytest.mark.slow) for r in ScaleRule],
)
def test_every_rule_turns_on_the_same_magnitudes_as_the_reference(rule):
    """Largest magnitudes around each rule's own border, in every part of the exponent range."""
    significands = [1, 1 + 2**-7, 1.5, 1.5 + 2**-7, 1.75 - 2**-7, 1.75, 2 - 2**-7]
    exponents = [-120, -100, -3, 0, 1, 2, 100, 127]
    amax = np.array([s * 2.0**e for s in significands for e in exponents])
    x = np.zeros((56, 32))
    x[:, 3] = amax
    x[:, 5] = -amax / 4
    x[:, 7] = amax * np.linspace(0.01, 1, 56)
    x, eye = jnp.asarray(x, jnp.bfloat16), jnp.eye(32)[None]
    out = interpreted(x, eye, scale_rule=rule).to_mx()
    law = MXFP4(scale_rule=rule).quantize(x)
    np.testing.assert_array_equal(out.scale_bytes(), law.scale_bytes())
    np.testing.assert_array_equal(out.codes(), law.codes())


@pytest.mark.slow
@interpreter.needs_interpreter
@pytest.mark.parametrize("rule", [ScaleRule.MSE, ScaleRule.RCEIL_FLOAT])
def test_rules_that_round_have_the_bits_of_the_reference(rule):
    """Blocks of all shapes: errors that tie, lie far apart, and exponents that are clamped."""
    draw = np.random.default_rng(0)
    gaussian = draw.normal(size=(96, 64)) * 2.0 ** draw.integers(-3, 4, (96, 64))
    few = draw.choice([0, 1, 1.25, 1.5, 1.75, 2.5, 3, 3.5, 5, 6, 7, 7.5], (160, 64))
    x = np.concatenate([gaussian, few * 2.0 ** draw.integers(-2, 1, (160, 64))])
    x = x * 2.0 ** draw.choice([-90, -60, -1, 0, 1, 60, 115], (256, 1))
    least = np.arange(128, 256)[:, None] * 2.0 ** (draw.integers(0, 4, (128, 64)) - 133)
    least *= draw.integers(0, 2, (128, 64))  # from 2^-126, below which CPUs make zeros
    x = np.concatenate([x, least])
    x, eye = jnp.asarray(x, jnp.bfloat16), jnp.eye(32)[None]
    out = interpreted(x, eye, scale_rule=rule).to_mx()
    law = MXFP4(scale_rule=rule).quantize(x)
    np.testing.assert_array_equal(out.scale_bytes(), law.scale_bytes())
    np.testing.assert_array_equal(out.codes(), law.codes())


@interpreter.needs_interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("rule", [ScaleRule.FLOOR, ScaleRule.MSE])
@pytest.mark.parametrize("poison", [np.nan, pytest.param(-np.inf, marks=pytest.mark.slow)])
def test_nan_and_inf_stay_in_their_block(poison, rule):
    x = np.ones((8, 96))
    x[3, 40] = poison
    x = jnp.asarray(x, jnp.bfloat16)
    out = interpreted(x, jnp.eye(32)[None], scale_rule=rule).to_mx()
    law = MXFP4(scale_rule=rule).quantize(x)
    np.testing.assert_array_equal(out.scale_bytes(), law.scale_bytes())
    assert int(out.scale_bytes()[3, 1]) == 255
    # Rotation turns Inf into Inf and NaN, whose sign is the machine's.
    codes = np.array(out.codes())
    codes[3, 32:64] &= 7
    assert not codes[3, 32:64].any()
    codes[3, 32:64] = np.asarray(law.codes())[3, 32:64]
    np.testing.assert_array_equal(codes, law.codes())


@interpreter.needs_interpreter
def test_codes_of_a_rounding_rotation_differ_only_next_to_a_tie():
    case = Case(128, 256, shared=False, smooth=True)
    x, rotation, smooth = jax.jit(case.inputs)(jax.random.key(0))
    out = interpreted(x, rotation, smooth).to_mx()
    law = rotate_quantize(x, rotation, smooth, implementation="reference").to_mx()
    same_scale = np.repeat(np.asarray(out.scale_bytes() == law.scale_bytes()), 32, axis=1)
    assert same_scale.mean() > 0.999
    y = np.asarray(x, np.float64) / np.asarray(smooth, np.float64)
    y = np.einsum("mbi,bij->mbj", y.reshape(128, 8, 32), np.asarray(rotation, np.float64))
    scale = 2.0 ** (np.asarray(law.scale_bytes()).astype(np.float64) - 127)
    z = np.abs(y.reshape(128, 256) / np.repeat(scale, 32, axis=1))
    from_tie = np.abs(z[..., None] - (VALUES[1:] + VALUES[:-1]) / 2).min(axis=-1)
    differ = np.asarray(out.codes() != law.codes()) & same_scale
    assert differ.mean() < 1e-3
    assert np.all(from_tie[differ] < 1e-3)


def test_two_bfloat16_parts_hold_a_matrix_to_2_to_the_minus_17():
    r = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (32, 32)))[0]
    parts = jax.jit(mosaic.split_bfloat16)(r)
    error = np.asarray(parts, np.float64).sum(axis=0) - np.asarray(r, np.float64)
    assert np.max(np.abs(error) / np.abs(np.asarray(r))) <= 2.0**-17


def test_reference_is_format_after_transform():
    case = Case(128, 256, shared=False, smooth=True)
    x, rotation, smooth = jax.jit(case.inputs)(jax.random.key(0))
    y = jnp.einsum(
        "mbi,bij->mbj",
        (x.astype(jnp.float32) / smooth).reshape(128, 8, 32),
        rotation,
        precision="highest",
    )
    law = MXFP4().quantize(y.reshape(128, 256))
    out = rotate_quantize(x, rotation, smooth).to_mx()
    assert np.mean(np.asarray(out.codes() == law.codes())) > 0.999
    np.testing.assert_array_equal(out.scale_bytes(), law.scale_bytes())


def test_wrong_input_says_what_is_right():
    x, rotation = jnp.ones((2, 64), jnp.bfloat16), jnp.eye(32)[None]
    with pytest.raises(ValueError, match="pad to 96"):
        rotate_quantize(jnp.ones((2, 65)), rotation)
    with pytest.raises(ValueError, match=r"\(1, 32, 32\) or \(2, 32, 32\)"):
        rotate_quantize(x, jnp.ones((3, 32, 32)))
    with pytest.raises(ValueError, match=r"shape \(64,\)"):
        rotate_quantize(x, rotation, jnp.ones(32))
    with pytest.raises(RuntimeError, match="this is cpu"):
        rotate_quantize(x, rotation, implementation="mosaic_sm100")


def test_the_kernel_says_what_it_does_not_take():
    assert mosaic.why_not(jnp.dtype(jnp.bfloat16)) is None
    assert "float32" in (mosaic.why_not(jnp.dtype(jnp.float32)) or "")
