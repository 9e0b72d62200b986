"""Learning on eight devices, in another process: shared.py."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_eight_devices_learn_what_one_learns():
    command = [sys.executable, "-m", "tests.learning.shared", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "8 devices agree" in done.stdout
