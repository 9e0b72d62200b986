"""The noun Recipe: a whole method, and what its fit gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key

from duquantpp_jax.core.arrays import Format, MXArray
from duquantpp_jax.core.stats import Needs, Stats
from duquantpp_jax.core.transform import Transform

Weights = tuple[Float[Array, "*layers _ k"], ...]
"""The weights of the linears that share one input, each [out, in]; maybe stacked over layers.

All that belongs to a site may be stacked so: a leading axis of layers on every array."""

RandomKey = Key[Array, ""]
"""Of `jax.random`; randomness enters a fit through nothing else."""


@struct.dataclass
class Fitted:
    """What a fit gives: the transform of the input and the weights, and whatever else it moved.

    Attributes:
      weights: In place of the given ones, before the transform moves them.
      clip, scale_offset: As in `Format.quantize`, for the activations.
    """

    transform: Transform
    weights: Weights | None = None
    clip: Float[Array, "*layers blocks"] | None = None
    scale_offset: Int[Array, "*layers blocks"] | None = None

    def then(self, other: Fitted) -> Fitted:
        """This fit followed by another, made for the weights and the input as this one moved them.

        Transforms chain. Weights of the later fit replace those of the earlier: they are moved
        back by the earlier transform, for `weights` are those before any transform. Both fits are
        of one layer, not stacked.

        Raises:
          ValueError: This fit holds a clip or a scale offset, which belong to blocks of channels,
            and the later transform mixes channels.
        """
        for name, value in {"clip": self.clip, "scale_offset": self.scale_offset}.items():
            if value is not None and not other.transform.keeps_channels:
                raise ValueError(
                    f"the {name} of an earlier fit belongs to its blocks of channels, which "
                    f"{type(other.transform).__name__} mixes: fit the {name} last"
                )
        back = self.transform.inverse()
        return Fitted(
            self.transform.then(other.transform),
            self.weights if other.weights is None else tuple(map(back.weights, other.weights)),
            self.clip if other.clip is None else other.clip,
            self.scale_offset if other.scale_offset is None else other.scale_offset,
        )


@runtime_checkable
class Fit(Protocol):
    """How the transform of a site is made.

    A fit that draws random numbers, so that another key gives another transform, says so in an
    attribute `draws`. A fit that fits each block of channels by itself may have a method `shared`,
    which gives the same fit with a single matrix for all blocks of a site.
    """

    @property
    def needs(self) -> Needs:
        """What the fit reads besides the token sample and the channel maxima."""
        ...

    def __call__(self, weights: Weights, stats: Stats, recipe: Recipe, key: RandomKey, /) -> Fitted:
        """The fit of one site of one layer, from the Stats of its input."""
        ...


def shared(fit: Fit) -> Fit:
    """The fit with a single matrix for all blocks of a site, which is what serving programs hold.

    A fit without a method `shared` comes back as it is: it fits no block by itself.

    >>> from duquantpp_jax.transforms import FitHadamard
    >>> shared(FitHadamard(random_signs=True)).sharing
    'shared'
    """
    return getattr(fit, "shared", lambda: fit)()


@runtime_checkable
class Rounding(Protocol):
    """How a moved weight becomes numbers of its format."""

    @property
    def needs(self) -> Needs:
        """What the rounding reads of the Stats of the moved and quantized input."""
        ...

    def __call__(self, w: Float[Array, "n k"], format: Format, stats: Stats, /) -> MXArray:
        """The moved weight, rounded.

        Args:
          stats: Of the moved input; of the moved and quantized input for a rounding with needs.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole method: how the transform is fitted, how weights are rounded, and into what."""

    fit: Fit
    rounding: Rounding
    weight_format: Format
    activation_format: Format

    def __post_init__(self) -> None:
        if not self.weight_format.holds_weights:
            raise ValueError(
                f"{type(self.weight_format).__name__} stores no weights: it is for activations "
                "only (W4A16)"
            )

    @property
    def needs(self) -> Needs:
        """What the fit reads besides the token sample and the channel maxima."""
        return self.fit.needs

    @property
    def draws(self) -> bool:
        """Whether the fit draws random numbers; a fit that does not say so does not."""
        return getattr(self.fit, "draws", False)


def stack(weights: Sequence[Float[Array, "_ k"]]) -> Float[Array, "n k"]:
    """Weights that share an input as one matrix, output rows one below the other.

    >>> import jax.numpy as jnp
    >>> stack([jnp.ones((8, 64)), jnp.zeros((4, 64))]).shape
    (12, 64)
    """
    return jnp.concatenate(list(weights), axis=0)
