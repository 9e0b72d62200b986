"""Rotary frequencies and how long-context checkpoints rescale them.

At position p, pair i of a head of width d rotates by the angle p w_i, w_i = theta^(-2i/d); its
wavelength is 2 pi / w_i. A model trained on L positions is extended by a factor s:

    linear   w_i / s
    llama3   w_i where the wavelength is below L / high,  w_i / s where it is above L / low,
             and between them  (1 - t) w_i / s + t w_i,   t = (L / wavelength - low) / (high - low)
    yarn     (1 - t_i) w_i / s + t_i w_i, where t_i is linear in i, from 1 at the pair that turns
             beta_fast times in L positions to 0 at the pair that turns beta_slow times; q and k
             are both multiplied by .1 ln(s) + 1

Source: RoFormer (arXiv:2104.09864); Chen et al., Position Interpolation (arXiv:2306.15595); the
Llama 3.1 model card's `rope_scaling`; Peng et al., YaRN (arXiv:2309.00071), sections 3.2 and 3.4.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from duquantpp_jax.models import fields as read

Frequencies = Float64[np.ndarray, " pairs"]


@dataclasses.dataclass(frozen=True)
class Scaling(abc.ABC):
    """How rotary frequencies are rescaled, by `factor` s."""

    factor: float

    @abc.abstractmethod
    def rescale(self, frequencies: Frequencies, theta: float) -> Frequencies:
        """The rescaled w_i; see the equations at the top of the file."""

    def magnitude(self) -> float:
        """Factor on q and on k."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class LinearScaling(Scaling):
    """Divides all frequencies."""

    def rescale(self, frequencies: Frequencies, theta: float) -> Frequencies:
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3(Scaling):
    """Divides low frequencies, keeps high ones, and interpolates in 1 / wavelength between."""

    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def rescale(self, frequencies: Frequencies, theta: float) -> Frequencies:
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return _mixed(frequencies, self.factor, np.clip(kept, 0, 1))


@dataclasses.dataclass(frozen=True)
class Yarn(Scaling):
    """Divides low frequencies, keeps high ones, and interpolates over pairs between.

    Attributes:
      attention_factor: Factor on q and on k; None for .1 ln(factor) + 1.
      beta_fast, beta_slow: Turns within the original length at the ends of the ramp.
      truncate: Whether the ends are moved outwards to whole pairs.
    """

    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def rescale(self, frequencies: Frequencies, theta: float) -> Frequencies:
        pairs = len(frequencies)

        def pair_that_turns(times: float) -> float:  # L w_i = 2 pi times, solved for i
            length = self.original_max_position_embeddings
            return pairs * math.log(length / (2 * math.pi * times)) / math.log(theta)

        first, last = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        ramp = (np.arange(pairs) - first) / max(last - first, 1e-3)
        return _mixed(frequencies, self.factor, 1 - np.clip(ramp, 0, 1))

    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(max(self.factor, 1)) + 1


KINDS: Mapping[str, type[Scaling]] = {"linear": LinearScaling, "llama3": Llama3, "yarn": Yarn}
_READERS: Mapping[Any, Any] = {int: read.integer, bool: read.boolean}


def _mixed(frequencies: Frequencies, factor: float, kept: Frequencies) -> Frequencies:
    return frequencies * ((1 - kept) / factor + kept)


def rotary_frequencies(
    theta: float, head_dim: int, scaling: Scaling | None
) -> Float32[np.ndarray, " pairs"]:
    """w_i of every pair, rescaled."""
    half = head_dim // 2
    frequencies = theta ** (-np.arange(half) / half)
    rescaled = frequencies if scaling is None else scaling.rescale(frequencies, theta)
    return rescaled.astype(np.float32)


def read_scaling(fields: Mapping[str, Any], max_positions: int) -> Scaling | None:
    """The scaling that `rope_scaling` of a config.json in the layout of transformers 4 describes.

    Args:
      max_positions: The original length where the scaling does not give it.

    Raises:
      ValueError: The scaling is unknown, or a field of it is missing, unknown or out of range.
    """
    given = fields.get("rope_scaling")
    if given is None:
        return None
    name = given.get("rope_type", given.get("type")) if isinstance(given, dict) else given
    if not (isinstance(given, dict) and isinstance(name, str) and name in KINDS):
        raise ValueError(
            f"config.json: rope_scaling {read.short(name)} is not supported: "
            f"it must be null or of type {', '.join(KINDS)}"
        )
    kind = KINDS[name]
    known = {field.name: field for field in dataclasses.fields(kind)}
    skipped = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    for extra, value in given.items():
        if extra not in known and extra not in skipped and value is not None:
            raise ValueError(
                f"config.json: {extra} = {read.short(value)} is not supported in rope_scaling of "
                f"type {name}: it may have {', '.join(known)}"
            )
    length = "original_max_position_embeddings"  # transformers prefers the one outside
    given = {length: max_positions} | given
    given |= {} if fields.get(length) is None else {length: fields[length]}
    values = {
        name: _READERS.get(field.type, read.positive)(given, name)
        for name, field in known.items()
        if given.get(name) is not None or field.default is dataclasses.MISSING
    }
    scaling = kind(**values)
    if isinstance(scaling, Llama3) and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ValueError(
            f"config.json: low_freq_factor {scaling.low_freq_factor} is not below "
            f"high_freq_factor {scaling.high_freq_factor}: rope_scaling needs them in this order"
        )
    return scaling


def write_scaling(scaling: Scaling | None) -> dict[str, Any] | None:
    """The `rope_scaling` of a config.json, from which `read_scaling` makes this scaling."""
    if scaling is None:
        return None
    name = next(name for name, kind in KINDS.items() if type(scaling) is kind)
    return {"rope_type": name} | {n: v for n, v in vars(scaling).items() if v is not None}
