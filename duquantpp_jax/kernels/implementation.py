"""Which implementation of a kernel runs: the one that was named, or the best that the device has.

A named implementation runs or raises and says why. Only None chooses, and logs what it chose.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

__all__ = ["choose", "cores", "current_device", "why_not_sm100"]

logger = logging.getLogger(__name__)
SM100_CORES = 148  # streaming multiprocessors of a B200


def current_device() -> Any:
    """The device that computations without a placement go to."""
    device = jax.config.jax_default_device
    return device if hasattr(device, "platform") else jax.devices()[0]


def why_not_sm100() -> str | None:
    """None where kernels for compute capability 10.x run, else the reason that they do not."""
    device = current_device()
    if device.platform not in ("gpu", "cuda"):
        return f"it needs an NVIDIA GPU of compute capability 10.x, and this is {device.platform}"
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability.split(".")[0] != "10":
        return f"it needs compute capability 10.x, and {device.device_kind} has {capability}"
    return None


def cores() -> int:
    """Streaming multiprocessors of the current device."""
    return int(getattr(current_device(), "core_count", None) or SM100_CORES)


def choose(
    kernel: str, named: str | None, obstacles: Mapping[str, Callable[[], str | None]]
) -> str:
    """The implementation to run.

    Args:
      kernel: Name of the kernel, for messages.
      named: What the caller asked for, or None.
      obstacles: For every implementation, best first, what says why it cannot run here (or None).

    Raises:
      ValueError: No implementation has that name.
      RuntimeError: The one that was named cannot run here.
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
