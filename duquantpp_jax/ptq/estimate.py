"""What a quantization would cost, from shapes alone, and one measured matrix product.

Sizes are exact but for transforms, which are taken in the form that all block transforms share.
Time counts the matrix products: each calibration pass 2 parameters a token, each Gram matrix
2 k^2 a token, GPTQ about 2 k^3 + 6 n k^2 for weights [n, k]; fits and files come on top.
"""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duquantpp_jax.core import Format, Needs
from duquantpp_jax.models.attention import HIGHEST
from duquantpp_jax.models.parameters import SITE_WEIGHTS, experts, layer_prefix
from duquantpp_jax.ptq.calibration import BATCH_ROWS, SAMPLE_LIMIT
from duquantpp_jax.ptq.plan import Plan, linear_shapes
from duquantpp_jax.ptq.report import storage_bytes

RUNTIME = 2**29
"""Bytes of a Python process that has imported JAX and compiled a few programs, roughly."""


def estimate(plan: Plan, rows: int, length: int) -> dict[str, Any]:
    """Bytes of every linear, and roughly the memory and the seconds that the job takes."""
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
    scores = 4.0 * BATCH_ROWS * config.num_attention_heads * length**2
    chosen = max(1, config.num_experts_per_tok)
    activations = 4.0 * BATCH_ROWS * length * config.intermediate_size * chosen
    embedding = 2.0 * config.vocab_size * config.hidden_size
    # A layer in bf16, read and on the device, and what its largest site takes.
    working = 4.0 * parameters + largest + stats_bytes + 3 * (scores + activations)
    return {
        "linears": linears,
        "bytes": sum(linear["bytes"] for linear in linears),
        "float_bytes": sum(2 * linear["parameters"] for linear in linears),
        "layers": layers,
        "memory_bytes": RUNTIME + hidden + max(working, 2 * embedding),
        "seconds": flops / flops_per_second(),
    }


def packed_bytes(format: Format, n: int, k: int) -> int:
    """Bytes of weights [n, k] as they are stored: those of a block, for every block."""
    block = format.encode(jnp.zeros((1, format.block_size), jnp.float32))
    of_tensor = 4 * (block.tensor_scale is not None)
    return n * k // format.block_size * (storage_bytes(block) - of_tensor) + of_tensor


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
