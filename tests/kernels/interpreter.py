"""Mosaic's interpret mode with block scaling, which JAX's own (0.11.2 to 0.12) leaves out.

Three things are added. A copy of scales is a copy from shared to tensor memory that undoes the
128x4 tiles, which is what the hardware's addressing amounts to. A scaled product is a product
whose operands are read times their scales. And scales take part in race detection: the product
reads them, so a copy over them that nothing orders behind the product is a race.

It works on the interpreter's private classes, so it is here and not in the package.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable

import jax
import numpy as np
import pytest

needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="the interpreter of jax 0.10, the last for Python 3.11, has no tcgen05",
)
_reading = threading.local()  # what becomes of values read by this thread: {buffer key: function}


def parameters(detect_races: bool = True):
    """Parameters of interpret mode."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(detect_races=detect_races)


def races_found() -> bool:
    """Whether the last kernel that ran with race detection had a race."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return gpu_callbacks.get_races().races_found


def has_race(run: Callable[[], object]) -> bool:
    """Whether a kernel has a race, which jax 0.11 notes and jax 0.12 raises."""
    try:
        run()
    except Exception as error:
        if "RACE DETECTED" not in str(error):
            raise
        return True
    return races_found()


@contextlib.contextmanager
def block_scaling():
    """Interpret mode understands scales within."""
    from jax._src.pallas.mosaic_gpu import primitives
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as callbacks
    from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret

    plain_memory = callbacks._get_shared_memory
    plain_interpret = jaxpr_interpret.JaxprInterpreter.interpret

    def shared_memory():
        memory = plain_memory()
        changes = getattr(_reading, "changes", None)
        return _Changed(memory, changes) if changes else memory

    def as_plain_copy(eqn):
        if eqn.primitive is primitives.async_copy_scales_to_tmem_p:
            return eqn.replace(primitive=primitives.async_copy_smem_to_tmem_p)
        return eqn

    def interpret(self, jaxpr, token, *args):
        jaxpr = jaxpr.replace(eqns=[as_plain_copy(eqn) for eqn in jaxpr.eqns])
        return plain_interpret(self, jaxpr, token, *args)

    class Copy(callbacks.TcGen05Copy):
        def __call__(self, pipeline_clock, tma_thread_id):
            with _change({self.smem_key: _without_tiles}):
                return super().__call__(pipeline_clock, tma_thread_id)

    class Product(callbacks.TcGen05Mma):
        def __call__(self, pipeline_clock, tma_thread_id):
            if self.a_scale_key is None:
                return super().__call__(pipeline_clock, tma_thread_id)
            a_scale = self._read_scale(self.a_scale_key, pipeline_clock, tma_thread_id)
            b_scale = self._read_scale(self.b_scale_key, pipeline_clock, tma_thread_id)
            bare = dataclasses.replace(self, a_scale_key=None, b_scale_key=None)
            changes = {
                self.a_key: lambda a: _scaled(a, a_scale),
                self.b_key: lambda b: _scaled(b.T, b_scale).T,
            }
            with _change(changes):
                return bare(pipeline_clock, tma_thread_id)

        def _read_scale(self, key, pipeline_clock, tma_thread_id):
            memory = plain_memory()
            where = memory.access(key, ())
            log = callbacks.memory.GPULoggingInfo(self.mesh_location, self.thread, self.source_info)
            value, _, _ = memory.get_buffer_content(key, where, self.thread, logging_info=log)
            if memory.detect_races:
                clock = memory.get_clock(self.thread)
                if pipeline_clock is not None:
                    clock.update(pipeline_clock)
                clock.inc(tma_thread_id)
                callbacks.get_races().check_read(
                    self.thread, clock.generic_clock, key, where, source_info=self.source_info
                )
            return np.asarray(value).astype(np.float32)

    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(callbacks, "_get_shared_memory", shared_memory)
        patched.setattr(callbacks, "TcGen05Copy", Copy)
        patched.setattr(callbacks, "TcGen05Mma", Product)
        patched.setattr(jaxpr_interpret.JaxprInterpreter, "interpret", interpret)
        try:
            yield
        except BaseException:
            callbacks.reset_gpu_interpret_mode_state()
            raise


class _Changed:
    """Shared memory of which some buffers read differently."""

    def __init__(self, memory, changes):
        self._memory, self._changes = memory, changes

    def __getattr__(self, name):
        return getattr(self._memory, name)

    def get_buffer_content(self, key, *args, **kwargs):
        value, *rest = self._memory.get_buffer_content(key, *args, **kwargs)
        change = self._changes.get(key)
        return (value if change is None else change(np.asarray(value)), *rest)


@contextlib.contextmanager
def _change(changes):
    _reading.changes = changes
    try:
        yield
    finally:
        _reading.changes = None


def _without_tiles(scales: np.ndarray) -> np.ndarray:
    """Rows and columns of scales, from tiles [row tiles, column tiles, 32, 16]."""
    row_tiles, column_tiles = scales.shape[:2]
    tiles = scales.reshape(row_tiles, column_tiles, 32, 4, 4)
    return tiles.transpose(0, 3, 2, 1, 4).reshape(128 * row_tiles, 4 * column_tiles)


def _scaled(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Values [rows, k] times their blocks' scales [at least as many rows, blocks]."""
    rows, k = values.shape
    factors = np.repeat(scales[:rows], k // scales.shape[1], axis=1)
    return values.astype(np.float32) * factors
