"""A small checkpoint, and what `quantize` writes of it undisturbed."""

import pytest

from duquantpp_jax.checkpoints import save
from duquantpp_jax.commands.quantize import QuantizeOptions, quantize
from tests.conftest import TEXT, byte_tokenizer, tiny_decoder


def options_of(model, out, **more):
    given = {"model": model, "out": out, "rows": 4, "calibration_text": TEXT}
    return QuantizeOptions(**given | more)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="session")
def three_layers(tmp_path_factory):
    """A tiny model of three layers, with a generation config and a hidden file beside it."""
    directory = tmp_path_factory.mktemp("models") / "three"
    save(tiny_decoder(num_hidden_layers=3), byte_tokenizer().to_str(), directory)
    (directory / "generation_config.json").write_text('{"temperature": 0.6}')
    (directory / ".hidden.json").write_text("{}")
    return directory


@pytest.fixture(scope="session")
def quantized(three_layers, tmp_path_factory):
    """It, quantized without interruption."""
    out = tmp_path_factory.mktemp("quantized") / "whole"
    quantize(options_of(three_layers, out, recipe="smooth_hadamard", rounding="gptq"))
    return out
