"""Quantizes in a process of its own, which a test may kill; says each step that it has done.

It is started by a fork server that has imported JAX but not begun to use it (a process with JAX's
threads cannot be forked), and keeps compiled programs in a directory: what is left to pay for each
process is tracing.
"""

from multiprocessing.connection import Connection
from pathlib import Path

import jax

from duquantpp_jax.commands.quantize import QuantizeOptions, quantize


def run(options: QuantizeOptions, programs: Path, steps: Connection) -> None:
    """Sends a byte at the start and at each step of progress.

    Args:
      programs: Directory of compiled programs.
    """
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    steps.send_bytes(b".")
    quantize(options, lambda *_: steps.send_bytes(b"."))
