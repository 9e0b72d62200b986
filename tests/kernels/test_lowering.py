"""Lowering for CUDA on a machine that has neither a GPU nor a wheel of NVIDIA's."""

import re

import jax
import jax.numpy as jnp
import pytest

from duquantpp_jax.core import ScaleRule
from duquantpp_jax.kernels.rotate_quantize import mosaic as rotate_quantize
from duquantpp_jax.kernels.rotate_quantize.cases import Case as Rotation
from duquantpp_jax.kernels.scaled_matmul import mosaic as scaled_matmul
from duquantpp_jax.kernels.scaled_matmul.cases import Case
from duquantpp_jax.kernels.scaled_matmul.tiling import choose_tiling


@pytest.fixture(autouse=True)
def _blackwell(monkeypatch):
    """Mosaic lowers for compute capability 10.0, where it would assume 9.0 without a device."""
    from jax.experimental.mosaic.gpu import core, utils

    for module in (core, utils):
        if hasattr(module, "_infer_arch"):
            monkeypatch.setattr(module, "_infer_arch", lambda: (10, 0))


def text(call, *arguments) -> str:
    return jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def key():
    return jax.eval_shape(lambda: jax.random.key(0))


@pytest.mark.parametrize("collective", [False, True])
@pytest.mark.parametrize(
    ("kind", "operation"),
    [
        ("mxfp4", r"kind::mxf4(nvf4)?\.block_scale\.scale_vec::2X"),
        ("nvfp4", r"kind::mxf4nvf4\.block_scale\.scale_vec::4X"),
        ("mxfp8", r"kind::mxf8f6f4\.block_scale\.scale_vec::1X"),
    ],
)
def test_scaled_matmul_lowers_to_the_block_scaled_operation(kind, operation, collective):
    case = Case(512, 512, 2048, kind)
    tiling = choose_tiling(512, 512, 2048, case.element.dtype, case.block, collective=collective)
    operands = jax.eval_shape(case.operands, key())
    lowered = text(lambda a, b: scaled_matmul.scaled_matmul(a, b, tiling=tiling), *operands)
    assert re.search(operation, lowered)
    assert f"cta_group::{1 + collective}" in lowered
    assert "dot_general" not in lowered


@pytest.mark.parametrize("rule", ScaleRule)
def test_rotate_quantize_lowers_to_tensor_cores_and_hardware_rounding(rule):
    arguments = jax.eval_shape(Rotation(256, 512, smooth=True).inputs, key())
    lowered = text(lambda *a: rotate_quantize.rotate_quantize(*a, scale_rule=rule), *arguments)
    assert "kind::f16" in lowered
    assert "cvt.rn.satfinite.e2m1x2.f32" in lowered
    assert "dot_general" not in lowered


def test_rotate_quantize_needs_blackwell(monkeypatch):
    from jax.experimental.mosaic.gpu import core, utils

    for module in (core, utils):
        if hasattr(module, "_infer_arch"):
            monkeypatch.setattr(module, "_infer_arch", lambda: (9, 0))
    arguments = jax.eval_shape(Rotation(256, 512).inputs, key())[:2]
    with pytest.raises(ValueError, match="Blackwell"):
        text(lambda *a: rotate_quantize.rotate_quantize(*a), *arguments)


def test_splitting_k_adds_parts_in_float32():
    case = Case(16, 1024, 4096)
    assert case.used_tiling.splits > 1
    operands = jax.eval_shape(case.operands, key())
    out = jax.eval_shape(lambda a, b: scaled_matmul.scaled_matmul(a, b), *operands)
    assert (out.shape, out.dtype) == ((16, 1024), jnp.bfloat16)
    lowered = text(lambda a, b: scaled_matmul.scaled_matmul(a, b), *operands)
    assert re.search(r"stablehlo.reduce.*applies stablehlo.add.*tensor<4x16x1024xf32>", lowered)
