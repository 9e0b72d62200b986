"""Quantizing to bytes takes the memory of what goes in and what comes out, and no tenth more."""

import jax
import jax.numpy as jnp
import pytest

from duquantpp_jax.core import ScaleRule
from duquantpp_jax.formats import MXFP4
from duquantpp_jax.formats.packing import pack_blocks


def share(program, x) -> float:
    """Input, output and temporaries of the compiled program over input and output."""
    analysis = jax.jit(program).lower(x).compile().memory_analysis()
    ends = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return (ends + analysis.temp_size_in_bytes) / ends


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rule", [ScaleRule.FLOOR, ScaleRule.RCEIL], ids=lambda r: r.value)
def test_packed_bytes_take_a_tenth_more_than_input_and_output(dtype, rule):
    def packed(x):
        q = MXFP4(scale_rule=rule).encode(x)
        return pack_blocks(q), q.scale_bytes()

    assert 1 < share(packed, jax.ShapeDtypeStruct((512, 4096), dtype)) <= 1.1


def test_float4_elements_take_their_packed_bytes_once_more():
    # XLA copies the packed bytes (an eighth of float32 x) to read them as float4.
    x = jax.ShapeDtypeStruct((512, 4096), jnp.float32)
    assert share(MXFP4().quantize, x) <= 1.12
