"""Other layouts hold the weights that quantizing left, bit for bit, or refuse to."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from duquantpp_jax import cli
from duquantpp_jax.checkpoints import Quantized, load, load_any, save
from duquantpp_jax.checkpoints.seal import write_seal
from duquantpp_jax.commands.export import ExportOptions, export
from duquantpp_jax.commands.quantize import QuantizeOptions, quantize
from duquantpp_jax.models import SITE_WEIGHTS, SITES
from duquantpp_jax.ptq.site import layer_of
from duquantpp_jax.transforms.block import BlockAffine, BlockRotation
from duquantpp_jax.transforms.hadamard import hadamard
from tests.checkpoints.spoiling import rewrite
from tests.commands.test_quantize import assert_one_line
from tests.conftest import TEXT, byte_tokenizer, tiny_decoder
from tests.decompress import assert_equal, by_numpy, dequantized, tensors_of
from tests.documented import undocumented
from tests.transforms.test_law import Stranger


def stored_in(state):
    """The packed weights of a model of two layers, decoded, by name."""
    return {
        f"model.layers.{number}.{name}": np.asarray(layer_of(weight, number).dequantize())
        for site, names in SITE_WEIGHTS.items()
        for name, weight in zip(names, state[site].weights, strict=True)
        for number in range(2)
    }


RUN = jax.jit(lambda model, tokens: model(tokens)[0])


def quantized(model, out, **more):
    quantize(QuantizeOptions(model=model, out=out, rows=4, calibration_text=TEXT, **more))
    return out


def exported(model, out, format="compressed-tensors"):
    export(ExportOptions(model, format, out=out))
    return tensors_of(out)


@pytest.mark.slow
def test_packed_weights_decode_to_those_of_the_model(tiny_directory, tmp_path):
    model = quantized(tiny_directory, tmp_path / "q", exclude=("*.0.mlp.down_proj",))
    tensors = exported(model, tmp_path / "e")
    wanted = dequantized(model)
    assert len(wanted) == 13
    assert_equal(by_numpy(tmp_path / "e"), wanted)
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == ml_dtypes.bfloat16
    fields = json.loads((tmp_path / "e" / "config.json").read_text())["quantization_config"]
    assert fields["ignore"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    (scheme,) = fields["transform_config"]["config_groups"].values()
    assert scheme["head_dim"] == 32
    assert set(scheme["apply"][0]["targets"]) == set(wanted)


@pytest.mark.slow
def test_smoothing_is_folded_into_norms_and_hadamard_matrices_are_seen_in_strangers(
    tiny_directory, tmp_path
):
    from duquantpp_jax.checkpoints.compressed_tensors import pack_layer

    model = Quantized(quantized(tiny_directory, tmp_path / "q", recipe="smooth"))
    parameters, sites = model.layer(0)
    foldable = {site: sites[site] for site in ("attention_in", "mlp_in")}
    identity = Quantized(quantized(tiny_directory, tmp_path / "i", recipe="rtn")).layer(0)[1]
    layer = pack_layer(model.config, 0, parameters, identity | foldable)
    for site, norm in (("attention_in", "input_layernorm"), ("mlp_in", "post_attention_layernorm")):
        scale = np.asarray(sites[site].transform.links[0].scale)
        found = layer.tensors[f"model.layers.0.{norm}.weight"]
        assert np.ptp(scale) > 0
        np.testing.assert_array_equal(found, parameters[norm].astype(np.float32) / scale)
    assert not layer.moved
    stranger = Stranger(BlockRotation(hadamard(32)[None]))
    turned = dataclasses.replace(identity["mlp_in"], transform=stranger)
    layer = pack_layer(model.config, 0, parameters, identity | {"mlp_in": turned})
    assert set(layer.moved["hadamard"]) == {f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"recipe": "duquantpp"}, "one for all blocks of a site: quantize with :shared"),
        ({"exclude": ("*.q_proj",)}, "self_attn.q_proj is in float beside quantized linears"),
        ({"recipe": "smooth", "include": ("*.down_proj",)}, "mlp_out: its smoothing"),
    ],
)
def test_a_transform_that_the_layout_cannot_express_is_refused_with_the_reason(
    more, says, tiny_directory, tmp_path, capsys
):
    model = quantized(tiny_directory, tmp_path / "q", **more)
    arguments = ["export", "--model", str(model), "--out", str(tmp_path / "e")]
    assert_one_line(cli.main(arguments), capsys, says)
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


@pytest.mark.parametrize(
    ("job", "says"),
    [
        ({"weight_formats": dict.fromkeys(SITES, "mxfp8")}, "this model has weights in mxfp8"),
        ({"activation_formats": dict.fromkeys(SITES, "nvfp4")}, "activations in nvfp4"),
        ({"weight_formats": dict.fromkeys(SITES, "fp32")}, "weights in fp32"),
    ],
)
def test_a_format_that_the_layout_has_not_is_refused(job, says, tiny_directory, tmp_path, capsys):
    model = quantized(tiny_directory, tmp_path / "q")
    described = json.loads((model / "quantization.json").read_text())
    described["job"] |= job
    (model / "quantization.json").write_text(json.dumps(described))
    write_seal(model, {})
    arguments = ["export", "--model", str(model), "--out", str(tmp_path / "e")]
    assert_one_line(cli.main(arguments), capsys, says)


@pytest.mark.slow
def test_a_turned_model_is_exported_as_a_plain_one_whose_head_is_its_own(tiny_directory, tmp_path):
    """Moved online by matrices that are not their own inverses, as Hadamard's are."""
    turned = {"rotate_stream": "hadamard", "rotate_values": "random_hadamard"}
    turned |= {"recipe": "random_hadamard", "formats": ("mxfp8",)}
    model = quantized(tiny_directory, tmp_path / "q", **turned)
    assert json.loads((model / "report.json").read_text())["untied_head"]
    tensors = exported(model, tmp_path / "e", "dequantized")
    decoder, floats = load(tmp_path / "e"), load(tiny_directory)
    assert not decoder.config.tie_word_embeddings
    assert tensors["lm_head.weight"].dtype == tensors["model.embed_tokens.weight"].dtype
    tokens = jnp.arange(48).reshape(2, 24)
    found, wanted = (RUN(m, tokens) for m in (decoder, floats))
    assert np.any(decoder.embedding[...] != floats.embedding[...])
    assert np.linalg.norm(found - wanted) < 0.15 * np.linalg.norm(wanted)


@pytest.mark.slow
def test_dequantized_is_a_float_model_of_the_weights_moved_back(tmp_path, capsys):
    save(tiny_decoder(intermediate_size=88), byte_tokenizer().to_str(), tmp_path / "odd")
    model = quantized(tmp_path / "odd", tmp_path / "q", recipe="duquantpp", pad=True)
    arguments = ["export", "--model", str(model), "--format", "dequantized"]
    assert cli.main([*arguments, "--out", str(tmp_path / "e"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert undocumented(found) == set()
    assert "Activations are not quantized" in " ".join(found["notes"])
    decoder, opened, floats = load(tmp_path / "e"), Quantized(model), load(tmp_path / "odd")
    for number in range(2):
        _, sites = opened.layer(number)
        for site in SITES:
            pairs = zip(decoder.weights(site), floats.weights(site), strict=True)
            for weight, (found, wanted) in zip(sites[site].weights, pairs, strict=True):
                w = sites[site].transform.inverse().weights(weight.dequantize())
                w = w[:, : found.shape[-1]].astype(ml_dtypes.bfloat16)
                np.testing.assert_array_equal(found[number], w.astype(np.float32))
                error = np.linalg.norm(found[number] - wanted[number])
                assert 0.05 < error / np.linalg.norm(wanted[number]) < 0.25  # 4 bits, 12 to 26 dB


@pytest.mark.slow
def test_smoothing_fused_before_rounding_is_exported_bit_for_bit_and_costs_no_accuracy(
    tiny_directory, tmp_path
):
    model = quantized(tiny_directory, tmp_path / "q", recipe="smooth_hadamard", fuse=True)
    rewrite(model, torch_dtype="float16")
    write_seal(model, {})
    *_, note = export(ExportOptions(model, out=tmp_path / "e"))
    fields, tensors = (
        json.loads((tmp_path / "e/config.json").read_text()),
        tensors_of(tmp_path / "e"),
    )
    assert (fields["dtype"], fields["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert "dtype bfloat16" in note
    assert f"the {sum(t.dtype == np.float32 for t in tensors.values())} tensors" in note
    assert_equal(by_numpy(tmp_path / "e"), dequantized(model))
    opened = Quantized(model)
    for number in range(2):
        others, sites = opened.layer(number)
        for site in SITES:
            assert isinstance(sites[site].transform, BlockAffine)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found = tensors[f"model.layers.{number}.{norm}.weight"]
            np.testing.assert_array_equal(found, others[norm])
            assert np.ptp(found) > 0
    plain = quantized(tiny_directory, tmp_path / "p", recipe="smooth_hadamard")
    tokens = jnp.arange(48, dtype=jnp.int32).reshape(2, 24)
    run = jax.jit(lambda m, s, linear: m(tokens, linear, s)[0], static_argnames="linear")
    logits = [run(m, s, linear) for m, linear, s in map(load_any, (tiny_directory, plain, model))]
    errors = [float(np.linalg.norm(other - logits[0])) for other in logits[1:]]
    assert 0 < errors[1] < 1.5 * errors[0]
    again, linear, state = load_any(tmp_path / "e", "mxfp4")  # what was exported is read back
    assert_equal(by_numpy(tmp_path / "e"), stored_in(state))
    np.testing.assert_allclose(run(again, state, linear), logits[2], rtol=1e-4, atol=1e-4)


def test_a_directory_that_exists_is_left_alone(tiny_directory, tmp_path, capsys):
    model = quantized(tiny_directory, tmp_path / "q")
    arguments = ["export", "--model", str(model), "--out", str(model)]
    assert_one_line(cli.main(arguments), capsys, "already exists")
    arguments = ["export", "--model", str(tiny_directory), "--out", str(tmp_path / "e")]
    assert_one_line(cli.main(arguments), capsys, "is no quantized model")
