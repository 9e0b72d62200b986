"""How the weights of a quantized model stand in memory while it runs on an accelerator.

    decoded     numbers in bfloat16, which holds them exactly, 16 bits a weight
    packed      codes and scales as kernels read them, 4.25 bits: a few tokens are multiplied with
                them as they are, for many they are decoded at every use

Elsewhere weights are decoded at every use by what XLA makes of it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from duquantpp_jax.core import Exact, Format, MXArray, Transform
from duquantpp_jax.formats import MXFP4
from duquantpp_jax.kernels import Operand
from duquantpp_jax.kernels.flash_attention.api import why_not_by_default
from duquantpp_jax.kernels.implementation import why_not_nvidia
from duquantpp_jax.kernels.matvec.rows import BLOCK, PackedRows, is_mxfp4
from duquantpp_jax.models.in_place import InPlace
from duquantpp_jax.models.parameters import SITES
from duquantpp_jax.ptq.packed_float import PackedFloat
from duquantpp_jax.ptq.site import (
    QuantizedLinear,
    QuantizedSite,
    is_in_float,
    is_in_kernels,
    layer_of,
)
from duquantpp_jax.transforms.basic import Identity

CUT = "--mesh cuts weights, and kernels are not cut: leave triton out"


def decoded_once(state: Any, device: Any) -> Any:
    """A model's state whose weights are decoded once, in bfloat16, where that holds them exactly.

    Only on an accelerator, which multiplies bfloat16 fast, and where they take no more than a
    quarter of its memory, whatever else is there: one model always runs the same program. Else the
    state as it is, which is decoded at every use.
    """
    parts = jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, MXArray))
    size = sum(2 * math.prod(w.shape) for w in parts if isinstance(w, MXArray) and w.is_exact)
    memory = None if device.platform == "cpu" else device.memory_stats()
    if memory is None or 4 * size > memory["bytes_limit"]:
        return state

    def of(weight: Any) -> Any:
        return _in_bfloat16(weight) if isinstance(weight, MXArray) and weight.is_exact else weight

    return jax.tree.map(of, state, is_leaf=lambda part: isinstance(part, MXArray | PackedFloat))


@jax.jit
def _in_bfloat16(weight: MXArray) -> Exact:
    numbers = dataclasses.replace(weight, tensor_scale=None).dequantize()
    return Exact(numbers.astype(jnp.bfloat16), weight.tensor_scale)


def for_writing(linear: Any, state: Any, device: Any, implementation: str | None = None) -> Any:
    """A model's state for texts that it writes, packed where weights are in MXFP4.

    Args:
      implementation: Of products of a few tokens: "triton", which reads packed weights, or "xla",
        which needs none; None for the first of these that the device runs.

    Raises:
      ValueError: "triton" cannot run here, or no site of the model is for it.
    """
    reason = why_not_nvidia()
    if implementation == "xla" or (implementation is None and reason is not None):
        return decoded_once(state, device)
    if reason is not None:
        raise ValueError(f"no implementation {implementation} here: {reason}")
    packed = state
    if isinstance(linear, QuantizedLinear):
        runs = state if isinstance(state, tuple) else (state or {},)
        runs = tuple(
            {name: _packed(run[name], linear.format(name)) for name in run} for run in runs
        )
        packed = runs if isinstance(state, tuple) else runs[0]
    if implementation is not None and not is_packed(packed):
        raise ValueError(
            f"no implementation {implementation} of this model: it multiplies weights in MXFP4, "
            "and here are none"
        )
    return decoded_once(packed, device)


def implemented(linear: Any, implementation: str | None) -> Any:
    """A model's linear whose inputs are moved and rounded by the named implementation.

    Raises:
      ValueError: "triton" cannot run here, or no input of the model is for it.
    """
    if implementation == "triton":
        if (reason := why_not_nvidia()) is not None:
            raise ValueError(f"no implementation triton here: {reason}")
        if not isinstance(linear, QuantizedLinear) or not any(
            is_in_kernels(linear.format(site)) for site in SITES
        ):
            raise ValueError(
                "no implementation triton of this model: it moves and rounds inputs in MXFP4 by "
                "floor, ceil, even or rceil, and here are none"
            )
    if implementation is None or not isinstance(linear, QuantizedLinear):
        return linear
    return dataclasses.replace(linear, implementation=implementation)


def kernels_here(*, attention: bool | None = None, inputs: bool = True) -> str | None:
    """A line about the kernels that run on this device where one is for the model; None if none do.

    Args:
      attention: Whether attention is one of them; None for what it is by default.
      inputs: Whether inputs are moved and rounded by them.
    """
    if why_not_nvidia() is not None:
        return None
    attention = why_not_by_default() is None if attention is None else attention
    said = ["attention"] * attention + ["moving and rounding of inputs in MXFP4"] * inputs
    return f"in kernels (triton), where there is one: {' and '.join(said)}" if said else None


def for_tensor_cores(linear: Any, state: Any) -> Any:
    """A model's state for the block-scaled tensor cores of Blackwell: weights as their operands.

    Raises:
      ValueError: A linear would fall back: its weight or input is not in MXFP4, it is an expert's,
        or its input is not moved within blocks of 32.
    """
    if not isinstance(linear, QuantizedLinear) or not state:
        raise ValueError("its linears are not quantized: quantize it first")
    runs = state if isinstance(state, tuple) else (state,)
    laid = tuple(
        {name: _operands(name, site, linear.format(name)) for name, site in run.items()}
        for run in runs
    )
    return laid if isinstance(state, tuple) else laid[0]


def _operands(name: str, site: QuantizedSite, format: Format | None) -> QuantizedSite:
    """The site with its weights as operands."""
    weights = [w for w in site.weights if is_mxfp4(w)]
    in_mxfp4 = isinstance(format, MXFP4) and format.block_size == BLOCK
    if len(weights) < len(site.weights) or not in_mxfp4:
        reason = "has weights or inputs that are not in MXFP4"
    elif len(weights[0].shape) != 3:
        reason = "has a weight for each expert"
    elif not (site.clip is site.scale_offset is None):
        reason = "clips its inputs or moves their scales"
    elif _matrices(_each_layer(site), weights[0].shape[-1]) is None:
        reason = "moves its inputs across blocks of 32"
    else:
        return dataclasses.replace(site, weights=tuple(map(jax.vmap(Operand.from_mx), weights)))
    raise ValueError(f"the site {name} {reason}: its linears would fall back")


def _each_layer(site: QuantizedSite) -> list[Transform]:
    """The transform of each layer."""
    count = jax.tree.leaves(site)[0].shape[0]
    return [layer_of(site.transform, layer) for layer in range(count)]


def is_packed(state: Any) -> bool:
    """Whether a state of `for_writing` has packed weights."""
    runs = state if isinstance(state, tuple) else (state or {},)
    return any(getattr(site, "packed", None) is not None for run in runs for site in run.values())


def _packed(site: QuantizedSite, format: Format | None) -> QuantizedSite:
    """The site with packed weights, if kernels multiply them."""
    weights = [w for w in site.weights if is_mxfp4(w) and len(w.shape) == 3]
    if len(weights) < len(site.weights):
        return site
    width, matrices = weights[0].shape[-1], None
    if is_in_kernels(format):
        moved = site.clip is site.scale_offset is None
    else:  # by a kernel that leaves inputs in float, unless there is nothing to move
        moved = is_in_float(format) and not isinstance(site.transform, Identity)
    if moved:
        matrices = _matrices(_each_layer(site), width)
    rows = PackedRows.of(weights, matrices)
    return dataclasses.replace(site, weights=(), packed=InPlace(rows))


def _matrices(
    transforms: Sequence[Transform], width: int
) -> Float32[Array, "layers blocks 32 32"] | None:
    """M_b with activations(x)_b = x_b M_b of each layer; None if one of them mixes blocks."""
    found = []
    for transform in transforms:
        if (blocks := transform.as_blocks(width, BLOCK)) is None:
            return None
        scale, matrices, _ = blocks.whole(width, BLOCK)
        found.append(matrices / scale.reshape(-1, BLOCK, 1))
    return jnp.stack(found)
