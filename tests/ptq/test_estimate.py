"""The memory that a dry run predicts against what XLA allots to compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.checkpoints import load
from duquantpp_jax.evaluation.predict import Predictor, _predicted, evaluation_bytes
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.models.layers import positional_of
from duquantpp_jax.ptq.calibration import BATCH_ROWS, _run_layer, layers_of
from duquantpp_jax.ptq.estimate import estimate, running_bytes
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.recipes import recipe
from tests.conftest import TINY

MORE = 1.75
"""The prediction may be this many times what is measured, and never less."""


def test_bytes_are_those_of_codes_scales_and_transforms_and_seconds_those_of_the_products(
    monkeypatch,
):
    monkeypatch.setattr("duquantpp_jax.ptq.estimate.flops_per_second", lambda: 1.0)
    found = {}
    for rounding in ("rtn", "gptq"):
        method = recipe("rtn", "nvfp4", rounding, activation_format="mxfp4")
        plan = Plan.of(TINY, method, exclude=("*.1.mlp.*",))
        found[rounding] = estimate(plan, 4, 100)
    assert len(found["rtn"]["linears"]) == 14 - 3
    own = {row["linear"]: row["bytes"] for row in found["rtn"]["linears"]}
    codes, moves = 64 * 64 // 16 * 9 + 4, (4 + 8 * 32) * 64
    assert own["model.layers.1.self_attn.q_proj"] == codes
    assert own["model.layers.0.self_attn.o_proj"] == codes + moves
    assert found["rtn"]["bytes"] == sum(own.values())
    linears = 2 * 64 * (64 + 32) + 3 * 64 * 96  # parameters of a layer
    assert found["rtn"]["seconds"] == 2 * 2 * 400 * linears
    # A second pass over all, and of each site a Gram matrix, its factors, and rounding.
    sites = ((64, 128), (64, 64), (64, 192), (96, 64))
    each = [2 * 400 * k**2 + 2 * k**3 + 6 * n * k**2 for k, n in sites]
    more = 2 * 2 * 400 * linears + 2 * sum(each[:2]) + sum(each[2:])
    assert found["gptq"]["seconds"] == found["rtn"]["seconds"] + more


@pytest.mark.slow
def test_a_layer_and_an_evaluation_take_what_is_predicted(tiny_directory):
    model = load(tiny_directory)
    config, own = model.config, next(layers_of(model))
    x = jax.ShapeDtypeStruct((BATCH_ROWS, TARGETS, config.hidden_size), jnp.float32)
    given = x, own, positional_of(config, 0), {}
    layer = _run_layer.lower(*given, config=config, linear=None, mesh=None).compile()
    found = layer.memory_analysis()
    measured = found.temp_size_in_bytes + found.output_size_in_bytes
    assert measured < running_bytes(config, BATCH_ROWS, TARGETS, 2.0) < MORE * measured

    mesh = jax.sharding.Mesh(np.asarray(jax.local_devices()[:1]), ("rows",))
    tokens = jax.ShapeDtypeStruct((16, TARGETS + 1), jnp.int32)
    whole = _predicted.lower(Predictor(model), tokens, mesh=mesh).compile().memory_analysis()
    measured = whole.temp_size_in_bytes + whole.output_size_in_bytes
    measured += whole.argument_size_in_bytes
    assert measured < evaluation_bytes(config, TARGETS + 1) < MORE * measured
