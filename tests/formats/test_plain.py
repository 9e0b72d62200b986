"""bf16: its numbers are those of the type, its gradient is that of what is not rounded."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from duquantpp_jax.formats.plain import BFloat16

X = np.linspace(-3, 3, 64, dtype=np.float32).reshape(2, 32)


def test_it_rounds_to_the_type_and_passes_gradients_as_they_are():
    third = np.float32(1 / 3)
    rounded, gradient = jax.value_and_grad(lambda x: jnp.vdot(BFloat16().fake_quantize(x), third))(
        jnp.asarray(X[0, :1])
    )
    np.testing.assert_array_equal(BFloat16().fake_quantize(X), X.astype(ml_dtypes.bfloat16))
    assert rounded == X[0, 0] * third
    assert gradient == third  # which is no bfloat16


def test_options_and_types_are_refused_as_in_other_formats():
    with pytest.raises(ValueError, match="bf16 has no use for clip, key: it has no blocks"):
        BFloat16().fake_quantize(X, clip=np.float32(0.9), key=jax.random.key(0))
    with pytest.raises(ValueError, match="cannot quantize float64: give one of float32"):
        BFloat16().fake_quantize(X.astype(np.float64))
