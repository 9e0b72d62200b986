"""A mixture of experts through the commands: quantize, inspect, generate, compare, export."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from duquantpp_jax import cli
from duquantpp_jax.checkpoints import Quantized, load, load_any, save
from duquantpp_jax.checkpoints.compressed_tensors import pack_layer, quantization_config
from duquantpp_jax.checkpoints.lazy import Checkpoint
from duquantpp_jax.commands.export import ExportOptions, export
from duquantpp_jax.commands.quantize import calibration_tokens, formats_by_site, quantize
from duquantpp_jax.commands.sizes import ALONE, quantized_line
from duquantpp_jax.lab.bench import Bench
from duquantpp_jax.models import Decoder
from duquantpp_jax.ptq.site import layer_of
from duquantpp_jax.ptq.walk import quantize_decoder
from duquantpp_jax.transforms.basic import Identity
from duquantpp_jax.transforms.block import BlockRotation
from duquantpp_jax.transforms.hadamard import hadamard
from tests.commands.conftest import options_of
from tests.commands.test_quantize import assert_one_line
from tests.conftest import byte_tokenizer, mixture

pytestmark = pytest.mark.slow
RUN = jax.jit(Decoder.__call__, static_argnames="linear")
TOKENS = jnp.asarray(np.arange(40).reshape(2, 20) * 7 % 257)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "mixtral"
    save(mixture("MixtralForCausalLM"), byte_tokenizer().to_str(), directory)
    return directory


@pytest.fixture(scope="module")
def options(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "model"
    return options_of(model, out, recipe="random_hadamard", rows=1)


@pytest.fixture(scope="module")
def report(options):
    return quantize(options)


def test_a_reloaded_mixture_gives_the_logits_of_the_one_in_memory(options, report):
    tokens, _ = calibration_tokens(options)
    plan = Quantized(options.out).job.plan(Checkpoint(options.model).config)
    float_model, linear, state = quantize_decoder(plan, load(options.model), tokens)
    decoder, again, written = load_any(options.out)
    wanted, _ = RUN(float_model, TOKENS, linear, state)
    np.testing.assert_array_equal(RUN(decoder, TOKENS, again, written)[0], wanted)


def test_the_report_names_every_expert_and_the_terminal_counts_those_that_saw_little(
    options, report
):
    rows = [row for row in report["linears"] if "tokens" in row]
    names = {row["linear"] for row in rows}
    assert len(names) == len(rows) == 2 * 4 * 3
    assert "model.layers.1.mlp.experts.3.down_proj" in names
    assert sum(row["tokens"] for row in rows) == 511 * 2 * 2 * 3
    assert "experts saw few tokens" not in quantized_line(report)
    few = [{**row, "pooled": ".0.mlp.experts.3." in row["linear"]} for row in rows]
    assert "1 of 8 experts saw few tokens" in quantized_line(report | {"linears": few})


def test_a_mixture_is_inspected_and_generates(options, report, tmp_path, tiny_text, capsys):
    words = ["inspect", "--model", options.out, "--text", tiny_text, "--tokens", 511]
    assert cli.main([str(word) for word in (*words, "--out", tmp_path)]) == 0
    sites = json.loads((tmp_path / "outliers.json").read_text())["sites"]
    assert all("moved" in site for site in sites)
    assert (tmp_path / "sqnr.png").is_file()
    words = ["generate", "--model", options.out, "--prompt", "abc", "--max-new-tokens", 3]
    assert cli.main([str(word) for word in words]) == 0


def test_weights_moved_back_are_near_the_float_ones(options, report, tmp_path):
    export(ExportOptions(options.out, "dequantized", out=tmp_path / "plain"))
    wanted, found = load(options.model).parameters(), load(tmp_path / "plain").parameters()
    for name in ("up_proj", "down_proj"):
        x, y = (p[f"model.layers.*.mlp.{name}"] for p in (wanted, found))
        off = jnp.sum((x - y) ** 2, axis=(2, 3)) / jnp.sum(x**2, axis=(2, 3))
        assert float(jnp.min(off)) > 0
        assert float(jnp.max(off)) < 0.05


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["export", "--out", "e"], "its input is moved online by a matrix for each block"),
        (["export", "--out", "e", "--format", "fp-quant"], "holds no experts, and this is a Mixt"),
        (["export", "--out", "e", "--format", "gpt-oss"], "has not the layout of gpt-oss"),
    ],
)
def test_a_layout_that_cannot_hold_it_is_refused(options, report, words, says, capsys):
    assert_one_line(cli.main([*words, "--model", str(options.out)]), capsys, says)


@pytest.fixture(scope="module")
def moved_alike(options, report):
    """That model, and sites by layer that nothing moves but a Hadamard matrix before down_proj."""
    opened = Quantized(options.out)
    alike = BlockRotation(jnp.broadcast_to(hadamard(32), (4, 1, 32, 32)))
    layers = []
    for number in range(2):
        parameters, sites = opened.layer(number)
        sites = {site: dataclasses.replace(s, transform=Identity()) for site, s in sites.items()}
        sites["mlp_out"] = dataclasses.replace(sites["mlp_out"], transform=alike)
        layers.append((number, parameters, sites))
    return opened, layers


def test_an_export_of_experts_is_read_back_as_the_state_that_was_written(moved_alike, tmp_path):
    opened, layers = moved_alike
    packed = [pack_layer(opened.config, *layer) for layer in layers]
    names = [f"model.layers.0.block_sparse_moe.experts.{e}.w2" for e in range(4)]
    assert packed[0].moved == {"hadamard": names}
    tensors = {name: array for layer in packed for name, array in layer.tensors.items()}
    save_file(tensors | opened.outside(), tmp_path / "model.safetensors")
    moved = {"hadamard": [name for layer in packed for name in layer.moved["hadamard"]]}
    fields = quantization_config(opened, moved, [])
    described = opened.fields | {"quantization_config": fields}
    (tmp_path / "config.json").write_text(json.dumps(described))
    (target,) = (
        t for g in fields["config_groups"].values() for t in g["targets"] if "experts" in t
    )
    assert re.match(target[3:], names[0])
    _, _, found = load_any(tmp_path)
    for number, _, sites in layers:
        for site, state in layer_of(found, number).items():
            wanted = jax.tree.leaves(sites[site].weights)
            for mine, theirs in zip(wanted, jax.tree.leaves(state.weights), strict=True):
                np.testing.assert_array_equal(mine, theirs)
        matrices = layer_of(found, number)["mlp_out"].transform.matrices
        np.testing.assert_array_equal(matrices, sites["mlp_out"].transform.matrices)


def test_experts_that_are_moved_apart_or_are_in_float_beside_others_are_refused(moved_alike):
    opened, ((*where, sites), _) = moved_alike
    signs = jnp.asarray([1, 1, 1, -1], jnp.float32).reshape(4, 1, 1, 1)
    turned = BlockRotation(sites["mlp_out"].transform.matrices * signs)
    apart = dataclasses.replace(sites["mlp_out"], transform=turned)
    with pytest.raises(ValueError, match="its experts move their inputs by matrices of their own"):
        pack_layer(opened.config, *where, sites | {"mlp_out": apart})
    with pytest.raises(ValueError, match=r"w2: vllm moves no input of an expert"):
        pack_layer(opened.config, *where, sites, "vllm")
    half = dataclasses.replace(sites["mlp_out"], weights=(jnp.zeros((4, 64, 96)),))
    with pytest.raises(ValueError, match="some linears of its experts are in float"):
        pack_layer(opened.config, *where, sites | {"mlp_out": half})


def test_serve_takes_what_the_program_does_with_the_inputs_of_experts(model, tmp_path):
    for serve, wanted in (("transformers", ("mxfp4:even", "bf16")), ("vllm", ("mxfp4:rceil",) * 2)):
        options = options_of(model, tmp_path, serve=serve)
        found = formats_by_site(options)["activation_formats"]
        assert (found["attention_in"], found["mlp_in"]) == wanted


def test_learning_for_a_mixture_is_refused(options, tmp_path, capsys):
    words = ["quantize", "--model", options.model, "--refine", 2, "--rows", 2, "--calibration-text"]
    words += [options.calibration_text, "--out", tmp_path / "q"]
    code = cli.main([str(word) for word in words])
    assert_one_line(code, capsys, "--refine is not for the experts")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--refine", "2"], "--refine is not for the experts"),
        (["--rounding", "asymmetric"], "is not for experts"),
        (["--rotate-stream", "hadamard"], "its routers read it too"),
    ],
)
def test_compare_refuses_what_is_not_for_experts_before_it_measures(
    model, tiny_text, words, says, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Bench, "run", None)
    texts = ["--text", tiny_text, "--calibration-text", tiny_text]
    arguments = ["compare", "--model", model, *texts, *words, "--out", tmp_path / "c"]
    assert_one_line(cli.main([str(word) for word in arguments]), capsys, says)


def test_learning_for_a_mixture_leaves_nothing_behind(model, tiny_text, tmp_path, capsys):
    words = ["learn", "--model", model, "--text", tiny_text, "--rows", 16, "--out", tmp_path / "l"]
    assert_one_line(cli.main([str(word) for word in words]), capsys, "learning for a Mixtral")
    assert not (tmp_path / "l").exists()
    assert not any(tmp_path.iterdir())


def test_the_line_under_the_table_says_that_experts_are_not_folded_into(report):
    fused = report | {"job": report["job"] | {"fuse": True}}
    assert ALONE in quantized_line(fused)
    assert ALONE not in quantized_line(report)
    plain = [row for row in report["linears"] if "pooled" not in row]
    assert ALONE not in quantized_line(fused | {"linears": plain})
