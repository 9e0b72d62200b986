"""A Blackwell GPU that is not there: XLA compiles for its description on a machine without a GPU.

Compiling needs ptxas and libdevice beside jax, from the wheels of the extra `blackwell`, but no
driver, cuDNN or cuBLAS. Mosaic remembers the first architecture that it sees, so a process can
compile for only one target.
"""

import contextlib
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import jax

WHEELS = (
    "absl-py",
    "jax-cuda13-plugin",
    "jax-cuda13-pjrt",  # XLA's compiler for CUDA
    "nvidia-cuda-nvcc",  # ptxas
    "nvidia-nvvm",  # libdevice
    "nvidia-cuda-nvdisasm",
)
INSTALL = "pip install 'duquantpp_jax[blackwell]'"

# GpuTargetConfigProto (xla/stream_executor/device_description.proto) of a B200. Sources: CUDA
# programming guide (compute capability 10.0); NVIDIA's data sheet; clock and L2 as a B200 reports.
TARGETS = {
    "b200": """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 148
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 8000000000000
  l2_cache_size: 132644864
  device_memory_size: 191514411008
  clock_rate_ghz: 1.965
  device_address_bits: 64
  cuda_compute_capability { major: 10 minor: 0 feature_extension: ACCELERATED_FEATURES }
  platform_version: "Compute Capability 10.0a"
  device_vendor: "NVIDIA Corporation"
  name: "NVIDIA B200"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA B200"
"""
}


def missing_wheels() -> list[str]:
    """Names of the wheels that compiling needs and that are not installed."""
    return [name for name in WHEELS if not any(importlib.metadata.distributions(name=name))]


@contextlib.contextmanager
def compile_only(target: str) -> Iterator[Any]:
    """Makes the target the default device, for `jax.jit(f).lower(...).compile()` inside."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGETS[target], topology="1x1x1"
    )
    with jax.default_device(topology.devices[0]):
        yield topology.devices[0]
