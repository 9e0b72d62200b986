"""Every test runs under strict dtype promotion; real data comes through DUQUANTPP_DATA."""

import os
import pathlib

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")

DATA_VARIABLE = "DUQUANTPP_DATA"
_data = {"read": 0, "skipped": 0}


@pytest.fixture
def data() -> pathlib.Path:
    """The directory of real data, or a skip where DUQUANTPP_DATA does not name it."""
    place = os.environ.get(DATA_VARIABLE)
    if not place:
        _data["skipped"] += 1
        pytest.skip(f"{DATA_VARIABLE} is not set")
    _data["read"] += 1
    return pathlib.Path(place)
