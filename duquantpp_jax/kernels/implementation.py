"""Choice of the implementation of a kernel: the named one, or the best that the device has.

A named implementation runs, or raises and says why not. Only None chooses, and logs the choice.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

from duquantpp_jax.kernels.specifications import CORES

logger = logging.getLogger(__name__)


def current_device() -> Any:
    """The device of computations without a placement."""
    device = jax.config.jax_default_device
    return device if hasattr(device, "platform") else jax.devices()[0]


def why_not_nvidia() -> str | None:
    """Why kernels for NVIDIA GPUs cannot run here; None if they can."""
    device = current_device()
    if device.platform not in ("gpu", "cuda"):
        return f"it needs an NVIDIA GPU, and this is {device.platform}"
    if (capability := str(getattr(device, "compute_capability", ""))).startswith("gfx"):
        return f"it needs an NVIDIA GPU, and this is AMD's {capability}"
    return None


def why_not_sm100() -> str | None:
    """Why kernels for compute capability 10.x cannot run here; None if they can."""
    device = current_device()
    if device.platform not in ("gpu", "cuda"):
        return f"it needs an NVIDIA GPU of compute capability 10.x, and this is {device.platform}"
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability.split(".")[0] != "10":
        return f"it needs compute capability 10.x, and {device.device_kind} has {capability}"
    return None


def cores() -> int:
    """Streaming multiprocessors of the current device; those of a B200 if it does not say."""
    return int(getattr(current_device(), "core_count", None) or CORES)


def choose(
    kernel: str, named: str | None, obstacles: Mapping[str, Callable[[], str | None]]
) -> str:
    """Name of the implementation to run.

    Args:
      obstacles: Best first, a function for each implementation that says why it cannot run here.

    Raises:
      ValueError: No implementation has the name.
      RuntimeError: The named implementation cannot run here.
    """
    if named is None:
        chosen = next(name for name, obstacle in obstacles.items() if obstacle() is None)
        logger.debug("%s: %s on %s", kernel, chosen, current_device().device_kind)
        return chosen
    if named not in obstacles:
        raise ValueError(f"{kernel} has no implementation {named!r}: name one of {[*obstacles]}")
    if reason := obstacles[named]():
        raise RuntimeError(f"{kernel} cannot run as {named!r}: {reason}")
    return named
