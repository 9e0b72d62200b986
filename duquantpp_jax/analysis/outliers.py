"""Statistics of outliers in the input of a linear, and of their effect on its blocks.

For an input x [tokens, k], over all tokens, with a_c = max_t |x_tc| the maximum of channel c:

    max / median        max_c a_c / median_c a_c
    outlier channels    number of channels with a_c > ratio * median_c a_c
    kurtosis            mean x^4 / (mean x^2)^2; 3 for Gaussian numbers
    top energy          share of sum x^2 in the strongest `share` of the channels
    set by one          share of blocks whose scale is set by one element: without the largest
                        element, 2^floor(log2 amax) would be at least 2^drop times smaller
    position            the position of a row with the largest |x|, and its ratio to the median one

An outlier is defined only together with the thresholds (ratio, share, drop), so results hold them.
Sums over batches are in float64, so only the order of additions depends on the batches.

Source: max / median and positions after Sun et al., Massive Activations, arXiv 2402.17762.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from duquantpp_jax.core import Fitted, Stats
from duquantpp_jax.formats.division import magnitude_bits, split
from duquantpp_jax.models import linear_names
from duquantpp_jax.models.parameters import expert_name


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """The thresholds of the statistics at the top of this file; `share` is at least one channel."""

    block_size: int = 32
    ratio: float = 10.0
    share: float = 0.01
    drop: int = 1

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"a block of {self.block_size} elements: give at least 1")
        if not self.ratio > 0:
            raise ValueError(f"a ratio of {self.ratio} to the median: give a positive one")
        if not 0 < self.share <= 1:
            raise ValueError(f"a share of {self.share} of the channels: give one in (0, 1]")
        if self.drop < 1:
            raise ValueError(f"a drop by 2^{self.drop}: give at least 1")


class Moments(NamedTuple):
    """Sums and maxima over tokens, a fold; every field may have leading layer axes.

    Attributes:
      absmax: Largest magnitude of each channel.
      energy: Sum of (x / unit)^2 over tokens, of each channel.
      fourths: Sum of (x / unit)^4 over tokens and channels.
      unit: Of one batch, in float32, its largest magnitude (1 if it is zero); otherwise 1.
      position_max: Largest magnitude at each position of the rows.
      blocks: Number of blocks that are not zero.
      set_by_one: Number of these whose scale is set by one element.
    """

    tokens: Shaped[Array | np.ndarray, "*layers"]
    absmax: Float[Array | np.ndarray, "*layers k"]
    energy: Float[Array | np.ndarray, "*layers k"]
    fourths: Float[Array | np.ndarray, "*layers"]
    unit: Float[Array | np.ndarray, "*layers"]
    position_max: Float[Array | np.ndarray, "*layers length"]
    blocks: Shaped[Array | np.ndarray, "*layers"]
    set_by_one: Shaped[Array | np.ndarray, "*layers"]

    def in_float64(self) -> "Moments":
        """The same in NumPy, with a unit of 1."""
        fields = {name: np.asarray(x, np.float64) for name, x in self._asdict().items()}
        unit = fields["unit"]
        fields["energy"] = fields["energy"] * np.square(unit)[..., None]
        fields["fourths"] = fields["fourths"] * unit**4
        return Moments(**fields | {"unit": np.ones_like(unit)})

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets of tokens, in float64; their rows have the same length."""
        summed = ("tokens", "energy", "fourths", "blocks", "set_by_one")
        return self._replace(
            **{name: getattr(self, name) + getattr(other, name) for name in summed},
            absmax=np.maximum(self.absmax, other.absmax),
            position_max=np.maximum(self.position_max, other.position_max),
        )

    def layer(self, number: int) -> "Moments":
        """The moments of one layer."""
        return Moments(*(field[number] for field in self))


def observe(x: Float[Array, "rows length k"], thresholds: Thresholds) -> Moments:
    """Sums and maxima of a batch; zeros fill up an incomplete last block."""
    x = x.astype(jnp.float32)
    magnitudes = jnp.abs(x)
    absmax = jnp.max(magnitudes, axis=(0, 1))
    largest = jnp.max(absmax)
    unit = jnp.where(largest > 0, largest, 1.0)
    squares = jnp.square(x / unit)
    missing = -x.shape[-1] % thresholds.block_size
    bits = jnp.pad(magnitude_bits(x), ((0, 0), (0, 0), (0, missing)))  # CPUs flush subnormals
    bits = bits.reshape(*x.shape[:2], -1, thresholds.block_size)
    first = jnp.max(bits, axis=-1)
    at_first = bits == first[..., None]
    rest = jnp.max(jnp.where(at_first, 0, bits), axis=-1)
    second = jnp.where(jnp.sum(at_first, axis=-1) > 1, first, rest)
    fall = split(first)[0] - split(second)[0]  # zero counts as below all others
    alive = first > 0
    return Moments(
        tokens=jnp.int32(x.shape[0] * x.shape[1]),
        absmax=absmax,
        energy=jnp.sum(squares, axis=(0, 1)),
        fourths=jnp.sum(jnp.square(squares)),
        unit=unit,
        position_max=jnp.max(magnitudes, axis=(0, 2)),
        blocks=jnp.sum(alive),
        set_by_one=jnp.sum(alive & (fall >= thresholds.drop)),
    )


def statistics(moments: Moments, thresholds: Thresholds) -> dict[str, Any]:
    """The statistics at the top of this file, of one input; a ratio to zero is None.

    Raises:
      ValueError: The input had NaN or Inf.
    """
    if wrong := np.count_nonzero(~np.isfinite(moments.absmax)):
        raise ValueError(
            f"the input has NaN or Inf in {wrong} of {moments.absmax.size} channels: the model "
            "cannot be inspected"
        )
    values = moments.tokens * moments.absmax.size
    energy = float(np.sum(moments.energy))
    top = max(1, round(thresholds.share * moments.absmax.size))
    largest, median = float(np.max(moments.absmax)), float(np.median(moments.absmax))
    at = moments.position_max
    return {
        "largest": largest,
        "largest_channel": int(np.argmax(moments.absmax)),
        "max_over_median": _over(largest, median),
        "outlier_channels": int(np.sum(moments.absmax > thresholds.ratio * median)),
        "kurtosis": _over(float(moments.fourths * values), energy**2),
        "top_energy": _over(float(np.sum(np.sort(moments.energy)[-top:])), energy),
        "set_by_one": _over(float(moments.set_by_one), float(moments.blocks)),
        "position": int(np.argmax(at)),
        "position_over_median": _over(float(np.max(at)), float(np.median(at))),
    }


def moved_maxima(
    stats: Mapping[str, Stats], fits: Mapping[str, Fitted]
) -> tuple[str, Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Name of the input with the largest max / median, its channel maxima and those after the fit.

    Maxima are over the calibration sample.
    """
    least = np.finfo(np.float32).tiny
    ratio = {
        (site, place): float(np.max(maxima) / max(np.median(maxima), least))
        for site, kept in stats.items()
        for place in np.ndindex(kept.count.shape)  # layer, and expert where there are experts
        for maxima in [np.asarray(kept.absmax)[place]]
    }
    site, place = max(ratio, key=lambda key: ratio[key])
    sample = stats[site].sample[place]
    moved = jax.tree.map(lambda leaf: leaf[place], fits[site].transform).activations(sample)
    before, after = (np.asarray(jnp.max(jnp.abs(x), axis=0)) for x in (sample, moved))
    name = linear_names(site, place[0])[0]
    return f"{expert_name(name, *place[1:]) if place[1:] else name} input", before, after


def _over(a: float, b: float) -> float | None:
    return a / b if b > 0 else None
