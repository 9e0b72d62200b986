"""The library compressed-tensors reads what is exported for it (needs the extra `interop`)."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from duquantpp_jax.checkpoints.lazy import Checkpoint
from duquantpp_jax.checkpoints.online import moved_online, stored_matrix, transform_of
from duquantpp_jax.checkpoints.shards import inventory
from tests.checkpoints.test_layouts import exported, quantized
from tests.checkpoints.test_mxfp4 import COMPRESSED, drawn, written
from tests.conftest import tiny_decoder
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


def test_the_library_decodes_every_byte_and_scale_as_they_are_read_here(tmp_path):
    codes, scales = drawn((96, 64))
    plain = np.full_like(scales, 127)
    packed = {"mlp.up_proj": (codes, np.clip(scales, 1, 250)), "mlp.gate_proj": (codes, plain)}
    place = written(tmp_path / "m", tiny_decoder(), packed, COMPRESSED)
    layer, wanted = Checkpoint(place).layer(0), by_library(place)
    for name in packed:
        np.testing.assert_array_equal(layer[name], wanted[f"model.layers.0.{name}"])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard", "random-matrix"])
def test_matrices_that_the_library_has_made_move_inputs_as_it_moves_them(kind, inverse, tmp_path):
    import torch
    from compressed_tensors.transform import TransformConfig, apply_transform_config

    apply = {"targets": ["Linear"], "location": "input", "inverse": inverse, "ignore": ["lm_head"]}
    groups = {"R": {"type": kind, "apply": [apply], "head_dim": 32}}
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(64))
    apply_transform_config(model, TransformConfig(config_groups=groups))
    stored = {"0.R_input.weight": model[0].R_input.weight.detach().numpy()}
    save_file(stored, tmp_path / "model.safetensors")
    found = inventory(tmp_path)
    fields = {"quantization_config": {"transform_config": {"config_groups": groups}}}
    group = moved_online(fields, ["0"])["0"]
    transform = transform_of(stored_matrix("0", group, 64, found), group, 64, found)
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    with torch.no_grad():
        wanted = model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(transform.activations(jnp.asarray(x)), wanted, rtol=1e-4, atol=1e-5)
