"""A layer for layouts that hold one matrix for all blocks of a site's input.

    x' = blockdiag(T, ..., T)^T x,     T [32, 32]

Smoothing before q/k/v and up/gate is folded into the norm before them, g / s, if `quantize --fuse`
has not done it; other smoothing only that folds, before rounding. Each expert of a mixture is a
linear, and all experts of a site must be moved alike. Whatever else moves an input these layouts
cannot express, and it is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from duquantpp_jax.checkpoints.experts import linears, tensors_of
from duquantpp_jax.checkpoints.mxfp4 import BLOCK
from duquantpp_jax.checkpoints.readers import Reader
from duquantpp_jax.core import MXArray, Transform
from duquantpp_jax.models import SITE_WEIGHTS, SITES, DecoderConfig
from duquantpp_jax.models.parameters import (
    EXPERT_SITES,
    experts,
    input_norms,
    layer_prefix,
    tensor_name,
)
from duquantpp_jax.ptq.experts import parts_of
from duquantpp_jax.ptq.fuse import moved_gain, moving, split
from duquantpp_jax.ptq.packed_float import PackedFloat
from duquantpp_jax.ptq.plan import linear_shapes
from duquantpp_jax.ptq.site import QuantizedSite

SHARED = ":shared after the name of the recipe (which --serve does)"

Tensors = dict[str, np.ndarray]
Matrix = Float32[np.ndarray, "32 32"]


class Layer(NamedTuple):
    """A layer in another layout: its tensors by their whole names.

    Attributes:
      moved: For each group of transform_config the linears whose input it moves.
      floats: Linears that are not quantized.
    """

    tensors: Tensors
    moved: dict[str, list[str]]
    floats: list[str]


class QuantizedPart(NamedTuple):
    """A quantized linear of a checkpoint, which is a linear of the model or one of its experts.

    Attributes:
      name: Its whole name there.
      matrix: T; None where nothing moves its input.
      input_scale: Tensor scale of its input, for formats that calibration gives one.
    """

    name: str
    site: str
    weight: MXArray
    matrix: Matrix | None
    input_scale: Float32[Array, "*experts"] | None = None


class Parts(NamedTuple):
    """A layer in parts.

    Attributes:
      rest: Tensors of what is not quantized, by their names in a checkpoint.
      floats: Names of the linears among them.
    """

    quantized: list[QuantizedPart]
    rest: Tensors
    floats: list[str]


def in_parts(
    config: DecoderConfig,
    number: int,
    parameters: Mapping[str, Any],
    sites: Mapping[str, QuantizedSite],
    reader: Reader,
    layout: str,
) -> Parts:
    """The parts of a layer.

    Args:
      layout: Its name, for errors.

    Raises:
      ValueError: What such a layout, or the reader, cannot express; names the site.
    """
    prefix, shapes, stored = layer_prefix(number), linear_shapes(config), linears(config)
    parameters, floats = dict(parameters), dict[str, np.ndarray]()
    found: list[QuantizedPart] = []
    for site in SITES:
        state, names, where = sites[site], SITE_WEIGHTS[site], f"{prefix}{site}"
        count, width = experts(config, site), shapes[names[0]][1]
        folding = split(config, site, state.transform, width)
        matrix = site_matrix(config, site, folding.rest, width, where, layout)
        _check_site(where, names, state, reader.fuses, layout)
        if folding.moves and site not in input_norms(config):
            raise ValueError(
                f"{where}: its smoothing has to be folded into the linear before it prior "
                f"to rounding, and {layout} has no online one: quantize again with --fuse"
            )
        for _, made in folding.moves:
            for name, channels in made.items():
                parameters[name] = np.asarray(moved_gain(config, parameters[name], channels))
        for name, weight in zip(names, state.weights, strict=True):
            if not isinstance(weight, MXArray):
                if folding.moves:
                    raise ValueError(
                        f"{prefix}{name} is in float beside linears whose smoothing is folded into "
                        f"their norm, which {layout} cannot express: quantize again with --fuse"
                    )
                exact = weight.astype(jnp.bfloat16) if isinstance(weight, PackedFloat) else weight
                floats[prefix + name] = np.asarray(exact)
                continue
            if weight.shape[-1] != shapes[name][1]:
                raise ValueError(
                    f"{prefix}{name} was padded from {shapes[name][1]} to {weight.shape[-1]} "
                    f"inputs, which {layout} cannot express: export --format dequantized"
                )
            each = zip(stored[prefix + name], parts_of(count, weight), strict=True)
            scale = state.tensor_scale
            found += [QuantizedPart(whole, site, part, matrix, scale) for whole, (part,) in each]
    packed = [isinstance(w, MXArray) for site in EXPERT_SITES for w in sites[site].weights]
    if config.num_experts and reader.fuses and any(packed) and not all(packed):
        raise ValueError(
            f"{prefix}mlp: some linears of its experts are in float beside quantized ones, and "
            "vLLM makes one layer of all of them: exclude all of them, or none (or export --serve "
            "transformers)"
        )
    named = {f"{name}.weight": array for name, array in floats.items()}
    named |= {prefix + tensor_name(name): np.asarray(a) for name, a in parameters.items()}
    left = [name for own in floats for name in stored[own]]
    return Parts(found, tensors_of(config, named), left)


def site_matrix(
    config: DecoderConfig, site: str, transform: Transform, width: int, where: str, layout: str
) -> Matrix | None:
    """The one matrix of a site, as in `shared_matrix`, and for all of its experts.

    Raises:
      ValueError: Anything else moves its input; one line that says what to use instead.
    """
    count, padded = experts(config, site), -(-width // BLOCK) * BLOCK
    each = (moving(part, width) for (part,) in parts_of(count, transform))
    first, *others = (shared_matrix(part, padded, where, layout) for part in each)
    if not all(np.array_equal(first, other) for other in others):  # None equals None
        raise ValueError(
            f"{where}: its experts move their inputs by matrices of their own, and {layout} holds "
            "one for all of them: quantize with identity or block_hadamard"
        )
    return first


def check_activations(where: str, state: QuantizedSite, layout: str) -> None:
    """Raises ValueError for what no reader can do with the activations of a site."""
    for part in ("clip", "scale_offset"):
        if getattr(state, part) is not None:
            raise ValueError(
                f"{where}: its activations have a {part} by block, which no reader of {layout} "
                "applies: quantize without it, or export --format dequantized"
            )


def _check_site(
    where: str, names: Sequence[str], state: QuantizedSite, fused: bool, layout: str
) -> None:
    """Raises ValueError for what no reader can do with a site, and for one half in float."""
    check_activations(where, state, layout)
    quantized = [isinstance(weight, MXArray) for weight in state.weights]
    if fused and any(quantized) and not all(quantized):
        name = names[quantized.index(False)]
        raise ValueError(
            f"{where}: {name} is in float beside quantized linears of the same input, which vLLM "
            f"makes one linear: exclude all of {', '.join(names)}, or none "
            "(or export --serve transformers)"
        )


def shared_matrix(
    transform: Transform, width: int, where: str, layout: str, instead: str = SHARED
) -> Matrix | None:
    """The one matrix that moves all blocks of a site's input; None where nothing moves it.

    Args:
      instead: How to quantize where it is one for each block.

    Raises:
      ValueError: Anything else moves it; one line that says what to use instead.
    """
    kinds = ", ".join(type(link).__name__ for link in transform.flat_links())
    if (blocks := transform.as_blocks(width, BLOCK)) is None:
        raise ValueError(
            f"{where}: its input is moved online by {kinds}, whose as_blocks gives no matrix for "
            f"each block of {BLOCK}: {layout} has nothing else; export --format dequantized"
        )
    matrices = None if blocks.matrices is None else np.asarray(blocks.matrices, np.float32)
    differ = matrices is not None and bool(np.any(matrices != matrices[:1]))
    if blocks.divisor is not None and np.any(np.asarray(blocks.divisor) != 1):
        also = f" and {instead}, for one matrix a site" if differ else ""
        raise ValueError(
            f"{where}: its input is divided online by {kinds}, which {layout} cannot express: "
            f"quantize again with --fuse, which folds smoothing{also}, or export --format "
            "dequantized"
        )
    if matrices is None:
        return None
    if differ:
        raise ValueError(
            f"{where}: its input is moved online by a matrix for each block, and {layout} holds "
            f"one for all blocks of a site: quantize with {instead}, or export --format dequantized"
        )
    return matrices[0]
