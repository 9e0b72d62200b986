"""A transform_config of compressed-tensors: which inputs are moved, by which matrices."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from duquantpp_jax.checkpoints import load, load_any
from duquantpp_jax.checkpoints.online import moved_online, stored_matrix, transform_of
from duquantpp_jax.checkpoints.shards import inventory
from tests.checkpoints.test_mxfp4 import COMPRESSED, drawn, written
from tests.conftest import tiny_decoder

LINEARS = [f"model.layers.{n}.{name}" for n in (0, 1) for name in ("q_proj", "mlp.down_proj")]


def config(targets, location="input", ignore=(), **more):
    """A config.json with one group."""
    place = {"targets": targets, "location": location, "ignore": list(ignore), "inverse": False}
    group = {"type": "hadamard", "apply": [place], "head_dim": 32} | more
    return {"quantization_config": {"transform_config": {"config_groups": {"R": group}}}}


@pytest.mark.parametrize(
    ("targets", "ignore", "moved"),
    [
        (["re:.*down_proj$"], (), LINEARS[1::2]),
        ("Linear", ("lm_head", "re:.*q_proj"), LINEARS[1::2]),
        (["Linear"], ("lm_head",), LINEARS),
        ([LINEARS[2], "model.norm"], (), LINEARS[2:3]),
        (["re:down_proj"], (), None),  # a pattern begins where the name does
    ],
)
def test_targets_are_names_patterns_or_all_linears(targets, ignore, moved):
    fields = config(targets, ignore=ignore)
    if moved is None:
        with pytest.raises(ValueError, match="names no linear"):
            moved_online(fields, LINEARS)
    else:
        assert [*moved_online(fields, LINEARS)] == moved


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (config(["Linear"]), "lm_head"),
        (config(["re:.*down_proj"], "output"), "location 'output'"),
        (config(["re:.*down_proj"], "q_attn"), "location 'q_attn'"),
        (config(["re:.*down_proj"], randomize=True), "randomize"),
        (config(["re:.*down_proj"], type="learned"), "of type hadamard, random-hadamard"),
        (config(["re:.*down_proj"], head_dim=0), "head_dim 0"),
        (config(["re:(.*)*x"]), "give a simpler one"),
        (config(["re:(.*"]), "give a simpler one"),
        (config([3]), "targets"),
        (config(["re:.*down_proj"], apply=[None]), "location"),
        ({"quantization_config": {"transform_config": {"config_groups": [1]}}}, "config_groups"),
    ],
)
def test_what_is_not_read_is_refused_in_one_line(fields, says):
    with pytest.raises(ValueError, match=says) as refusal:
        moved_online(fields, LINEARS)
    assert "\n" not in str(refusal.value)


def test_weights_that_were_moved_before_they_were_stored_need_nothing():
    assert moved_online(config(["Linear"], "weight_input"), LINEARS) == {}


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard", "random-matrix"])
def test_the_matrix_is_that_of_the_library(kind, inverse, tmp_path):
    """x @ T / sqrt(n), x @ T^T / sqrt(n) for an inverse, and x @ T as it is for random-matrix."""
    signs = np.array([[1.0]])
    for _ in range(5):
        signs = np.block([[signs, signs], [signs, -signs]])
    random = np.random.default_rng(0)
    drawn = {"hadamard": signs, "random-hadamard": signs * random.choice([-1.0, 1.0], (32, 1))}
    matrix = drawn.get(kind, random.standard_normal((32, 32)))
    save_file({f"{LINEARS[0]}.R_input.weight": matrix}, tmp_path / "model.safetensors")
    found, fields = inventory(tmp_path), config(["re:.*q_proj"], type=kind)
    (group,) = {*moved_online(fields, LINEARS).values()}
    group = group._replace(inverse=inverse)
    tensor = stored_matrix(LINEARS[2], group, 64, found)  # it is stored for the first alone
    transform = transform_of(tensor, group, 64, found)
    turned = matrix.T if inverse and kind != "random-matrix" else matrix
    turned = turned / (1 if kind == "random-matrix" else np.sqrt(32))
    (found_matrix,), (back,) = (np.asarray(t.matrices) for t in (transform, transform.inverse()))
    np.testing.assert_allclose(found_matrix, turned, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found_matrix @ back, np.eye(32), atol=1e-4)


def test_moved_inputs_are_refused_where_they_cannot_be_expressed(tmp_path):
    packed = {"mlp.up_proj": drawn((96, 64)), "mlp.gate_proj": drawn((96, 64))}
    place = written(tmp_path / "m", tiny_decoder(), packed, COMPRESSED)
    path = place / "config.json"
    fields = json.loads(path.read_text())

    def says(words, **more):
        groups = config(**more)["quantization_config"]
        path.write_text(json.dumps({**fields, "quantization_config": {**COMPRESSED, **groups}}))
        with pytest.raises(ValueError, match=words):
            load_any(place)

    says("moves it in 2 ways", targets=["re:.*up_proj"])
    says("down_proj is in float", targets=["re:.*mlp.*"])
    says("which does not divide an input of 64", targets=["re:.*(up|gate)_proj"], head_dim=48)
    says("up_proj.R_input.weight is missing", targets=["re:.*up_proj"], type="random-matrix")
    with pytest.raises(ValueError, match="give the model that they were made from"):
        load(place)
