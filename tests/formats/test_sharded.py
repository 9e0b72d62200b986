"""Quantizing an array that is spread over devices gives the bits of quantizing it on one."""

import os
import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).with_name("sharded.py")


@pytest.mark.slow
def test_eight_devices_agree_with_one_bit_for_bit():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, PROGRAM], capture_output=True, text=True, env=environment, timeout=240
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["8", "devices", "agree"]
