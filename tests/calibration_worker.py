"""Calibrates over several devices and, under jax.distributed, several processes; saves the Stats.

    python -m tests.calibration_worker FILE [PROCESS PROCESSES PORT]

JAX's own flags say how many devices a process has.
"""

import sys

import jax
import numpy as np

from duquantpp_jax.core import Needs
from duquantpp_jax.ptq.calibration import calibrate
from tests.conftest import tiny_decoder


def main() -> None:
    file, *place = sys.argv[1:]
    if place:
        process, processes, port = map(int, place)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    np.savez(file, **calibrated())


def calibrated() -> dict[str, np.ndarray]:
    """The arrays of every site by name, and the number of devices."""
    tokens = np.random.default_rng(0).integers(0, 257, (36, 24), np.int32)
    stats = calibrate(tiny_decoder(), tokens, needs=Needs.GRAM | Needs.POSITIONS)
    return {"devices": np.asarray(jax.device_count())} | {
        f"{site}.{name}": np.asarray(getattr(kept, name))
        for site, kept in stats.items()
        for name in ("count", "absmax", "sample", "gram", "position_sum")
    }


if __name__ == "__main__":
    main()
