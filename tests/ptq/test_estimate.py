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
from duquantpp_jax.ptq.estimate import running_bytes

MORE = 1.75
"""The prediction may be this many times what is measured, and never less."""


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
