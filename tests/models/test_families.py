"""Every family against the transformers library on random checkpoints, and what is refused.

The file was made by tests/goldens/families.py, which names the versions.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from duquantpp_jax.checkpoints import load, save
from duquantpp_jax.models import FAMILIES, Decoder, DecoderConfig, dense
from duquantpp_jax.models.experts import Routed
from tests.conftest import byte_tokenizer
from tests.goldens import families


def seen(site, x, weights, state):
    """As `dense`; gives what experts get and make."""
    ys, _ = dense(site, x, weights, state)
    return ys, (x, ys) if isinstance(x, Routed) else None


RUN = jax.jit(functools.partial(Decoder.__call__, linear=seen))


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(families.PLACE, allow_pickle=False) as file:
        return dict(file)


def directory_of(name, config, place):
    """The checkpoint of a case, in float32, under the library's names."""
    shapes = {n: tuple(s) for n, s in json.loads(str(golden()[f"{name}: shapes"]))}
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    save_file(families.weights(shapes), place / "model.safetensors", {"format": "pt"})
    return place


@pytest.fixture(params=families.CASES)
def case(request, tmp_path):
    name = request.param
    return name, load(directory_of(name, families.CASES[name], tmp_path / "given"))


def test_every_family_has_a_case():
    named = {config["architectures"][0] for config in families.CASES.values()}
    assert named == set(FAMILIES)
    assert families.PLACE.stat().st_size <= 240_000


def test_logits_are_those_of_the_transformers_library(case):
    name, model = case
    logits, _ = RUN(model, jnp.asarray(families.tokens()))
    wanted = golden()[f"{name}: logits"].astype(np.float64)
    error = np.abs(np.asarray(logits, np.float64) - wanted).max() / np.abs(wanted).max()
    assert error <= 1e-5
    assert np.abs(wanted).max() > 1


def test_both_layouts_of_config_json_say_the_same(case):
    name, model = case
    saved = json.loads(str(golden()[f"{name}: config"]))
    assert "rope_parameters" in saved  # the layout of transformers 5
    assert DecoderConfig.from_dict(saved) == model.config


def test_what_is_saved_is_read_back(case, tmp_path):
    _, model = case
    save(model, byte_tokenizer().to_str(), tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.config == model.config
    for name, array in again.parameters().items():
        np.testing.assert_array_equal(
            array, model.parameters()[name].astype(jnp.bfloat16).astype(jnp.float32)
        )
