"""The library compressed-tensors reads what is exported for it (needs the extra `interop`)."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoints.test_layouts import exported, quantized
from tests.decompress import assert_equal, by_library, dequantized

pytest.importorskip("compressed_tensors", reason="needs the extra interop")


@pytest.fixture(scope="module")
def both(tiny_directory, tmp_path_factory):
    """A quantized model and what was exported of it."""
    place = tmp_path_factory.mktemp("interop")
    model = quantized(tiny_directory, place / "q", exclude=("*.0.mlp.down_proj",))
    exported(model, place / "e")
    return model, place / "e"


def test_the_library_decompresses_every_weight_to_ours_bit_for_bit(both):
    model, out = both
    assert_equal(by_library(out), dequantized(model))


def test_the_library_rotates_inputs_as_the_model_does(both):
    import torch
    from compressed_tensors.transform import TransformConfig, apply_transform_config

    model, out = both
    fields = json.loads((out / "config.json").read_text())["quantization_config"]
    config = TransformConfig(**fields["transform_config"])
    (scheme,) = config.config_groups.values()
    name = scheme.apply[0].targets[0]
    linear = torch.nn.Linear(64, 64, bias=False)
    outer = torch.nn.Module()
    inner = outer
    for part in name.split(".")[:-1]:
        inner.add_module(part, torch.nn.Module())
        inner = getattr(inner, part)
    inner.add_module(name.split(".")[-1], linear)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(64))
    apply_transform_config(outer, config)
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    from duquantpp_jax.checkpoints import Quantized

    transform = Quantized(model).layer(0)[1]["attention_in"].transform
    wanted = transform.activations(jnp.asarray(x))
    with torch.no_grad():
        found = linear(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)
