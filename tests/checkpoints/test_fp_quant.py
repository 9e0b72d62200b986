"""An export for QuTLASS holds what that library computes of it, and refuses the rest.

The library's kernels run on GPUs of compute capability 10 and 12 alone: its arithmetic is written
here in NumPy, from its source (QuTLASS, fused_quantize_mx and its own test; fp_quant 0.3.2).
"""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from duquantpp_jax import cli
from duquantpp_jax.checkpoints import Quantized
from duquantpp_jax.checkpoints.fp_quant import pack_layer, packed
from duquantpp_jax.checkpoints.reread import read_again
from duquantpp_jax.commands.export import export
from duquantpp_jax.commands.options.export import ExportOptions
from duquantpp_jax.formats import MXFP4, FPQuant, Quest
from duquantpp_jax.transforms.block import BlockRotation
from tests.checkpoints.test_layouts import quantized
from tests.commands.test_quantize import assert_one_line
from tests.conftest import TEXT
from tests.decompress import VALUES, tensors_of


@pytest.fixture(scope="module")
def served(tiny_directory, tmp_path_factory):
    """A model that is quantized for QuTLASS, and its export."""
    place = tmp_path_factory.mktemp("qutlass")
    float_mlp = ("*.0.mlp.up_proj", "*.0.mlp.gate_proj")
    more = {"recipe": "random_hadamard", "serve": "qutlass", "exclude": float_mlp}
    model = quantized(tiny_directory, place / "q", **more)
    notes = export(ExportOptions(model, serve="qutlass", out=place / "e", check=True))
    assert notes[-1].startswith("Read again: 12 linears hold the bits of the quantized model")
    return model, place / "e"


def test_serve_takes_the_librarys_rule_for_activations_and_the_shared_form(served):
    job = Quantized(served[0]).job
    assert (job.recipe, job.fuse) == ("random_hadamard:shared", True)
    assert {*job.weight_formats.values()} == {"mxfp4:mse"}
    assert {*job.activation_formats.values()} == {"fpquant"}


def test_every_linear_has_the_tensors_of_the_librarys_module(served):
    tensors, fields = tensors_of(served[1]), json.loads((served[1] / "config.json").read_text())
    assert fields["torch_dtype"] == "bfloat16"
    found = fields["quantization_config"]
    fused = "model.layers.0.mlp.gate_up_proj"  # as vLLM calls the two
    floats = [f"model.layers.0.mlp.{name}_proj" for name in ("up", "gate")]
    assert found["modules_to_not_convert"] == ["lm_head", *floats, fused]
    assert (found["forward_dtype"], found["forward_method"]) == ("mxfp4", "abs_max")
    n, k = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64)}, "model.layers.1.self_attn."
    for name, (rows, width) in n.items():
        wanted = {
            "qweight": ("uint8", (rows, width // 2)),
            "scales": ("uint8", (rows, width // 32)),
            "forward_hadamard_matrix": ("bfloat16", (32, 32)),
            "weight_global_scale": ("float32", (1,)),
            "act_global_scale": ("float32", (1,)),
        }
        own = {t: a for t, a in tensors.items() if t.startswith(f"{k}{name}_proj.")}
        assert {t.rpartition(".")[2]: (str(a.dtype), a.shape) for t, a in own.items()} == wanted
    assert "needs fp_quant, QuTLASS" in (served[1] / "README.md").read_text()


def rounded(moved, method):
    """Codes and scale bytes as the kernels make them: a power of two below a number of each block,
    and E2M1 of x (times 3 for abs_max) to the nearest, ties to an even code."""
    blocks = moved.reshape(*moved.shape[:-1], -1, 32).astype(np.float32)
    if method == "abs_max":
        size, unit = np.abs(blocks).max(-1) + np.float32(1e-8), 3
    else:
        mean, square = blocks.mean(-1), (blocks * blocks).mean(-1)
        size, unit = np.sqrt(square - mean * mean) * np.float32(2.92247856 / 6) + 1e-8, 1
    byte = np.float32(size).view(np.uint32) >> 23
    x = blocks / np.ldexp(np.float32(1), byte.astype(np.int32) - 127)[..., None] * unit
    middles = (VALUES[1:8] + VALUES[:7]) / 2
    above = [abs(x) >= m if code % 2 else abs(x) > m for code, m in enumerate(middles)]
    codes = np.sum(above, axis=0) + 8 * np.signbit(x)
    return codes.reshape(moved.shape), byte.astype(np.uint8), unit


def decoded(codes, byte):
    values = np.where(codes & 8, -1, 1) * VALUES[codes & 7]
    return values * np.ldexp(1.0, byte.astype(np.int32) - 127).repeat(32, axis=-1)


@pytest.mark.parametrize(
    ("format", "weights"), [(FPQuant(), MXFP4()), (FPQuant(), FPQuant()), (Quest(), Quest())]
)
def test_what_the_kernels_compute_of_the_tensors_is_what_is_simulated(format, weights):
    names = {FPQuant: "fpquant", Quest: "quest", MXFP4: "mxfp4:floor"}
    random = np.random.default_rng(0)
    x = random.standard_t(3, (64, 64)).astype(ml_dtypes.bfloat16).astype(np.float32)
    matrix = np.linalg.qr(random.standard_normal((32, 32)))[0].astype(ml_dtypes.bfloat16)
    weight = weights.quantize(jnp.asarray(random.standard_normal((64, 64)), jnp.float32))
    kinds = names[type(weights)], names[type(format)]
    stored = packed(weight, matrix.astype(np.float32), *kinds)
    np.testing.assert_array_equal(stored["forward_hadamard_matrix"], matrix)
    blocks = x.reshape(64, 2, 32) @ stored["forward_hadamard_matrix"].astype(np.float32)
    moved = blocks.reshape(64, 64)
    codes, byte, unit = rounded(moved, {"fpquant": "abs_max"}.get(kinds[1], "quest"))
    assert stored["act_global_scale"] == unit
    q = stored["qweight"]
    w = decoded(np.stack([q & 15, q >> 4], axis=-1).reshape(64, 64), stored["scales"])
    alpha = 1 / (stored["weight_global_scale"] * stored["act_global_scale"])
    simulated = format.quantize(jnp.asarray(moved))
    np.testing.assert_array_equal(codes, simulated.codes())
    wanted = np.float64(simulated.dequantize()) @ np.float64(weight.dequantize()).T
    np.testing.assert_allclose(decoded(codes, byte) @ w.T * alpha, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--activation-formats", "even"), "qutlass rounds activations to fpquant"),
        (("--activation-formats", "bf16"), "qutlass rounds activations to fpquant"),
        (("--activation-formats", "mlp_in=quest"), "has one format for all activations"),
        (("--weight-formats", "nvfp4"), "takes weights in mxfp4 or fpquant or quest, not in nvfp4"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(more, says, tiny_directory, tmp_path, capsys):
    words = ["--model", str(tiny_directory), "--rows", "4", "--calibration-text", str(TEXT)]
    words += ["--out", str(tmp_path / "q"), *more, "--serve", "qutlass"]
    assert_one_line(cli.main(["quantize", *words]), capsys, says)
    assert not (tmp_path / "q").exists()


def test_a_matrix_for_each_block_and_a_linear_in_float_beside_others_are_refused(served):
    model = Quantized(served[0])
    parameters, sites = model.layer(1)
    where = model.job, model.config, 1, parameters
    turned = BlockRotation(jnp.stack([jnp.eye(32), -jnp.eye(32)]))
    per_block = dataclasses.replace(sites["attention_in"], transform=turned)
    with pytest.raises(ValueError, match="one for all blocks of a site: quantize with :shared"):
        pack_layer(*where, sites | {"attention_in": per_block})
    floats = (jnp.zeros((96, 64)), sites["mlp_in"].weights[1])
    half = dataclasses.replace(sites["mlp_in"], weights=floats)
    with pytest.raises(ValueError, match=r"mlp\.up_proj is in float beside quantized linears"):
        pack_layer(*where, sites | {"mlp_in": half})


@pytest.mark.parametrize(
    "part", ["q_proj.qweight", "o_proj.scales", "q_proj.forward_hadamard_matrix"]
)
def test_a_changed_byte_is_found(served, part, tmp_path):
    model, out = served
    spoilt = tmp_path / "e"
    shutil.copytree(out, spoilt)
    path = spoilt / "model-00001-of-00003.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(part))
    tensors[name].flat[0] += 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"{name} is not what the quantized model has"):
        read_again(spoilt, model)
