"""Packed MXFP4 of other programs: every layout decodes to exact numbers, and is used as stored."""

import hashlib
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from duquantpp_jax.checkpoints import load_any, load_config
from duquantpp_jax.checkpoints.experts import linears, tensors_of
from duquantpp_jax.checkpoints.lazy import Checkpoint
from duquantpp_jax.checkpoints.mxfp4 import PACKED
from duquantpp_jax.checkpoints.writer import layer_tensors
from duquantpp_jax.models import SITE_WEIGHTS, Decoder
from duquantpp_jax.ptq.site import QuantizedSite
from duquantpp_jax.ptq.walk import QuantizedLayer
from duquantpp_jax.recipes import find_format
from duquantpp_jax.transforms.basic import Identity
from tests.conftest import byte_tokenizer, mixture, tiny_decoder
from tests.decompress import VALUES

RUN = jax.jit(Decoder.__call__, static_argnames="linear")
WEIGHTS = {"num_bits": 4, "type": "float", "group_size": 32, "strategy": "group"}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": PACKED,
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}
QUARK = {
    "quant_method": "quark",
    "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 32, "scale_format": "e8m0"}},
}
FP8 = {"quant_method": "fp8"}
E8M0 = ml_dtypes.float8_e8m0fnu


def parts(module, codes, scales, method):
    """The two tensors of a weight."""
    if method == "compressed-tensors":
        return {f"{module}.weight_packed": codes, f"{module}.weight_scale": scales}
    if method == "quark":
        return {f"{module}.weight": codes, f"{module}.weight_scale": scales}
    return {f"{module}.weight": codes.view(np.int8), f"{module}.scale": scales.view(E8M0)}


def written(place, model, packed, packing, **fields):
    """A directory of a model with `packed`, {parameter: (codes, scales)}, in place of floats."""
    floats, made, modules = {}, {}, linears(model.config)
    for name, array in model.parameters().items():
        for number in range(2) if "*" in name else [None]:
            own, inside = name.replace("*", str(number)), name.rpartition("*.")[2]
            if inside not in packed:
                floats[f"{own}.weight"] = np.asarray(array if number is None else array[number])
                continue
            codes, scales = (a if a.ndim == 3 else a[None] for a in packed[inside])
            for module, *each in zip(modules[own], codes, scales, strict=True):
                made |= parts(module, *each, packing["quant_method"])
    place.mkdir()
    save_file(tensors_of(model.config, floats) | made, place / "model.safetensors")
    described = {**model.config.to_dict(), "quantization_config": packing, **fields}
    (place / "config.json").write_text(json.dumps(described))
    (place / "tokenizer.json").write_text(byte_tokenizer().to_str())
    return place


def drawn(shape):
    """Codes in which every byte occurs, and scales, every one that gives finite numbers."""
    *outputs, width = shape
    codes = np.arange(np.prod(outputs) * width // 2, dtype=np.int64) * 7 % 256
    scales = np.arange(np.prod(outputs) * width // 32) % 253
    return (
        codes.astype(np.uint8).reshape(*outputs, width // 2),
        scales.astype(np.uint8).reshape(*outputs, width // 32),
    )


def exact(codes, scales):
    """By a table and ldexp of Python."""
    table = [float(value) for value in VALUES] + [-float(value) for value in VALUES]
    codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    powers = np.repeat(scales, 32, axis=-1).astype(int) - 127
    numbers = [
        math.ldexp(table[code], int(power))
        for code, power in zip(codes.flat, powers.flat, strict=True)
    ]
    return np.asarray(numbers, np.float32).reshape(codes.shape)


@pytest.mark.parametrize("packing", [COMPRESSED, QUARK, FP8], ids=lambda p: p["quant_method"])
def test_every_byte_under_every_finite_scale_decodes_to_its_number(packing, tmp_path):
    codes, scales = drawn((96, 64))
    packed = {"mlp.up_proj": (codes, scales), "mlp.gate_proj": (codes, scales[::-1].copy())}
    place = written(tmp_path / "m", tiny_decoder(), packed, packing, expert_dtype="fp4")
    checkpoint = Checkpoint(place)
    layer, (floats, stored) = checkpoint.layer(1), checkpoint.layer_as_stored(1)
    assert set(stored) == set(packed)
    assert "mlp.down_proj" in floats
    for name, (codes, scales) in packed.items():
        np.testing.assert_array_equal(layer[name], exact(codes, scales))
        np.testing.assert_array_equal(stored[name].scale_bytes(), scales)


@pytest.mark.parametrize("packing", [COMPRESSED, FP8], ids=lambda p: p["quant_method"])
def test_packed_experts_of_many_tensors_are_the_stack_of_a_layer(packing, tmp_path):
    packed = {"mlp.gate_proj": drawn((4, 96, 64)), "mlp.down_proj": drawn((4, 64, 96))}
    packed["mlp.down_proj"][1][:] = np.arange(4)[:, None, None] + 120
    model = mixture("MixtralForCausalLM")
    place = written(tmp_path / "m", model, packed, packing, expert_dtype="fp4")
    layer = Checkpoint(place).layer(0)
    for name, (codes, scales) in packed.items():
        np.testing.assert_array_equal(layer[name], exact(codes, scales))
    wanted = np.asarray(model.layers["mlp.up_proj"][...][0])
    np.testing.assert_array_equal(layer["mlp.up_proj"], wanted)


def changed(packing, path, value):
    """A copy with another value at a path of keys."""
    copy = json.loads(json.dumps(packing))
    *inner, last = path.split(".")
    inside = copy
    for key in inner:
        inside = inside.setdefault(key, {})
    inside[last] = value
    return copy


@pytest.mark.parametrize(
    ("packing", "path", "value", "says"),
    [
        (COMPRESSED, "format", "nvfp4-pack-quantized", "it is mxfp4-pack-quantized"),
        (COMPRESSED, "config_groups.group_0.format", "pack-quantized", "format 'pack-quantized'"),
        (COMPRESSED, "config_groups.group_0.weights.num_bits", 8, "one of MXFP4 weights"),
        (COMPRESSED, "config_groups.group_0.output_activations", WEIGHTS, "output_activations"),
        (COMPRESSED, "config_groups", [], "an object of groups"),
        (COMPRESSED, "quantization_status", "frozen", "it is compressed"),
        (COMPRESSED, "kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme"),
        (COMPRESSED, "sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config"),
        (QUARK, "global_quant_config.weight.dtype", "fp8_e4m3", "of MXFP4 weights"),
        (QUARK, "global_quant_config", None, "of MXFP4 weights"),
        (QUARK, "layer_quant_config", {"*o_proj": {}}, "layer_quant_config"),
        (QUARK, "export.weight_format", "fake_quantized", "it is real_quantized"),
        (QUARK, "algo_config", [{"name": "awq"}, {"name": "rotation"}], "algo_config 'rotation'"),
        (QUARK, "algo_config", {"name": ["awq"]}, "algo_config"),
        (FP8, "fmt", "e4m3", "already quantized"),
        (COMPRESSED, "quant_method", "gptq", "already quantized"),
    ],
)
def test_another_packing_is_refused_by_name(packing, path, value, says, tmp_path):
    fields = {**tiny_decoder().config.to_dict(), "quantization_config": packing}
    place = tmp_path / "config.json"
    if packing is not FP8:
        place.write_text(json.dumps(fields))
        load_config(tmp_path)
    place.write_text(json.dumps({**fields, "quantization_config": changed(packing, path, value)}))
    with pytest.raises(ValueError, match=says) as refusal:
        load_config(tmp_path)
    assert "\n" not in str(refusal.value)


MODELS = Path(__file__).parents[1] / "goldens" / "packed_models.npz"


def even(w, sign_of_zero):
    """Codes and scales of a weight under EVEN; Quark leaves out the sign of what becomes 0."""
    array = find_format("mxfp4:even").quantize(jnp.asarray(w, jnp.float32))
    codes = np.asarray(array.codes())
    codes = codes if sign_of_zero else np.where(codes == 8, np.uint8(0), codes)
    return codes[:, 0::2] | codes[:, 1::2] << 4, np.asarray(array.scale_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llm-compressor", "llm-compressor, turned", "quark"])
def test_gutenberg_27m_as_its_tool_wrote_it_gives_the_logits_of_the_tool(case, data, tmp_path):
    """Hashes show that the tensors that are made here are those of the tool."""
    with np.load(MODELS) as file:
        golden = dict(file)
    source, floats, made = data / "models" / "gutenberg-27m", {}, {}
    for path in source.glob("*.safetensors"):
        floats |= load_file(path)
    signs = np.array([[1.0]])
    for _ in range(5):
        signs = np.block([[signs, signs], [signs, -signs]])
    about = json.loads(str(golden[f"{case}: tensors"]))
    for name, (_, shape, _) in about.items():
        module, _, end = name.rpartition(".")
        if name.endswith("_input.weight"):
            made[name] = signs
        elif name in floats and floats[name].shape == tuple(shape):
            made[name] = floats[name]
        elif end != "weight_scale":
            w = floats[f"{module}.weight"].astype(np.float64)
            if "turned" in case:  # as the tool does, in float64, and rounded to bfloat16
                w = (w.reshape(-1, 32) @ signs / np.sqrt(32.0)).reshape(w.shape)
            made[name], made[f"{module}.weight_scale"] = even(
                w.astype(ml_dtypes.bfloat16), sign_of_zero=case != "quark"
            )
    assert {n: hashlib.sha256(a.tobytes()).hexdigest() for n, a in made.items()} == {
        name: digest for name, (*_, digest) in about.items()
    }
    save_file(made, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(str(golden[f"{case}: config"]))
    tokens = jnp.asarray(np.arange(24)[None] * 167 % 4096)
    model, linear, state = load_any(tmp_path)
    found, _ = RUN(model, tokens, linear, state)
    wanted = golden[f"{case}: logits"]
    error = np.abs(np.asarray(found)[..., ::64] - wanted).max() / np.abs(wanted).max()
    assert error < 1e-5


def test_packed_weights_are_kept_only_where_nothing_has_moved_them(tmp_path):
    codes, scales = drawn((96, 64))
    scales = np.full_like(scales, 120)
    packed = {"mlp.up_proj": (codes, scales), "mlp.gate_proj": (codes, scales)}
    checkpoint = Checkpoint(written(tmp_path / "m", tiny_decoder(), packed, QUARK))
    _, stored = checkpoint.layer_as_stored(0)
    parameters = {name: jnp.asarray(array) for name, array in checkpoint.layer(0).items()}
    parameters["mlp.up_proj"] = parameters["mlp.up_proj"] * 2  # as by folding
    sites = {
        site: QuantizedSite(Identity(), tuple(parameters[name] for name in names))
        for site, names in SITE_WEIGHTS.items()
    }
    tensors, about = layer_tensors(0, QuantizedLayer(sites, parameters, {}, {}), stored)
    assert set(about["stored"]) == {"mlp.gate_proj"}
    found = tensors["model.layers.0.mlp.up_proj.weight"]
    np.testing.assert_array_equal(found, parameters["mlp.up_proj"])
