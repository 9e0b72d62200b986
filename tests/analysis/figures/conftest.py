"""No figure may change what matplotlib does elsewhere."""

import matplotlib
import pytest


def _settings():
    # Reading "backend" would choose one.
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}


@pytest.fixture(autouse=True)
def _matplotlib_is_left_as_it_was():
    before = _settings()
    yield
    assert _settings() == before
