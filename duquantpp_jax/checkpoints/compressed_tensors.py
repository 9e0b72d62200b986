"""A quantized model in the layouts of the library compressed-tensors: mxfp4-pack-quantized, and
nvfp4-pack-quantized.

Codes and scale bytes are laid out as mxfp4.py says. NVFP4's scales are float8_e4m3fn, of 16 codes
each, and beside them lie X.weight_global_scale and X.input_global_scale [1], the reciprocals of the
tensor scales of weights and of activations: exact, as those of nvfp4_calibrated are powers of two.
What moves the input of a linear X is

    x' = blockdiag(T, ..., T)^T x,     one T [32, 32] for all blocks of a site,

a group of transform_config. A group of type hadamard holds no tensor: T is Sylvester's matrix. In
one of type random-hadamard the library and vLLM compute x M / sqrt(32), with M the tensor
X.{group}_input.weight: here M = sqrt(32) T, for any T. (Type random-matrix is x M in the library,
but x M / sqrt(32) in vLLM.)

Smoothing before q/k/v and up/gate is folded into the norm before them, g / s, if `quantize --fuse`
has not done it; other smoothing only that folds, before rounding. Whatever else moves an input the
layout cannot express, and it is refused.

Source: the library compressed-tensors 0.20: compressors/mxfp4 and nvfp4,
quantization/quant_config.py and transform/.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from duquantpp_jax.checkpoints.directory import Quantized
from duquantpp_jax.checkpoints.mxfp4 import BLOCK, COMPRESSED, INPUT_SCALE, NVFP4_PACKED, PACKED
from duquantpp_jax.checkpoints.readers import ANY, NVFP4, READERS, STATUS, check_formats
from duquantpp_jax.commands.options.common import Serve
from duquantpp_jax.core import MXArray, Transform
from duquantpp_jax.formats import E2M1
from duquantpp_jax.formats.tensors import pack_codes
from duquantpp_jax.models import SITE_WEIGHTS, SITES, DecoderConfig
from duquantpp_jax.models.parameters import input_norms, layer_prefix, tensor_name
from duquantpp_jax.ptq.fuse import moved_gain, split
from duquantpp_jax.ptq.plan import linear_shapes
from duquantpp_jax.ptq.site import PackedFloat, QuantizedSite
from duquantpp_jax.transforms.hadamard import hadamard

HADAMARD = "hadamard"
"""The group of all inputs that Hadamard matrices move."""

Tensors = dict[str, np.ndarray]


class Layer(NamedTuple):
    """A layer in another layout: its tensors by their whole names.

    Attributes:
      moved: For each group of transform_config the linears whose input it moves.
      floats: Linears that are not quantized.
    """

    tensors: Tensors
    moved: dict[str, list[str]]
    floats: list[str]


def check(model: Quantized, serve: Serve | None) -> None:
    """Raises ValueError if the layout, or the reader, has no such model or format."""
    job = model.job
    if serve is not None:
        check_formats(serve, job.weight_formats.values(), job.activation_formats.values())
    check_architecture(model.config)
    layout = layout_of(job.weight_formats.values())
    for name in job.activation_formats.values():
        if name.partition(":")[0] not in layout.activations:
            raise ValueError(
                f"{layout.name} with activations in {name} is not known to its readers: "
                f"use one of {', '.join(layout.activations)}"
            )


def check_architecture(config: DecoderConfig) -> None:
    """Raises ValueError for a mixture of experts."""
    if config.num_experts:
        raise ValueError(
            f"{PACKED} of a {config.architecture} is not written: its experts have "
            "transforms of their own; export --format dequantized, or gpt-oss for a gpt-oss"
        )


def pack_layer(
    config: DecoderConfig,
    number: int,
    parameters: Mapping[str, Any],
    sites: Mapping[str, QuantizedSite],
    serve: Serve | None = None,
) -> Layer:
    """A layer as mxfp4-pack-quantized has it.

    Raises:
      ValueError: What the layout, or the reader, cannot express; names the site.
    """
    prefix, shapes = layer_prefix(number), linear_shapes(config)
    reader = READERS[serve] if serve else ANY
    parameters, tensors = dict(parameters), {}
    moved: dict[str, list[str]] = {}
    floats = []
    for site in SITES:
        state, names = sites[site], SITE_WEIGHTS[site]
        width = shapes[names[0]][1]
        folding = split(config, site, state.transform, width)
        matrix = shared_matrix(folding.rest, -(-width // BLOCK) * BLOCK, f"{prefix}{site}")
        _check_site(f"{prefix}{site}", names, state, reader.fuses)
        if folding.moves and site not in input_norms(config):
            raise ValueError(
                f"{prefix}{site}: its smoothing has to be folded into the linear before it prior "
                f"to rounding, and {PACKED} has no online one: quantize again with --fuse"
            )
        for _, made in folding.moves:
            for name, channels in made.items():
                parameters[name] = np.asarray(moved_gain(config, parameters[name], channels))
        is_hadamard = matrix is not None and np.array_equal(matrix, hadamard(BLOCK))
        group = HADAMARD if is_hadamard else f"layer_{number}_{site}"
        for name, weight in zip(names, state.weights, strict=True):
            if not isinstance(weight, MXArray):
                if folding.moves:
                    raise ValueError(
                        f"{prefix}{name} is in float beside linears whose smoothing is folded into "
                        f"their norm, which {PACKED} cannot express: quantize again with --fuse"
                    )
                exact = weight.astype(jnp.bfloat16) if isinstance(weight, PackedFloat) else weight
                tensors[f"{prefix}{name}.weight"] = np.asarray(exact)
                floats.append(prefix + name)
                continue
            n, k = weight.shape
            if k != shapes[name][1]:
                raise ValueError(
                    f"{prefix}{name} was padded from {shapes[name][1]} to {k} inputs, which "
                    f"{PACKED} cannot express: export --format dequantized"
                )
            codes = pack_codes(np.asarray(weight.codes()), E2M1.bits)
            tensors[f"{prefix}{name}.weight_packed"] = codes.reshape(n, k // 2)
            tensors |= scale_tensors(prefix + name, weight, state)
            if matrix is None:
                continue
            if f"{name}.bias" in parameters and not reader.biases:
                raise ValueError(
                    f"{prefix}{name} has a bias, and {serve} moves no input of such a linear: "
                    "quantize with --recipe identity or smooth, or --exclude it"
                )
            moved.setdefault(group, []).append(prefix + name)
            if not is_hadamard:
                tensors[f"{prefix}{name}.{group}_input.weight"] = matrix * np.float32(BLOCK**0.5)
    named_rest = {prefix + tensor_name(name): np.asarray(a) for name, a in parameters.items()}
    return Layer(tensors | named_rest, moved, floats)


def check_activations(where: str, state: QuantizedSite, layout: str = PACKED) -> None:
    """Raises ValueError for what no reader can do with the activations of a site."""
    for part in ("clip", "scale_offset"):
        if getattr(state, part) is not None:
            raise ValueError(
                f"{where}: its activations have a {part} by block, which no reader of {layout} "
                "applies: quantize without it, or export --format dequantized"
            )


def _check_site(where: str, names: Sequence[str], state: QuantizedSite, fused: bool) -> None:
    """Raises ValueError for what no reader can do with a site, and for one half in float."""
    check_activations(where, state)
    quantized = [isinstance(weight, MXArray) for weight in state.weights]
    if fused and any(quantized) and not all(quantized):
        name = names[quantized.index(False)]
        raise ValueError(
            f"{where}: {name} is in float beside quantized linears of the same input, which vLLM "
            f"makes one linear: exclude all of {', '.join(names)}, or none "
            "(or export --serve transformers)"
        )


def shared_matrix(
    transform: Transform, width: int, where: str, layout: str = PACKED
) -> Float32[np.ndarray, "32 32"] | None:
    """The one matrix that moves all blocks of a site's input; None where nothing moves it.

    Raises:
      ValueError: Anything else moves it; one line that says what to use instead.
    """
    kinds = ", ".join(type(link).__name__ for link in transform.flat_links())
    if (blocks := transform.as_blocks(width, BLOCK)) is None:
        raise ValueError(
            f"{where}: its input is moved online by {kinds}, whose as_blocks gives no matrix for "
            f"each block of {BLOCK}: {layout} has nothing else; export --format dequantized"
        )
    if blocks.divisor is not None and np.any(np.asarray(blocks.divisor) != 1):
        raise ValueError(
            f"{where}: its input is divided online by {kinds}, which {layout} cannot express: "
            "quantize again with --fuse, which folds smoothing, or export --format dequantized"
        )
    if blocks.matrices is None:
        return None
    matrices = np.asarray(blocks.matrices, np.float32)
    if np.any(matrices != matrices[:1]):
        shared = "with :shared after the name of the recipe (which --serve does)"
        raise ValueError(
            f"{where}: its input is moved online by a matrix for each block, and {layout} holds "
            "one for all blocks of a site: quantize "
            f"{shared if layout == PACKED else 'with identity or block_hadamard'}, or export "
            "--format dequantized"
        )
    return matrices[0]


def scale_tensors(linear: str, weight: MXArray, state: QuantizedSite) -> Tensors:
    """The tensors of scales of a quantized linear."""
    if weight.tensor_scale is None:
        return {f"{linear}.weight_scale": np.asarray(weight.scale_bytes())}
    found = {f"{linear}.weight_scale": np.asarray(weight.scales)}
    whole = {".weight_global_scale": weight.tensor_scale, INPUT_SCALE: state.tensor_scale}
    return found | {
        linear + name: np.float32(1) / np.asarray(scale, np.float32).reshape(1)
        for name, scale in whole.items()
        if scale is not None
    }


_MXFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "group",
    "group_size": BLOCK,
    "symmetric": True,
    "scale_dtype": "torch.uint8",
    "zp_dtype": "torch.uint8",
}
_NVFP4 = {
    **_MXFP4,
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
    "zp_dtype": "torch.float8_e4m3fn",
}


class Layout(NamedTuple):
    """A layout of the library, by what it calls the formats of weights and of activations."""

    name: str
    weights: dict[str, Any]
    activations: dict[str, dict[str, Any] | None]


LAYOUTS = {
    "mxfp4": Layout(
        PACKED,
        {**_MXFP4, "dynamic": False},
        {
            "mxfp4": {**_MXFP4, "dynamic": True},
            "mxfp8": {**_MXFP4, "num_bits": 8, "dynamic": True},
            "bf16": None,
        },
    ),
    NVFP4: Layout(
        NVFP4_PACKED,
        {**_NVFP4, "dynamic": False},
        {NVFP4: {**_NVFP4, "dynamic": "local"}, "bf16": None},
    ),
}
"""By the format of weights."""


def layout_of(weights: Iterable[str]) -> Layout:
    """The layout of weights in formats of these names; ValueError if there is none."""
    names = sorted({name.partition(":")[0] for name in weights})
    if len(names) > 1:
        raise ValueError(
            f"one export has weights in one format: this model has {' and '.join(names)}"
        )
    if names[0] not in LAYOUTS:
        has = f"{PACKED} holds MXFP4 weights: this model has weights in {names[0]}"
        near = names[0].startswith("nvfp4")
        raise ValueError(f"{has} (of NVFP4 {NVFP4} is exported)" if near else has)
    return LAYOUTS[names[0]]


def quantization_config(
    model: Quantized, moved: Mapping[str, Sequence[str]], floats: Sequence[str]
) -> dict[str, Any]:
    """The entry of config.json that the library reads; `moved` and `floats` as in `Layer`, of all
    layers."""
    groups: dict[str, Any] = {}
    # The library has no names for scale rules: formats that differ in the rule alone are one group.
    formats = {site: name.partition(":")[0] for site, name in model.job.activation_formats.items()}
    layout = layout_of(model.job.weight_formats.values())
    for number, format in enumerate(dict.fromkeys(formats.values())):
        names = [n for site in SITES if formats[site] == format for n in SITE_WEIGHTS[site]]
        groups[f"group_{number}"] = {
            "targets": [f"re:.*{re.escape(name)}$" for name in names],
            "weights": layout.weights,
            "input_activations": layout.activations[format],
            "output_activations": None,
            "format": layout.name,
        }
    return {
        "quant_method": COMPRESSED,
        "format": layout.name,
        "quantization_status": STATUS if moved else "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *floats],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {"config_groups": transform_groups(moved)} if moved else {},
    }


def transform_groups(moved: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The groups of a transform_config."""
    return {
        name: {
            "type": "hadamard" if name == HADAMARD else "random-hadamard",
            "apply": [{"targets": [*targets], "location": "input", "inverse": False, "ignore": []}],
            "head_dim": BLOCK,
            "randomize": False,
            "requires_grad": False,
        }
        for name, targets in moved.items()
    }
