"""Calibration over devices and hosts gives what one device gives, but for the order of sums."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests import calibration_worker


def run(file, devices, *place):
    """A worker process with so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "tests.calibration_worker", str(file), *map(str, place)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def done(process):
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def one_device():
    return calibration_worker.calibrated()


def load(file):
    with np.load(file) as arrays:
        return dict(arrays)


def assert_same_but_for_the_order_of_sums(found, wanted, devices):
    assert int(found["devices"]) == devices
    for name in set(wanted) - {"devices"}:
        # Sums of 864 float32 products in another order: off by some sqrt(864) halves of 2^-24.
        bound = 4e-6 * np.abs(wanted[name]).max()
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=bound, err_msg=name)


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(one_device, tmp_path):
    done(run(tmp_path / "eight.npz", 8))
    assert_same_but_for_the_order_of_sums(load(tmp_path / "eight.npz"), one_device, 8)


@pytest.mark.slow
@pytest.mark.sockets
def test_two_processes_give_what_one_gives(one_device, tmp_path):
    port = free_port()
    files = [tmp_path / f"{process}.npz" for process in range(2)]
    workers = [run(file, 2, process, 2, port) for process, file in enumerate(files)]
    for worker in workers:
        done(worker)
    first, second = map(load, files)
    assert_same_but_for_the_order_of_sums(first, one_device, 4)
    for name in first:  # every process has the whole
        np.testing.assert_array_equal(first[name], second[name])
