"""A model directory that a test may spoil."""

import shutil

import pytest


@pytest.fixture
def directory(tiny_directory, tmp_path):
    """A copy of the tiny model that a test may spoil."""
    return shutil.copytree(tiny_directory, tmp_path / "model")
