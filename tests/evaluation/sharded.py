"""Run by test_perplexity.py in a process of its own, as devices are counted before their first use.

Rows are whole on a device and are never added up with others there, so that only the order of sums
inside a matrix product may differ with the rows beside them: some 2^-22 of a logit.
"""

import jax
import numpy as np

from duquantpp_jax.evaluation.predict import Predictor, row_sums
from duquantpp_jax.models import dense
from duquantpp_jax.ptq import stores as cache
from tests.conftest import tiny_decoder

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def main() -> None:
    devices = jax.devices()
    reference = Predictor(tiny_decoder(), dense)
    predictor = reference._replace(store=cache.store("bf16", 16))
    tokens = np.random.default_rng(0).integers(0, 257, (19, 24)).astype(np.int32)
    everywhere = row_sums(predictor, reference, tokens)
    alone = row_sums(predictor, reference, tokens, devices=devices[:1])
    for one, other in zip(everywhere, alone, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=7e-6)
    print(len(devices), "devices agree")


if __name__ == "__main__":
    main()
