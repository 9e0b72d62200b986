"""A Gemma 3 is quantized, folded and written in other layouts as other models are.

That its float function is the library's is tested with the other families'.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax import cli
from duquantpp_jax.checkpoints import Quantized, load, save
from duquantpp_jax.checkpoints.compressed_tensors import pack_layer
from duquantpp_jax.commands.export import ExportOptions, export
from duquantpp_jax.commands.quantize import QuantizeOptions, quantize
from duquantpp_jax.models import Decoder
from duquantpp_jax.models.families import FAMILIES
from tests.commands.test_quantize import assert_one_line
from tests.conftest import TEXT, byte_tokenizer, tiny_decoder

NAME = "Gemma3ForCausalLM"
NORMS = {"attention_in": "input_layernorm", "mlp_in": "pre_feedforward_layernorm"}
RUN = jax.jit(lambda model, tokens: model(tokens)[0])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """One of two layers, a local one and a global one, whose norms are not all alike."""
    changes = {"sliding_window": 6, "layer_types": ("sliding_attention", "full_attention")}
    changes |= {"rope_local_base_freq": 25.0, "rope_theta": 1000.0, "query_pre_attn_scalar": 24.0}
    drawn = tiny_decoder(architecture=NAME, embedding_scale=8.0, **changes, **FAMILIES[NAME].layer)
    parameters, rng = drawn.parameters(), np.random.default_rng(0)
    for name, array in parameters.items():
        if name.endswith("norm"):
            parameters[name] = jnp.asarray(0.3 * rng.standard_normal(array.shape), jnp.float32)
    place = tmp_path_factory.mktemp("gemma") / "tiny"
    save(Decoder(drawn.config, parameters), byte_tokenizer().to_str(), place)
    assert load(place).config == drawn.config
    return place


def quantized(directory, out, **more):
    quantize(QuantizeOptions(model=directory, out=out, rows=1, calibration_text=TEXT, **more))
    return out


@pytest.mark.slow
def test_a_folded_and_turned_one_is_still_the_model(directory, tmp_path):
    asked = {"recipe": "smooth_hadamard", "formats": ("mxfp8",), "fuse": True}
    out = quantized(directory, tmp_path / "q", rotate_values="hadamard", **asked)
    export(ExportOptions(out, "dequantized", out=tmp_path / "e"))
    model, tokens = load(tmp_path / "e"), jnp.arange(48).reshape(2, 24)
    found, wanted = RUN(model, tokens), RUN(load(directory), tokens)
    assert np.linalg.norm(found - wanted) < 0.15 * np.linalg.norm(wanted)
    name = f"model.layers.*.{NORMS['mlp_in']}"
    gains = (np.asarray(one.parameters()[name], np.float32) for one in (model, load(directory)))
    assert np.any(np.not_equal(*gains))


@pytest.mark.slow
def test_smoothing_is_folded_into_gains_when_it_is_exported(directory, tmp_path):
    """To float32: g / s - 1 is rounded once more than g / s, in units of at most 2^-24."""
    reading = tuple(f"*.{name}_proj" for name in ("q", "k", "v", "up", "gate"))
    model = Quantized(quantized(directory, tmp_path / "q", recipe="smooth", include=reading))
    for number in range(2):
        parameters, sites = model.layer(number)
        layer = pack_layer(model.config, number, parameters, sites)
        for site, norm in NORMS.items():
            scale = np.asarray(sites[site].transform.links[0].scale)
            weight = layer.tensors[f"model.layers.{number}.{norm}.weight"].astype(np.float64)
            wanted = (1.0 + parameters[norm].astype(np.float64)) / scale
            assert np.ptp(scale) > 0
            np.testing.assert_allclose(1 + weight, wanted, rtol=2**-23, atol=2**-23)
        for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
            found = layer.tensors[f"model.layers.{number}.{norm}.weight"]
            np.testing.assert_array_equal(found, parameters[norm])


def test_its_residual_stream_cannot_be_rotated(directory, tmp_path, capsys):
    arguments = ["quantize", "--model", str(directory), "--out", str(tmp_path / "q"), "--rows", "4"]
    code = cli.main([*arguments, "--rotate-stream", "hadamard"])
    assert_one_line(code, capsys, f"the residual stream of a {NAME} cannot be rotated")
