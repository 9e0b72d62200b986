"""Packed experts of a gpt-oss: decoded bit for bit, used as stored, quantized again, written."""

import dataclasses
import hashlib
import importlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from duquantpp_jax import cli
from duquantpp_jax.checkpoints import Quantized, gpt_oss, load, load_any
from duquantpp_jax.checkpoints.directory import layer_file
from duquantpp_jax.checkpoints.experts import tensors_of
from duquantpp_jax.checkpoints.lazy import Checkpoint
from duquantpp_jax.commands.export import ExportOptions, export
from duquantpp_jax.commands.quantize import QuantizeOptions, quantize
from duquantpp_jax.models import Decoder
from duquantpp_jax.ptq.packed_float import PackedFloat
from tests.conftest import byte_tokenizer, mixture
from tests.goldens import families
from tests.models.test_families import directory_of, golden

RUN = jax.jit(Decoder.__call__, static_argnames="linear")
EXPERTS = ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")
TOKENS = jnp.asarray(np.arange(40).reshape(2, 20) * 7 % 257)


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """A tiny gpt-oss whose experts are random codes, under scales that FLOOR would not choose."""
    place, model = tmp_path_factory.mktemp("models") / "packed", mixture("GptOssForCausalLM")
    random, tensors = np.random.default_rng(0), {}
    for name, array in model.parameters().items():
        own = name if name.endswith((".bias", "sinks")) else f"{name}.weight"
        for number in range(2) if "*" in name else [None]:
            at = own.replace("*", str(number))
            if name.endswith(EXPERTS):
                scales = (*array.shape[1:-1], array.shape[-1] // 32)
                tensors[f"{at}_blocks"] = random.integers(0, 256, (*scales, 16), np.uint8)
                tensors[f"{at}_scales"] = random.integers(122, 125, scales, np.uint8)
            else:
                tensors[at] = np.asarray(array if number is None else array[number])
    place.mkdir()
    tensors = tensors_of(model.config, tensors)
    save_file({n: np.ascontiguousarray(a) for n, a in tensors.items()}, place / "model.safetensors")
    fields = {**model.config.to_dict(), "quantization_config": {"quant_method": "mxfp4"}}
    (place / "config.json").write_text(json.dumps(fields))
    (place / "tokenizer.json").write_text(byte_tokenizer().to_str())
    return place


def tensors(directory):
    files = sorted(directory.glob("*.safetensors"))
    return {name: array for file in files for name, array in load_file(file).items()}


def rewritten(packed, place, change):
    """A copy with other tensors."""
    place.mkdir()
    found = tensors(packed)
    change(found)
    save_file(found, place / "model.safetensors")
    (place / "config.json").write_bytes((packed / "config.json").read_bytes())
    return place


BLOCKS = "model.layers.0.mlp.experts.gate_up_proj_blocks"
SCALES = "model.layers.0.mlp.experts.gate_up_proj_scales"


def test_every_byte_under_every_finite_scale_decodes_to_its_number(packed, tmp_path):
    def change(found):
        blocks, scales = found[BLOCKS], found[SCALES]
        blocks.reshape(-1)[:] = np.arange(blocks.size) % 256
        scales.reshape(-1)[:] = np.arange(scales.size) % 253

    place = rewritten(packed, tmp_path / "all", change)
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table += [-x for x in table]
    found, layer = tensors(place), Checkpoint(place).layer(0)
    for first, name in enumerate(("mlp.gate_proj", "mlp.up_proj")):
        blocks, scales = found[BLOCKS][:, first::2], found[SCALES][:, first::2]
        assert len(np.unique(blocks)) == 256 or len(np.unique(found[BLOCKS])) == 256
        for place_of in np.ndindex(scales.shape):
            pairs = [(byte & 15, byte >> 4) for byte in blocks[place_of].tolist()]
            wanted = [math.ldexp(table[c], int(scales[place_of]) - 127) for p in pairs for c in p]
            expert, row, block = place_of
            got = layer[name][expert, row, 32 * block : 32 * block + 32]
            np.testing.assert_array_equal(got, np.asarray(wanted, np.float32))


def test_what_transformers_decodes_is_the_same_to_the_bit(tmp_path):
    for name in ("gpt-oss, mxfp4", "gpt-oss", "mixtral"):
        model = load(directory_of(name, families.CASES[name], tmp_path / name.replace(" ", "")))
        matrix = np.asarray(model.layers["mlp.down_proj"][...][0], np.float32)
        if "gpt" in name:
            matrix = matrix.swapaxes(1, 2)
        digest = hashlib.sha256(np.ascontiguousarray(matrix).tobytes()).hexdigest()
        assert digest == str(golden()[f"{name}: down_proj"])


@pytest.mark.slow
def test_packed_weights_stay_packed_and_compute_as_decoded_ones(packed):
    model, linear, state = load_any(packed)
    assert all(w.element.bits == 4 for w in state["mlp_in"].weights)
    assert model.layers["mlp.up_proj"][...].size == 0
    decoded = load(packed)
    logits, _ = RUN(model, TOKENS, linear, state)
    np.testing.assert_allclose(logits, RUN(decoded, TOKENS)[0], rtol=1e-5, atol=1e-5)
    _, asked, _ = load_any(packed, "mxfp4")
    assert np.abs(RUN(model, TOKENS, asked, state)[0] - logits).max() > 1e-2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t[SCALES].reshape(-1).__setitem__(5, 255), r"has NaN in \d+ of 24576"),
        (lambda t: t[SCALES].reshape(-1).__setitem__(slice(9), 254), r"has Inf in \d+ of 24576"),
        (lambda t: t.pop(SCALES), "gate_up_proj_scales is missing"),
        (lambda t: t.update({BLOCKS: t[BLOCKS][:, :-1]}), r"asks for \[4, 192, 2, 16\]"),
        (lambda t: t.update({BLOCKS: t[BLOCKS].astype(np.int8)}), "has dtype I8: it must be"),
    ],
)
def test_broken_blocks_and_scales_are_refused(packed, tmp_path, change, says):
    place = rewritten(packed, tmp_path / "broken", change)
    for read in (load, load_any):
        with pytest.raises(ValueError, match=says):
            read(place)


@pytest.fixture
def options(tiny_text):
    """The options that quantize the experts of a model again."""
    given = {"rows": 1, "include": ("*.mlp.*",), "requantize": True, "calibration_text": tiny_text}
    return lambda model, out, **more: QuantizeOptions(model=model, out=out, **given | more)


def test_packed_weights_are_rounded_again_only_on_demand(packed, options, tmp_path, tiny_directory):
    with pytest.raises(ValueError, match="give --requantize"):
        quantize(options(packed, tmp_path / "q", requantize=False))
    with pytest.raises(ValueError, match="--requantize is for packed weights"):
        quantize(options(tiny_directory, tmp_path / "q"))
    with pytest.raises(ValueError, match="--activation-format is for packed weights"):
        load_any(tiny_directory, "mxfp4")


@pytest.mark.slow
def test_a_moved_model_is_exported_in_its_own_layout_and_read_back(packed, options, tmp_path):
    report = quantize(options(packed, tmp_path / "q", recipe="block_hadamard"))
    assert report["requantized"]
    notes = export(ExportOptions(tmp_path / "q", "gpt-oss", out=tmp_path / "e"))
    assert "4 linears" in " ".join(notes)
    before, after = tensors(packed), tensors(tmp_path / "e")
    assert {n: a.shape for n, a in before.items()} == {n: a.shape for n, a in after.items()}
    assert all(before[n].dtype == after[n].dtype for n in before)
    assert not np.array_equal(before[BLOCKS], after[BLOCKS])
    kept = [name for name in before if not name.endswith(("_blocks", "_scales"))]
    assert all(np.array_equal(before[name], after[name]) for name in kept)
    model, linear, state = load_any(tmp_path / "q")
    again, asked, stored = load_any(tmp_path / "e", "mxfp4:floor")
    wanted, _ = RUN(model, TOKENS, linear, state)
    np.testing.assert_allclose(RUN(again, TOKENS, asked, stored)[0], wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="give the model that they were made from"):
        load(tmp_path / "e")


@pytest.mark.slow
def test_experts_that_are_rounded_but_not_moved_need_no_transform(
    packed, options, tmp_path, monkeypatch
):
    quantize(options(packed, tmp_path / "q", recipe="rtn"))
    notes = export(ExportOptions(tmp_path / "q", "gpt-oss", out=tmp_path / "e"))
    assert "online" not in " ".join(notes)
    fields = json.loads((tmp_path / "e" / "config.json").read_text())["quantization_config"]
    assert "transform_config" not in fields
    # Under FLOOR many scales are others, and all numbers are the same.
    wanted, found = load(packed).parameters(), load(tmp_path / "e").parameters()
    for name in EXPERTS:
        np.testing.assert_array_equal(*(p[f"model.layers.*.{name}"] for p in (wanted, found)))
    # A stack in float beside one that is packed is no layout that others read.
    own = load_file(tmp_path / "q" / layer_file(0))
    del own["model.layers.0.mlp.down_proj.codes"]
    monkeypatch.setattr(gpt_oss, "load_file", lambda _: own)
    with pytest.raises(ValueError, match="down_proj is in float"):
        export(ExportOptions(tmp_path / "q", "gpt-oss", out=tmp_path / "again"))
    # Nor does another program clip an input, or add to the exponents of its scales.
    layer, part = Quantized.layer, "clip"

    def learned(self, number):
        rest, sites = layer(self, number)
        given = jnp.ones((4, 2), jnp.float32 if part == "clip" else jnp.int32)
        return rest, sites | {"mlp_in": dataclasses.replace(sites["mlp_in"], **{part: given})}

    monkeypatch.undo()
    monkeypatch.setattr(Quantized, "layer", learned)
    for part in ("clip", "scale_offset"):
        with pytest.raises(
            ValueError, match=rf"0\.mlp_in: .*{part} by block, which no reader of the"
        ):
            export(ExportOptions(tmp_path / "q", "gpt-oss", out=tmp_path / "again"))


@pytest.mark.slow
def test_what_is_left_alone_keeps_its_bits(packed, options, tmp_path):
    chosen = ("*.layers.1.mlp.down_proj",)
    quantize(options(packed, tmp_path / "q", include=chosen, recipe="block_hadamard"))
    quantized = Quantized(tmp_path / "q")
    for weight in quantized.layer(0)[1]["mlp_in"].weights:  # in float, and packed until it is used
        assert isinstance(weight, PackedFloat)
        assert all(leaf.dtype.itemsize == 1 for leaf in jax.tree.leaves(weight))
    model, linear, state = load_any(tmp_path / "q")
    decoded = load(packed).parameters()["model.layers.*.mlp.up_proj"][0]
    np.testing.assert_array_equal(state[0]["mlp_in"].weights[0].astype(jnp.float32)[0], decoded)
    assert np.isfinite(RUN(model, TOKENS, linear, state)[0]).all()
    export(ExportOptions(tmp_path / "q", "gpt-oss", out=tmp_path / "e"))
    before, after = tensors(packed), tensors(tmp_path / "e")
    moved = "model.layers.1.mlp.experts.down_proj"
    for name in before:
        same = np.array_equal(before[name], after[name])
        assert same != (name.startswith(moved) and not name.endswith("bias")), name
    scheme = json.loads((tmp_path / "e" / "config.json").read_text())["quantization_config"]
    (group,) = scheme["transform_config"]["config_groups"].values()
    assert group["apply"][0]["targets"] == [moved]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"recipe": "wush"}, "by a matrix for each block"),
        ({"include": ("*",), "recipe": "rtn"}, "holds self_attn.q_proj in float"),
        (
            {"include": ("*.up_proj",), "recipe": "rtn"},
            "has mlp.up_proj and mlp.gate_proj in one tensor",
        ),
        ({"formats": ("mxfp8",), "recipe": "rtn"}, "holds MXFP4 weights"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(packed, options, tmp_path, more, says):
    quantize(options(packed, tmp_path / "q", **more))
    with pytest.raises(ValueError, match=says):
        export(ExportOptions(tmp_path / "q", "gpt-oss", out=tmp_path / "e"))


@pytest.mark.slow
def test_evaluate_says_in_its_first_line_how_weights_are_used(packed, tiny_text, capsys):
    words = ["evaluate", "--model", packed, "--text", tiny_text, "--tokens", 511]
    assert cli.main([str(word) for word in words]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "packed weights as they are stored (mxfp4), their inputs not quantized" in first


def test_commands_that_decode_packed_weights_say_so_first(packed, tiny_text, capsys, monkeypatch):
    for name, command in {"compare": "compare", "learn": "learn_fits"}.items():
        module = importlib.import_module(f"duquantpp_jax.commands.{name}")

        def refuse(*_):
            raise ValueError("stop")

        monkeypatch.setattr(module, command, refuse)
        words = [name, "--model", packed, "--text", tiny_text]
        words += ["--calibration-text", tiny_text] if name == "compare" else []
        assert cli.main([str(word) for word in words]) != 0
        assert "packed weights are decoded, which is exact" in capsys.readouterr().err
