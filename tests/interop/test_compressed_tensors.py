"""The library compressed-tensors and transformers read what is exported for them, and compute what
the model here does (needs the extra `interop`)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from duquantpp_jax.checkpoints import load, load_any, save, testbed
from duquantpp_jax.checkpoints.compressed_tensors import transform_groups
from duquantpp_jax.checkpoints.lazy import Checkpoint
from duquantpp_jax.checkpoints.online import moved_online, stored_matrix, transform_of
from duquantpp_jax.checkpoints.shards import inventory
from duquantpp_jax.commands.export import export
from duquantpp_jax.commands.options.export import ExportOptions
from duquantpp_jax.commands.options.quantize import QuantizeOptions
from duquantpp_jax.commands.quantize import quantize
from duquantpp_jax.models import SITE_WEIGHTS
from duquantpp_jax.models.parameters import EXPERT_SITES
from duquantpp_jax.ptq.site import QuantizedLinear, move_input
from tests.checkpoints.test_layouts import exported, quantized
from tests.checkpoints.test_mxfp4 import COMPRESSED, drawn, written
from tests.checkpoints.test_serving import served  # noqa: F401
from tests.conftest import byte_tokenizer, mixture, tiny_decoder
from tests.decompress import assert_equal, by_library, dequantized, tensors_of
from tests.interop.parity import (
    TOKENS,
    assert_writes,
    kl,
    logits_in_transformers,
    logits_of,
)

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


def test_an_export_for_another_rule_loads_with_a_warning(both):
    from duquantpp_jax.interop import load_transformers

    with pytest.warns(UserWarning, match="has activations in mxfp4:even, not mxfp4:floor"):
        load_transformers(both[1])


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


RECIPES = [
    ("identity", {}),
    ("block_hadamard", {"exclude": ("*.q_proj", "*.0.mlp.down_proj")}),
    ("wush_conditioned", {"activation_formats": ("bf16",), "rounding": "gptq"}),
]


def test_a_fitted_model_computes_and_writes_in_transformers_what_it_does_here(served):  # noqa: F811
    from duquantpp_jax.interop import load_transformers

    model, ours = load_transformers(served[1]), logits_of(served[0])
    wanted = ours(TOKENS)
    assert kl(wanted, logits_in_transformers(model, TOKENS)) < 1e-6
    assert_writes(model, ours)
    for module in model.modules():
        module._forward_pre_hooks.clear()
    assert kl(wanted, logits_in_transformers(model, TOKENS)) > 0.01


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The embedded model quantized, and its export, with a row of 511 tokens."""
    place = tmp_path_factory.mktemp("embedded")
    options = {"rows": 4, "serve": "transformers", "recipe": "block_hadamard"}
    quantize(QuantizeOptions(out=place / "q", **options))
    export(ExportOptions(place / "q", serve="transformers", out=place / "e"))
    return place, testbed.evaluation_rows()[:1, :-1]


@pytest.mark.slow
def test_given_our_codes_transformers_has_our_logits_over_a_whole_row(embedded, monkeypatch):
    """It parts from ours where a sum that rounds otherwise in its last bit takes a number over the
    border of two codes, and nowhere else: its rounding of any input is ours, bit for bit."""
    import torch
    from compressed_tensors.quantization.lifecycle import forward

    from duquantpp_jax.interop import load_transformers

    place, tokens = embedded
    decoder, linear, state = load_any(place / "q")

    def recorded(site, x, weights, state):
        format = dict(linear.activation_formats)[site]
        seen = move_input(x, state.transform), linear.quantized(x, state, format).whole()
        return linear(site, x, weights, state)[0], seen

    wanted, seen = jax.jit(lambda tokens: decoder(tokens, recorded, state))(tokens)
    model, theirs = load_transformers(place / "e"), forward.forward_quantize
    where = {
        model.get_submodule(f"model.layers.{layer}.{name}"): (site, layer)
        for layer in range(decoder.config.num_hidden_layers)
        for site, names in SITE_WEIGHTS.items()
        for name in names
    }
    differ = []

    def ours(module, value, base_name, args):
        site, layer = where[module]
        moved, rounded = (np.asarray(part)[layer] for part in seen[site])
        scale = np.abs(moved).max(-1, keepdims=True)
        given = value.numpy()
        np.testing.assert_allclose(given / scale, moved / scale, atol=1e-5)
        found = theirs(module, value, base_name, args).numpy()
        format = dict(linear.activation_formats)[site]
        np.testing.assert_array_equal(found, format.fake_quantize(jnp.asarray(given)))
        differ.append((found != rounded).mean())
        return torch.from_numpy(np.array(rounded))

    with monkeypatch.context() as patch:
        patch.setattr(forward, "forward_quantize", ours)
        found = logits_in_transformers(model, tokens)
    assert max(differ) < 1e-4
    assert kl(wanted, found) < 1e-8


@pytest.mark.slow
def test_the_two_part_no_further_than_ours_does_after_last_bits_were_changed(embedded):
    from duquantpp_jax.interop import load_transformers
    from experiments.elsewhere import LastBits

    place, tokens = embedded
    decoder, linear, state = load_any(place / "q")
    wanted = logits_of(place / "q")(tokens)
    others = [LastBits(linear, seed) for seed in range(2)]
    run = jax.jit(lambda tokens, other: decoder(tokens, other, state)[0], static_argnames="other")
    noise = [kl(wanted, run(tokens, other=other)) for other in others]
    found = kl(wanted, logits_in_transformers(load_transformers(place / "e"), tokens))
    assert 1e-5 < found < 3 * max(noise)


def test_transformers_alone_refuses_what_it_would_compute_wrongly(served):  # noqa: F811
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match=r"inputs are moved: load by duquantpp_jax\.interop"):
        AutoModelForCausalLM.from_pretrained(served[1])
    with pytest.raises(ValueError, match="model type `duquantpp_jax`"):
        AutoModelForCausalLM.from_pretrained(served[0])
    from duquantpp_jax.interop import load_transformers

    with pytest.raises(ValueError, match="is no export in compressed-tensors"):
        load_transformers(served[0])


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "more"), RECIPES)
def test_exports_for_transformers_have_the_logits_of_the_model(
    recipe, more, tiny_directory, tmp_path
):
    from duquantpp_jax.interop import load_transformers

    model = quantized(tiny_directory, tmp_path / "q", recipe=recipe, serve="transformers", **more)
    export(ExportOptions(model, serve="transformers", out=tmp_path / "e"))
    found = logits_in_transformers(load_transformers(tmp_path / "e"), TOKENS)
    assert kl(logits_of(model)(TOKENS), found) < (1e-4 if "activation_formats" in more else 1e-6)
    if recipe == "identity":  # nothing is left out: transformers may load it alone, in bfloat16
        from transformers import AutoModelForCausalLM

        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "e")
        assert np.isfinite(logits_in_transformers(alone, TOKENS)).all()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["identity", "block_hadamard"])
def test_nvfp4_has_the_codes_of_the_library_and_the_logits_of_the_model(
    recipe, tiny_directory, tmp_path
):
    import torch
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import NVFP4
    from compressed_tensors.quantization.utils import calculate_qparams

    from duquantpp_jax.interop import load_transformers

    options = {"recipe": recipe, "serve": "transformers", "formats": ("nvfp4_calibrated",)}
    model = quantized(tiny_directory, tmp_path / "q", **options)
    export(ExportOptions(model, serve="transformers", check=True, out=tmp_path / "e"))
    loaded = load_transformers(tmp_path / "e")
    assert kl(logits_of(model)(TOKENS), logits_in_transformers(loaded, TOKENS)) < 1e-6
    tensors, wanted = tensors_of(tmp_path / "e"), dequantized(model)
    for name, w in wanted.items():
        np.testing.assert_array_equal(loaded.get_submodule(name).weight.detach().numpy(), w)
        assert np.frexp(tensors[f"{name}.input_global_scale"])[0].tolist() == [0.5]
    if recipe == "identity":
        floats, args = load(tiny_directory), NVFP4["weights"]
        for name in wanted:
            layer, inside = name.removeprefix("model.layers.").split(".", 1)
            weight = np.array(floats.layers[inside][...][int(layer)], np.float32)
            whole = torch.from_numpy(tensors[f"{name}.weight_global_scale"].copy())
            weight = torch.from_numpy(weight)
            blocks = weight.unflatten(-1, (-1, 16))
            scales, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, whole)
            state = {"weight": weight, "weight_scale": scales, "weight_global_scale": whole}
            scheme = QuantizationScheme(targets=["Linear"], weights=args)
            theirs = NVFP4PackedCompressor.compress(state, scheme)
            for part in ("weight_packed", "weight_scale"):
                found = theirs[part].view(torch.uint8).numpy()
                np.testing.assert_array_equal(tensors[f"{name}.{part}"].view(np.uint8), found)


def test_experts_are_decompressed_to_the_models_and_what_moves_them_is_refused(tmp_path):
    from duquantpp_jax.interop import load_transformers

    save(mixture("MixtralForCausalLM"), byte_tokenizer().to_str(), tmp_path / "m")
    options = {"recipe": "identity", "serve": "transformers"}
    model = quantized(tmp_path / "m", tmp_path / "q", **options)
    export(ExportOptions(model, serve="transformers", out=tmp_path / "e", check=True))
    found = logits_in_transformers(load_transformers(tmp_path / "e"), TOKENS)
    decoder, linear, state = load_any(model)
    # transformers leaves the inputs of experts in the type of the model, float32 here, not bf16
    formats = [(s, None if s in EXPERT_SITES else f) for s, f in linear.activation_formats]
    as_there = QuantizedLinear(tuple(formats))
    wanted = jax.jit(lambda tokens: decoder(tokens, as_there, state)[0])(TOKENS)
    assert kl(wanted, found) < 1e-6
    config = tmp_path / "e/config.json"
    fields = json.loads(config.read_text())
    groups = transform_groups({"hadamard": ["model.layers.0.block_sparse_moe.experts.0.w2"]})
    fields["quantization_config"]["transform_config"] = {"config_groups": groups}
    config.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="the inputs of its experts are moved"):
        load_transformers(tmp_path / "e")


@pytest.mark.slow
def test_a_dequantized_export_loads_as_a_float_model(served, tmp_path):  # noqa: F811
    from duquantpp_jax.interop import load_transformers

    exported(served[0], tmp_path / "d", "dequantized")
    found = logits_in_transformers(load_transformers(tmp_path / "d"), TOKENS)
    assert kl(logits_of(tmp_path / "d")(TOKENS), found) < 1e-6
