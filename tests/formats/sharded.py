"""Run by test_sharded.py in a process of its own, as devices are counted before their first use."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from duquantpp_jax.core import ScaleRule
from duquantpp_jax.formats import MXFP4, MXFP6, MXFP8, NVFP4, FP32Scale

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def main() -> None:
    devices = jax.devices()
    mesh = Mesh(np.asarray(devices).reshape(4, 2), ("rows", "columns"))
    x = np.random.default_rng(0).standard_t(3, (64, 512)).astype(np.float32)
    x *= 2.0 ** np.random.default_rng(1).integers(-140, 100, (64, 1)).astype(np.float32)
    x[3, 7], x[9, 100] = np.nan, np.inf
    formats = [MXFP4(scale_rule=rule) for rule in ScaleRule]
    formats += [MXFP6(), MXFP8(), NVFP4(), NVFP4(four_over_six=True), FP32Scale()]
    for format in formats:
        whole = format.quantize(x)
        spread = jax.device_put(jnp.asarray(x), NamedSharding(mesh, P("rows", "columns")))
        parts = jax.jit(format.quantize)(spread)
        assert len(parts.elements.sharding.device_set) == 8, format
        np.testing.assert_array_equal(parts.codes(), whole.codes(), err_msg=str(format))
        for name in ("scales", "tensor_scale"):
            mine, theirs = getattr(parts, name), getattr(whole, name)
            assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes(), format
        np.testing.assert_array_equal(jax.jit(lambda q: q.dequantize())(parts), whole.dequantize())
    print(len(devices), "devices agree")


if __name__ == "__main__":
    main()
