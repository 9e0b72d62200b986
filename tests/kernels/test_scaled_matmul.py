"""scaled_matmul: one body for every implementation, over the shared cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax import MXFP4
from duquantpp_jax.formats import E2M1
from duquantpp_jax.kernels import Operand, scaled_matmul
from duquantpp_jax.kernels.implementation import choose
from duquantpp_jax.kernels.scaled_matmul import mosaic, xla
from duquantpp_jax.kernels.scaled_matmul.cases import PROOF, SMALL, Case
from tests.kernels import interpreter

TOLERANCE = {"float32": 1e-6, "bfloat16": 2.0**-8}  # of bfloat16: half a unit in the last place


def exact(a: Operand, b: Operand) -> np.ndarray:
    """The product in float64."""

    def values(x: Operand) -> np.ndarray:
        mx = jax.jit(Operand.to_mx)(x)
        scales = np.repeat(np.asarray(mx.scales).astype(np.float64), mx.block_size, axis=1)
        tensor_scale = 1.0 if mx.tensor_scale is None else float(mx.tensor_scale)
        return np.asarray(mx.elements).astype(np.float64) * scales * tensor_scale

    return values(a) @ values(b).T


def error(out: jax.Array, expected: np.ndarray) -> float:
    """Largest error, relative to the largest number."""
    assert out.shape == expected.shape
    return float(np.abs(np.asarray(out, np.float64) - expected).max() / np.abs(expected).max())


def interpreted(a: Operand, b: Operand, case: Case) -> jax.Array:
    with interpreter.block_scaling():
        return jax.block_until_ready(
            mosaic.scaled_matmul(
                a,
                b,
                out_dtype=jnp.dtype(case.out),
                tiling=case.tiling,
                interpret=interpreter.parameters(),
            )
        )


def run(implementation: str, a: Operand, b: Operand, case: Case) -> jax.Array:
    if implementation == "interpreted":
        return interpreted(a, b, case)
    call = functools.partial(
        scaled_matmul, out_dtype=jnp.dtype(case.out), implementation=implementation
    )
    return jax.jit(call)(a, b)


@functools.cache
def operands(case: Case) -> tuple[Operand, Operand]:
    return jax.jit(case.operands)(jax.random.key(case.k))


XLA = pytest.param("xla", marks=pytest.mark.skipif(xla.why_not() is not None, reason="jax 0.10"))
QUICK = ("accumulators overlap", "edges in m, n and k", "k split", "edges")
RUNS = [
    pytest.param(
        case,
        name,
        id=f"{name} {case.name} {case.label}",
        marks=[*marks, *(() if case.label in QUICK else (pytest.mark.slow,))],
    )
    for case in SMALL
    for name, marks in (
        ("reference", ()),
        ("xla", XLA.marks),
        ("interpreted", (interpreter.needs_interpreter,)),
    )
]


@functools.cache
def product(case: Case) -> np.ndarray:
    return exact(*operands(case))


@pytest.mark.parametrize(("case", "implementation"), RUNS)
def test_every_implementation_is_the_float64_product(case, implementation):
    a, b = operands(case)
    out = run(implementation, a, b, case)
    assert out.dtype == jnp.dtype(case.out)
    assert error(out, product(case)) <= TOLERANCE[case.out]
    if implementation == "interpreted":
        assert not interpreter.races_found()


@interpreter.needs_interpreter
def test_scales_without_tiles_are_noticed():
    case = SMALL[0]
    a, b = operands(case)
    rows = jax.lax.bitcast_convert_type(a.to_mx().scale_bytes(), a.scales.dtype)
    wrong = a.replace(scales=rows.reshape(a.scales.shape))
    assert error(interpreted(wrong, b, case), exact(a, b)) > 0.1


@interpreter.needs_interpreter
def test_one_scale_buffer_for_all_slots_is_a_race(monkeypatch):
    case = SMALL[0]
    a, b = operands(case)
    monkeypatch.setattr(
        mosaic, "_scale_buffers", lambda scratch, _: (scratch["sa_tmem"][0], scratch["sb_tmem"][0])
    )
    assert interpreter.has_race(lambda: interpreted(a, b, case))


@interpreter.needs_interpreter
def test_a_step_of_k_too_few_is_noticed(monkeypatch):
    case = next(case for case in SMALL if case.label == "edges in m, n and k")
    a, b = operands(case)
    steps = mosaic._steps
    monkeypatch.setattr(mosaic, "_steps", lambda *sizes: steps(*sizes) - 1)
    assert error(interpreted(a, b, case), exact(a, b)) > 1e-3


@interpreter.needs_interpreter
def test_overwriting_an_accumulator_before_it_is_written_out_is_a_race(monkeypatch):
    """Two accumulators of 256 columns overlap; one that claims not to waits a tile too few."""
    case = next(case for case in SMALL if case.label == "accumulators overlap")
    a, b = operands(case)
    monkeypatch.setattr(mosaic, "_lag", lambda overlap: 2)
    assert interpreter.has_race(lambda: interpreted(a, b, case))


@pytest.mark.parametrize("implementation", ["reference", XLA])
def test_mx_arrays_are_laid_out_on_the_way(implementation):
    x, w = (jax.random.normal(jax.random.key(i), (n, 96)) for i, n in enumerate((5, 7)))
    a, b = MXFP4().quantize(x), MXFP4().quantize(w)
    out = scaled_matmul(a, b, out_dtype=jnp.float32, implementation=implementation)
    np.testing.assert_allclose(out, np.asarray(a.dequantize() @ b.dequantize().T), rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 32), (7, 96), (8, 256), (130, 544)])
def test_laying_out_loses_nothing(shape):
    mx = MXFP4().quantize(jax.random.normal(jax.random.key(0), shape))
    back = Operand.from_mx(mx).to_mx()
    np.testing.assert_array_equal(back.codes(), mx.codes())
    np.testing.assert_array_equal(back.scale_bytes(), mx.scale_bytes())


def test_what_is_filled_up_is_zero():
    mx = MXFP4().quantize(jnp.ones((9, 32)))
    operand = Operand.from_mx(mx)
    assert operand.elements.shape == (16, 256)
    codes = E2M1.codes(operand.elements)
    assert int(codes.astype(jnp.int32).sum()) == 9 * 32 * int(mx.codes()[0, 0])
    tiles = jax.lax.bitcast_convert_type(operand.scales, jnp.uint8).astype(jnp.int32)
    assert int(tiles.sum()) == 9 * int(mx.scale_bytes()[0, 0])


def test_wrong_input_says_what_is_right():
    a, b = operands(Case(8, 8, 64))
    c, _ = operands(Case(8, 8, 128))
    other, _ = operands(Case(8, 8, 64, "mxfp8"))
    with pytest.raises(ValueError, match="K = 64 and b has K = 128"):
        scaled_matmul(a, c)
    with pytest.raises(ValueError, match="MXFP4 and b is MXFP8"):
        scaled_matmul(a, other)
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        scaled_matmul(a, b, out_dtype=jnp.float16)
    with pytest.raises(ValueError, match="must be one of"):
        scaled_matmul(a, b.replace(block_size=16))
    with pytest.raises(ValueError, match=r"name one of \['reference'\]"):
        choose("scaled_matmul", "cudnn", {"reference": lambda: None})
    with pytest.raises(ValueError, match="rows and K"):
        Operand.from_mx(MXFP4().quantize(jnp.ones((2, 2, 32))))


def test_a_named_implementation_that_cannot_run_says_why():
    a, b = operands(Case(8, 8, 64))
    with pytest.raises(RuntimeError, match=r"compute capability 10\.x, and this is cpu"):
        scaled_matmul(a, b, implementation="mosaic_sm100")


def test_the_choice_is_logged(caplog):
    a, b = operands(Case(8, 8, 64))
    with caplog.at_level("DEBUG", logger="duquantpp_jax.kernels"):
        scaled_matmul(a, b)
    assert "scaled_matmul: reference on cpu" in caplog.text


@pytest.mark.parametrize("case", PROOF, ids=lambda case: f"{case.name} {case.label}")
def test_a_chosen_tiling_fits_a_multiprocessor(case):
    t = case.used_tiling
    depth = 256 if case.element.dtype == jnp.float4_e2m1fn else 128
    assert t.shared_bytes(depth, case.block, jnp.bfloat16) <= 227 * 1024
    scales = t.stages * t.scale_columns(depth, case.block)
    assert t.stride(depth, case.block) + t.columns + scales <= 512
    assert t.stages >= 3
