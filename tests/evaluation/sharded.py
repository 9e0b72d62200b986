"""Run by test_predict.py in a process of its own, as devices are counted before their first use.

A batch is whole on its device, so that under log256, whose scale spans a batch, a device sees what
one device alone would: only the order of sums inside a matrix product may differ.
"""

import jax
import numpy as np

from duquantpp_jax.evaluation.predict import Predictor, Reference
from duquantpp_jax.evaluation.scoring import Scorer
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.walk import quantize_decoder
from duquantpp_jax.recipes import recipe
from tests.conftest import tiny_decoder

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def main() -> None:
    devices = jax.devices()
    model = tiny_decoder()
    tokens = np.random.default_rng(0).integers(0, 257, (19, 24)).astype(np.int32)
    plan = Plan.of(model.config, recipe("rtn", "log256"))
    predictor = Predictor(*quantize_decoder(plan, model, tokens))
    # 19 rows are ten batches: eight, and two beside six devices that have none.
    everywhere, alone = (
        Reference(Predictor(model), tokens, batch_rows=2, devices=some).row_sums(predictor)
        for some in (None, devices[:1])
    )
    for values, others in zip(everywhere, alone, strict=True):
        np.testing.assert_allclose(values, others, rtol=1e-6, atol=7e-6)
    rows = [row.tolist() for row in tokens[:9, :10]]
    everywhere, alone = (
        Scorer(Predictor(model), batch_rows=2, devices=some)(rows) for some in (None, devices[:1])
    )
    for scored, other in zip(everywhere, alone, strict=True):
        np.testing.assert_allclose(scored.log_q, other.log_q, rtol=1e-6, atol=7e-6)
    print(len(devices), "devices agree")


if __name__ == "__main__":
    main()
