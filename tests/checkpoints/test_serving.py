"""What is quantized for a serving program is what that program computes, or it is refused."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from duquantpp_jax import cli
from duquantpp_jax.checkpoints import Quantized, load_any, readers
from duquantpp_jax.checkpoints.compressed_tensors import pack_layer
from duquantpp_jax.checkpoints.reread import read_again
from duquantpp_jax.checkpoints.shards import inventory
from duquantpp_jax.formats import NVFP4
from duquantpp_jax.models import SITES
from duquantpp_jax.models.parameters import linear_names
from duquantpp_jax.ptq.site import quantize_input
from tests.checkpoints.test_layouts import exported, quantized
from tests.commands.conftest import contents
from tests.commands.test_quantize import assert_one_line
from tests.conftest import TEXT
from tests.decompress import tensors_of


@pytest.fixture(scope="module")
def served(tiny_directory, tmp_path_factory):
    """A model that is quantized for transformers by a fitted recipe, and its export."""
    place = tmp_path_factory.mktemp("served")
    model = quantized(tiny_directory, place / "q", recipe="duquantpp", serve="transformers")
    exported(model, place / "e")
    return model, place / "e"


def test_serve_takes_the_readers_rule_the_shared_form_and_folds_smoothing(served):
    job = Quantized(served[0]).job
    assert (job.recipe, job.fuse) == ("duquantpp:shared", True)
    assert {*job.weight_formats.values()} == {"mxfp4:mse"}
    assert {*job.activation_formats.values()} == {"mxfp4:even"}


def test_a_packed_export_has_the_same_bytes_again(served, tmp_path):
    exported(served[0], tmp_path / "again")
    assert contents(tmp_path / "again") == contents(served[1])


def test_one_matrix_for_each_site_stands_in_the_export_under_the_name_that_config_json_says(served):
    model, out = served
    tensors = tensors_of(out)
    fields = json.loads((out / "config.json").read_text())["quantization_config"]
    groups = fields["transform_config"]["config_groups"]
    for name, group in groups.items():
        _, number, site = name.split("_", 2)
        assert (group["type"], group["head_dim"]) == ("random-hadamard", 32)
        rotation = Quantized(model).layer(int(number))[1][site].transform
        wanted = np.asarray(rotation.matrices[0]) * np.float32(32**0.5)
        (apply,) = group["apply"]
        assert apply["targets"] == list(linear_names(site, int(number)))
        for target in apply["targets"]:
            np.testing.assert_array_equal(tensors[f"{target}.{name}_input.weight"], wanted)
    assert len(groups) >= 3


def test_a_program_that_would_leave_the_matrices_out_cannot_read_config_json(served):
    fields = json.loads((served[1] / "config.json").read_text())["quantization_config"]
    assert fields["quantization_status"] == readers.STATUS
    assert "load_transformers" in (served[1] / readers.CARD).read_text()


@pytest.mark.slow
def test_nvfp4_is_exported_with_scales_of_tensors_that_calibration_chose(
    tiny_directory, tmp_path, capsys
):
    formats = {"formats": ("nvfp4_calibrated",), "serve": "transformers"}
    model = quantized(tiny_directory, tmp_path / "q", recipe="identity", **formats)
    tensors = exported(model, tmp_path / "e")
    assert "Read again: 14 linears hold the bits of the quantized" in read_again(
        tmp_path / "e", model
    )
    name, state = "model.layers.1.mlp.up_proj", Quantized(model).layer(1)[1]["mlp_in"]
    weight = state.weights[0]
    scales = inventory(tmp_path / "e")[f"{name}.weight_scale"]
    assert scales[2:] == ((weight.shape[0], weight.shape[1] // 16), "F8_E4M3")
    for side, scale in {"weight": weight.tensor_scale, "input": state.tensor_scale}.items():
        np.testing.assert_array_equal(tensors[f"{name}.{side}_global_scale"], [1 / scale])
    fields = json.loads((tmp_path / "e" / "config.json").read_text())["quantization_config"]
    assert fields["format"] == "nvfp4-pack-quantized"
    assert fields["config_groups"]["group_0"]["input_activations"]["dynamic"] == "local"
    x = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    beside = x * np.float32([[1], [1000]])  # another token beside the first changes nothing
    first, again = (
        quantize_input(jnp.asarray(x), state, NVFP4(calibrated=True))[0] for x in (x, beside)
    )
    np.testing.assert_array_equal(first, again)
    own, packed = load_any(model)[2], load_any(tmp_path / "e", "nvfp4_calibrated")[2]
    for site in SITES:
        for part in ("weights", "tensor_scale"):
            pair = (jax.tree.leaves(getattr(state[site], part)) for state in (own, packed))
            for wanted, found in zip(*pair, strict=True):
                np.testing.assert_array_equal(found, wanted)
    words = ["export", "--model", str(model), "--out", str(tmp_path / "v"), "--serve", "vllm"]
    assert_one_line(cli.main(words), capsys, "takes weights in mxfp4, not in nvfp4_calibrated")
    for side, wrong in (("weight", 0.0), ("input", 0.0), ("input", math.nan)):
        spoilt = shutil.copytree(tmp_path / "e", tmp_path / f"{side} {wrong}")
        overwrite(spoilt, f"{name}.{side}_global_scale", np.float32(wrong))
        says = rf"{name}\S*_global_scale is {wrong:g}: it is the reciprocal"
        with pytest.raises(ValueError, match=says):
            load_any(spoilt, "nvfp4_calibrated")


def overwrite(directory, name, value):
    """Writes another number into a tensor of one number, in its place."""
    for path in directory.glob("*.safetensors"):
        raw = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little")
        if (about := json.loads(raw[8:start]).get(name)) is not None:
            first, last = (start + offset for offset in about["data_offsets"])
            raw[first:last] = value.tobytes()
            path.write_bytes(raw)


def test_what_a_program_would_compute_otherwise_is_refused(served, tmp_path, capsys):
    arguments = ["export", "--model", str(served[0]), "--out", str(tmp_path / "e"), "--serve"]
    assert_one_line(
        cli.main([*arguments, "vllm"]), capsys, "vllm rounds activations to mxfp4:rceil"
    )
    more = ["transformers", "--format", "dequantized"]
    assert_one_line(cli.main([*arguments, *more]), capsys, "is for --format compressed-tensors")
    opened = Quantized(served[0])
    parameters, sites = opened.layer(0)
    biased = parameters | {"self_attn.k_proj.bias": np.zeros(32, np.float32)}
    pack_layer(opened.config, 0, biased, sites, "transformers")
    with pytest.raises(ValueError, match=r"k_proj has a bias, and vllm moves no input of such"):
        pack_layer(opened.config, 0, biased, sites, "vllm")
    clipped = dataclasses.replace(sites["mlp_in"], clip=jnp.ones(2))
    with pytest.raises(ValueError, match="mlp_in: its activations have a clip by block"):
        pack_layer(opened.config, 0, parameters, sites | {"mlp_in": clipped})


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("vllm", "--activation-formats", "even"), "vllm rounds activations to mxfp4:rceil"),
        (
            ("transformers", "--weight-formats", "mxfp8"),
            "takes weights in mxfp4 or nvfp4_calibrated, not in mxfp8:mse",
        ),
        (("vllm", "--refine", "2"), "no place for a matrix for each block"),
    ],
)
def test_it_is_refused_before_anything_is_quantized(more, says, tiny_directory, tmp_path, capsys):
    words = ["--model", str(tiny_directory), "--rows", "4", "--calibration-text", str(TEXT)]
    words += ["--out", str(tmp_path / "q"), "--serve", *more]
    assert_one_line(cli.main(["quantize", *words]), capsys, says)
    assert not (tmp_path / "q").exists()


def test_what_each_reader_does_is_said():
    even = {"attention_in": "mxfp4:even", "mlp_in": "bf16"}
    same = readers.says(even, moved=False, biases=True)
    assert same["transformers"].startswith("gives this model's logits (by load_transformers in")
    rceil = "gives other logits: it has activations in mxfp4:rceil, not mxfp4:even (in"
    assert same["vllm"].startswith(rceil)
    moved = readers.says({"mlp_in": "mxfp4:rceil"}, moved=True)
    assert moved["transformers"].startswith("refuses it in from_pretrained")
    assert moved["vllm"].startswith("gives this model's logits (in bfloat16")
    assert "fails" in readers.says({"mlp_in": "mxfp4:rceil"}, moved=True, biases=True)["vllm"]
    assert readers.says(even, moved=False, mixture=True)["transformers"] == same["transformers"]
    assert "mxfp4:rceil, not bf16" in readers.says(even, moved=False, mixture=True)["vllm"]
    mixed = {"mixture": True, "experts_moved": True}
    for line in readers.says(even, moved=True, **mixed).values():
        assert line.endswith("it moves no input of an expert")


def test_an_export_for_another_rule_says_so_where_it_is_read_again(tiny_directory, tmp_path):
    model = quantized(tiny_directory, tmp_path / "q", recipe="identity")
    exported(model, tmp_path / "e")
    said = read_again(tmp_path / "e", model)
    assert "transformers has activations in mxfp4:even, not mxfp4:floor." in said
    config = tmp_path / "e/config.json"
    assert said.count("not mxfp4:floor") == 2
    fields = json.loads(config.read_text())
    assert {*readers.quantized_for(fields["quantization_config"]).values()} == {"mxfp4:floor"}
    fields["quantization_config"][readers.FOR] = {"mlp_in": "mxfp4:even"}
    config.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"says activations of {'mlp_in': 'mxfp4:even'}, not"):
        read_again(tmp_path / "e", model)


def test_what_was_written_is_read_again_and_a_changed_byte_is_found(served, tmp_path, capsys):
    model, out = served
    assert "Read again: 14 linears hold the bits of the quantized" in read_again(out, model)
    for part in ("q_proj.weight_scale", "_input.weight"):
        spoilt = tmp_path / part
        shutil.copytree(out, spoilt)
        path = spoilt / "model-00001-of-00003.safetensors"
        tensors = load_file(path)
        name = next(name for name in tensors if name.endswith(part))
        tensors[name].flat[0] += 1
        save_file(tensors, path)
        with pytest.raises(ValueError, match=f"{name} is not what the quantized model has"):
            read_again(spoilt, model)
