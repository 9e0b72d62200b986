"""What a quantization would cost, from shapes alone, and one measured matrix product.

Sizes are exact but for transforms, which are taken in the form that all block transforms share.
Memory is what the device has at most, be it while a layer runs or while a site is rounded, and
what the host has, where the hidden states of all rows are.
Time counts the matrix products: each calibration pass 2 parameters a token, each Gram matrix
2 k^2 a token, GPTQ about 2 k^3 + 6 n k^2 for weights [n, k]; fits and files come on top.
"""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from duquantpp_jax.core import Format, Needs
from duquantpp_jax.models import DecoderConfig
from duquantpp_jax.models.attention import HIGHEST
from duquantpp_jax.models.parameters import (
    LAYER,
    SITE_WEIGHTS,
    experts,
    layer_prefix,
    parameter_shapes,
)
from duquantpp_jax.ptq.calibration import BATCH_ROWS, SAMPLE_LIMIT
from duquantpp_jax.ptq.plan import Plan, linear_shapes
from duquantpp_jax.ptq.report import storage_bytes

RUNTIME = 2**29
"""Bytes of a Python process that has imported JAX and compiled a few programs, roughly."""


def estimate(plan: Plan, rows: int, length: int, stored: float = 2.0) -> dict[str, Any]:
    """Bytes of every linear, and roughly the memory and the seconds that the job takes.

    Args:
      rows, length: Of the calibration.
      stored: Bytes of a parameter as the checkpoint is read.
    """
    shapes, config = linear_shapes(plan.config), plan.config
    linears, stats_bytes, largest = [], 0.0, 0
    tokens, layers = rows * length, config.num_hidden_layers
    copies = {name: max(1, experts(config, s)) for s, ns in SITE_WEIGHTS.items() for name in ns}
    parameters = sum(n * k * copies[name] for name, (n, k) in shapes.items())
    used = {name: config.num_experts_per_tok if c > 1 else 1 for name, c in copies.items()}
    active = sum(n * k * used[name] for name, (n, k) in shapes.items())
    flops = layers * plan.passes * 2.0 * tokens * active
    for number in range(layers):
        layer_stats = 0.0
        for site, width in plan.widths(number).items():
            recipe, names = plan.recipes[site], plan.names(site, number)
            outputs, twice = sum(shapes[name][0] for name in names), bool(recipe.rounding.needs)
            count = copies[names[0]]
            linears += [
                {
                    "linear": layer_prefix(number) + name,
                    "bytes": count * packed_bytes(recipe.weight_format, shapes[name][0], width),
                    "parameters": count * math.prod(shapes[name]),
                }
                for name in names
            ]
            # The transform of the site.
            moves = 4 * width + 8 * width * recipe.activation_format.block_size
            linears[-1]["bytes"] += count * moves
            grams = (Needs.GRAM in recipe.needs) + twice
            flops += count * grams * 2.0 * tokens * width**2
            flops += count * (2.0 * width**3 + 6.0 * outputs * width**2) * twice
            kept = min(-(-tokens * used[names[0]] // count), SAMPLE_LIMIT)
            layer_stats += 4.0 * count * (kept * width + grams * width**2)
            # Of a linear in float32 before and after moving, and codes; of a stack once more.
            largest = max(largest, (14 + 5 * count * (count > 1)) * outputs * width)
        stats_bytes = max(stats_bytes, layer_stats)
    hidden = 4.0 * tokens * config.hidden_size * (1 + plan.compares)
    embedding = float(stored * config.vocab_size * config.hidden_size)
    layer = float(stored * parameters)
    running = running_bytes(config, BATCH_ROWS, length, stored)
    # While a layer is made, the hidden states before it are written and the next layer is read.
    return {
        "linears": linears,
        "bytes": sum(linear["bytes"] for linear in linears),
        "float_bytes": sum(2 * linear["parameters"] for linear in linears),
        "layers": layers,
        "device_bytes": layer + stats_bytes + max(running, largest),
        "host_bytes": RUNTIME + hidden + max(hidden + 2 * layer, 2 * embedding),
        "seconds": flops / flops_per_second(),
    }


def running_bytes(config: DecoderConfig, rows: int, length: int, stored: float) -> float:
    """Of a float layer that runs, without its parameters as they are stored: the same in float32,
    and three arrays of the size of attention's scores and of the activations of the MLP."""
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(config).items()}
    parameters = sum(sizes[n] for n in sizes if n.startswith(LAYER)) / config.num_hidden_layers
    scores = rows * config.num_attention_heads * length**2
    chosen = max(1, config.num_experts_per_tok)
    activations = rows * length * config.intermediate_size * chosen
    return 4.0 * ((stored < 4) * parameters + 3 * (scores + activations))


def packed_bytes(format: Format, n: int, k: int) -> int:
    """Bytes of weights [n, k] as they are stored: those of a block, for every block."""
    of_block, of_tensor = block_bytes(format)
    return n * k // format.block_size * of_block + of_tensor


def block_bytes(format: Format) -> tuple[int, int]:
    """Bytes of a block of weights as it is stored, and those of its tensor; nothing is computed."""
    found = []

    def measure(x: Array) -> None:
        block = format.encode(x)
        of_tensor = 4 * (block.tensor_scale is not None)
        found.append((storage_bytes(block) - of_tensor, of_tensor))

    jax.eval_shape(measure, jax.ShapeDtypeStruct((1, format.block_size), jnp.float32))
    return found[0]


def flops_per_second() -> float:
    """Of a product of two float32 matrices of side 2048 on this device, at highest precision."""
    x = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=HIGHEST))
    jax.block_until_ready(product(x, x))
    start = time.perf_counter()
    for _ in range(3):
        x = product(x, x * np.float32(1e-4))
    jax.block_until_ready(x)
    return 3 * 2 * 2048.0**3 / (time.perf_counter() - start)
