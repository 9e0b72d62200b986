"""Contents of a quantized directory: its job, its scales and codes, and the SQNR of its linears."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from duquantpp_jax.checkpoints import Quantized
from duquantpp_jax.core import MXArray
from duquantpp_jax.models import SITES, linear_names
from duquantpp_jax.models.parameters import expert_name, experts

MOST_CODES = 1 << 20
"""Most codes of a linear that are counted; of a larger one only every n-th block is."""

Stored = tuple[UInt8[np.ndarray, " blocks"], UInt8[np.ndarray, " elements"]]
"""Scale bytes and codes."""


def contents(quantized: Quantized, stored: Stored | None) -> dict[str, Any]:
    """The job, the bytes of the linears, and the counts of stored scale exponents and codes."""
    exponents = codes = None
    if stored is not None:
        values, counts = np.unique(stored[0], return_counts=True)
        exponents = {str(int(byte) - 127): int(n) for byte, n in zip(values, counts, strict=True)}
        codes = np.bincount(stored[1], minlength=16).tolist()
    linears = quantized.report()
    names = ("recipe", "rounding", "weight_formats", "activation_formats")
    return {name: getattr(quantized.job, name) for name in names} | {
        "bytes": sum(linear["bytes"] for linear in linears),
        "scale_exponents": exponents,
        "codes": codes,
        "linears": linears,
    }


def scales_and_codes(quantized: Quantized) -> Stored | None:
    """Scale bytes and codes of the MXFP4 weights; of large weights only every n-th block."""
    scales, codes = [], []
    for number in range(quantized.config.num_hidden_layers):
        for site in quantized.layer(number)[1].values():
            for weight in site.weights:
                if not isinstance(weight, MXArray) or weight.element.name != "e2m1":
                    continue
                if weight.scales.dtype != jnp.float8_e8m0fnu:
                    continue
                blocks = np.asarray(weight.codes()).reshape(-1, weight.block_size)
                every = -(-blocks.size // MOST_CODES)
                scales.append(np.asarray(weight.scale_bytes()).ravel()[::every])
                codes.append(blocks[::every].ravel())
    return (np.concatenate(scales), np.concatenate(codes)) if scales else None


def sqnr(quantized: Quantized) -> dict[str, Float[np.ndarray, "layers linears"]] | None:
    """Site -> SQNR in dB of its linears, those of all experts; None if a linear has none."""
    known = {linear["linear"]: linear["sqnr_db"] for linear in quantized.report()}

    def names(site: str, layer: int) -> list[str]:
        own, count = linear_names(site, layer), experts(quantized.config, site)
        return [expert_name(name, e) for name in own for e in range(count)] or [*own]

    layers = range(quantized.config.num_hidden_layers)
    found = {site: [[known.get(n) for n in names(site, i)] for i in layers] for site in SITES}
    arrays = {site: np.array(rows, np.float64) for site, rows in found.items()}  # None becomes NaN
    return None if any(np.isnan(array).any() for array in arrays.values()) else arrays
