"""What a quantized model holds: what was done to it, its scales and codes, and its SQNR."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from duquantpp_jax.checkpoints import Quantized
from duquantpp_jax.core import MXArray
from duquantpp_jax.models import SITES, linear_names

CODES = 1 << 20
"""Most codes of a linear that are counted: every so many-th block of a larger one."""

Held = tuple[UInt8[np.ndarray, " blocks"], UInt8[np.ndarray, " elements"]]
"""Scale bytes and codes."""


def contents(quantized: Quantized, held: Held | None) -> dict[str, Any]:
    """What the directory says of itself, the bytes of its linears, and how many of the blocks of
    `held` have which exponent E of their scale 2^E, and of its elements which code."""
    linears = _report(quantized)
    job = dataclasses.asdict(quantized.job)
    names = ("recipe", "rounding", "weight_formats", "activation_formats")
    return {
        **{name: job[name] for name in names},
        "bytes": sum(one["bytes"] for one in linears),
        "scale_exponents": None if held is None else _exponents(held[0]),
        "codes": None if held is None else np.bincount(held[1], minlength=16).tolist(),
        "linears": linears,
    }


def _exponents(scales: UInt8[np.ndarray, " blocks"]) -> dict[str, int]:
    values, counts = np.unique(scales, return_counts=True)
    return {str(int(byte) - 127): int(count) for byte, count in zip(values, counts, strict=True)}


def held(quantized: Quantized) -> Held | None:
    """Scale bytes and codes of the weights in MXFP4, of large ones every so many-th block."""
    scales, codes = [], []
    for number in range(quantized.config.num_hidden_layers):
        for site in quantized.layer(number)[1].values():
            for weight in site.weights:
                if not isinstance(weight, MXArray) or weight.element.name != "e2m1":
                    continue
                if weight.scales.dtype != jnp.float8_e8m0fnu:
                    continue
                every = -(-weight.codes().size // CODES)
                scales.append(np.asarray(weight.scale_bytes()).ravel()[::every])
                blocks = np.asarray(weight.codes()).reshape(-1, weight.block_size)
                codes.append(blocks[::every].ravel())
    return (np.concatenate(scales), np.concatenate(codes)) if scales else None


def sqnr(quantized: Quantized) -> dict[str, Float[np.ndarray, "layers linears"]] | None:
    """Site -> dB of every linear, if every linear has one."""
    known = {one["linear"]: one["sqnr_db"] for one in _report(quantized)}
    layers = range(quantized.config.num_hidden_layers)
    names = {site: [linear_names(site, n) for n in layers] for site in SITES}
    if any(known.get(name) is None for rows in names.values() for row in rows for name in row):
        return None
    return {
        site: np.array([[known[n] for n in row] for row in rows]) for site, rows in names.items()
    }


def _report(quantized: Quantized) -> list[dict[str, Any]]:
    layers = range(quantized.config.num_hidden_layers)
    return [one for number in layers for one in quantized.report(number)]
