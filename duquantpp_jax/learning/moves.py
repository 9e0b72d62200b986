"""What learns at a site, and the `linear` of a model that learns.

    y = Q(x T) @ Q(clamp(W'))^T

    weights = "fixed"    W' = W T^-T
    weights = "given"    W' = (W + D) T^-T, D learned: a moving T rounds every weight anew
    weights = "moved"    W' = W T0^-T + D, D learned in the moved space: T moves the input alone

Q rounds in the forward pass and lets gradients through (straight_through.py). Clips are learned as
logarithms, one for each block of channels or one for the site. That of the activations is the
format's: larger numbers saturate. That of the weights clamps each row's part of a block to the clip
times its largest magnitude, so that any rounding may follow.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Key

from duquantpp_jax.core import Fitted, Format, MXArray, Transform, Weights
from duquantpp_jax.learning.straight_through import integer, learnable_quantize, product
from duquantpp_jax.learning.training import Objective, Rows, Trained, train
from duquantpp_jax.transforms.block import BlockAffine
from duquantpp_jax.transforms.learned import (
    PARAMETRIZATIONS,
    Parametrization,
    check_condition,
    settled,
)


@struct.dataclass
class Learned:
    """The parameters of one site, None where that does not learn; all zeros at the start.

    Attributes:
      transform: By the names of its parametrisation.
      weights: Added to each weight.
      log_scale: Added to the log2 of each activation block's scale.
      log_clip, log_weight_clip: Logarithms of the clips.
    """

    transform: dict[str, Float[Array, "*layers blocks r r"]] | None
    weights: Weights | None
    log_scale: Float[Array, "*layers blocks"] | None
    log_clip: Float[Array, "*layers clips"] | None
    log_weight_clip: Float[Array, "*layers weight_clips"] | None


PARTS = tuple(field.name for field in dataclasses.fields(Learned))
"""What may learn at a rate of its own."""


@dataclasses.dataclass(frozen=True)
class Moves:
    """What learns.

    Attributes:
      transform: How the transform is parametrised; None keeps its start.
      weights: See the top of this file.
      scale_offset: Whether powers of two for the activations' scales are learned.
      clip, weight_clip: Whether clips are learned, and what shares one.
      through_amax: As in `learnable_quantize`, for activations and weights (and always for those
        that are clipped).
      max_condition: Bound on the condition number of each block's matrix, kept at every check.
    """

    transform: Parametrization | None
    weights: Literal["fixed", "given", "moved"] = "fixed"
    scale_offset: bool = False
    clip: Literal["site", "block"] | None = None
    weight_clip: Literal["site", "block"] | None = None
    through_amax: bool = False
    max_condition: float | None = None

    def init(self, start: BlockAffine, weights: Weights) -> Learned:
        """The parameters at the start, of one site or of all layers stacked.

        Raises:
          ValueError: The start is beyond `max_condition`.
        """
        if self.max_condition is not None:
            check_condition(start, self.max_condition)
        blocks = start.matrices.shape[:-2]

        def zeros(per: str | None) -> Array | None:
            shape = {None: None, "site": (*blocks[:-1], 1), "block": blocks}[per]
            return None if shape is None else jnp.zeros(shape, jnp.float32)

        return Learned(
            self.transform.init(start) if self.transform else None,
            None if self.weights == "fixed" else tuple(map(jnp.zeros_like, _widened(weights))),
            zeros("block" if self.scale_offset else None),
            zeros(self.clip),
            zeros(self.weight_clip),
        )

    def bounded(self, start: BlockAffine, learned: Learned) -> Learned:
        """Brought within `max_condition`."""
        if self.max_condition is None or self.transform is None or learned.transform is None:
            return learned
        parameters = self.transform.bounded(start, learned.transform, self.max_condition)
        return dataclasses.replace(learned, transform=parameters)

    def fitted(self, start: BlockAffine, learned: Learned, weights: Weights) -> Fitted:
        """What has been learned, as a fit gives it; of one site or of all layers stacked."""
        transform = settled(self.moved_transform(start, learned), self.transform)

        def back(start: BlockAffine, t: Transform, learned: Learned, ws: Weights) -> Weights:
            ws = _widened(ws)
            if self.weights == "given" and self.weight_clip is None:
                return _plus(ws, learned.weights)
            moved = self.moved_weights(start, t, learned, ws)
            return tuple(t.inverse().weights(w) for w in moved)

        blocks, clip = start.matrices.shape[:-2], learned.log_clip
        if len(blocks) == 2:
            back = jax.vmap(back)
        still = self.weights == "fixed" and self.weight_clip is None
        return Fitted(
            transform,
            None if still else back(start, transform, learned, weights),
            None if clip is None else jnp.broadcast_to(jnp.exp(clip), blocks),
            None if learned.log_scale is None else integer(learned.log_scale),
        )

    def moved_transform(self, start: BlockAffine, learned: Learned) -> BlockAffine:
        """T."""
        if self.transform is None or learned.transform is None:
            return start
        return self.transform.transform(start, learned.transform)

    def moved_weights(
        self, start: BlockAffine, transform: Transform, learned: Learned, weights: Weights
    ) -> Weights:
        """clamp(W')."""
        match self.weights:
            case "fixed":
                moved = tuple(transform.weights(w) for w in weights)
            case "given":
                moved = tuple(transform.weights(w) for w in _plus(weights, learned.weights))
            case "moved":
                moved = _plus(tuple(start.weights(w) for w in weights), learned.weights)
        if learned.log_weight_clip is None:
            return moved
        size = start.matrices.shape[-1]
        return tuple(_clamped(w, jnp.exp(learned.log_weight_clip), size) for w in moved)


PRESETS: dict[str, tuple[str, Any]] = {
    "rotation": ("transform", PARAMETRIZATIONS["cayley"]),
    **{name: ("transform", parametrization) for name, parametrization in PARAMETRIZATIONS.items()},
    "weights": ("weights", "given"),
    "weights_moved": ("weights", "moved"),
    "scale_offset": ("scale_offset", True),
    "clip": ("clip", "block"),
    "clip_site": ("clip", "site"),
    "weight_clip": ("weight_clip", "block"),
    "weight_clip_site": ("weight_clip", "site"),
}
"""A field of `Moves` and its value, by name; several may be given at once."""


def moves_named(names: Sequence[str]) -> Moves:
    """The moves of several names of PRESETS together, with gradients through largest magnitudes.

    Raises:
      ValueError: No name, an unknown one, or two that exclude each other.
    """
    if not names:
        raise ValueError(f"nothing moves: give some of {', '.join(PRESETS)}")
    found: dict[str, Any] = {}
    for name in names:
        if name not in PRESETS:
            raise ValueError(f"unknown move {name!r}: choose of {', '.join(PRESETS)}")
        field, value = PRESETS[name]
        if found.setdefault(field, value) != value:
            raise ValueError(f"{name!r} says another {field} than a move before it: give one")
    return Moves(**{"transform": None, "through_amax": True} | found)


class SiteState(NamedTuple):
    """State of `LearningLinear` at a site.

    Attributes:
      start: The transform that learning starts from.
      transform: T, made for all layers at once: on a GPU the inverses of one layer take as long.
      rounded: Weights that were moved by `start` and rounded, and are held: T moves the input
        alone. None: the weights as `Moves` says.
    """

    start: BlockAffine
    transform: BlockAffine
    learned: Learned
    rounded: tuple[MXArray, ...] | None = None


@dataclasses.dataclass(frozen=True)
class LearningLinear:
    """The `linear` of a model that learns.

    Products are taken in bfloat16 with float32 sums. Numbers of four bits times a power of two
    are bfloat16 numbers, so that the forward products are exact; gradients are rounded.
    """

    moves: Moves
    activation_format: Format
    weight_format: Format

    def __call__(
        self, site: str, x: Array, weights: Weights, state: SiteState
    ) -> tuple[tuple[Array, ...], None]:
        _, x, rounded = self.quantized(x.astype(jnp.float32), _widened(weights), state)
        return tuple(product(x, w) for w in rounded), None

    def quantized(
        self, x: Float[Array, "*tokens k"], weights: Weights, state: SiteState
    ) -> tuple[BlockAffine, Float[Array, "*tokens k"], Weights]:
        """T, Q(x T) and Q(clamp(W'))."""
        moves, (start, transform, learned, rounded) = self.moves, state
        through, x = moves.through_amax or moves.clip is not None, transform.activations(x)
        offsets = learned.log_scale, learned.log_clip
        x = learnable_quantize(self.activation_format, through, x, *offsets)
        if rounded is not None:
            made = tuple(w.dequantize() for w in rounded)
        else:
            moved = moves.moved_weights(start, transform, learned, weights)
            through = moves.through_amax or moves.weight_clip is not None
            made = tuple(learnable_quantize(self.weight_format, through, w) for w in moved)
        return transform, x, made


@struct.dataclass
class SitesObjective(Objective):
    """An objective of what moves at some sites, which all learn together.

    Attributes:
      start: The transform of each site, stacked over layers where there are several.
      formats: Of activations and of weights.
    """

    start: dict[str, BlockAffine]
    moves: Moves = struct.field(pytree_node=False)
    formats: tuple[Format, Format] = struct.field(pytree_node=False)

    @property
    def linear(self) -> LearningLinear:
        """Called with `states`."""
        return LearningLinear(self.moves, *self.formats)

    def states(
        self,
        learned: Mapping[str, Learned],
        rounded: Mapping[str, tuple[MXArray, ...]] | None = None,
    ) -> dict[str, SiteState]:
        """The state of each site."""
        given, found = rounded or {}, {}
        for site, moved in learned.items():
            start = self.start[site]
            transform = self.moves.moved_transform(start, moved)
            found[site] = SiteState(start, transform, moved, given.get(site))
        return found

    def bounded(self, learned: dict[str, Learned]) -> dict[str, Learned]:
        return {s: self.moves.bounded(self.start[s], moved) for s, moved in learned.items()}

    def learn(
        self,
        weights: Mapping[str, Weights],
        rows: Rows,
        held_out: Rows,
        key: Key[Array, ""],
        *,
        learned: dict[str, Learned] | None = None,
        **options: Any,
    ) -> Trained:
        """Minimises the loss by `training.train`.

        Args:
          weights: Of each site, which the fits are for.
          learned: Where learning starts, if not at zero.
        """
        start, moves = self.start, self.moves
        learned = learned or {site: moves.init(start[site], weights[site]) for site in start}
        found = train(self, learned, rows, held_out, key, **options)
        fits = {s: moves.fitted(start[s], moved, weights[s]) for s, moved in found.learned.items()}
        return found._replace(fits=fits)


def _clamped(
    w: Float[Array, "n k"], clip: Float[Array, " clips"], size: int
) -> Float[Array, "n k"]:
    """Each row's part of a block within `clip` times its largest magnitude."""
    blocks = w.reshape(*w.shape[:-1], -1, size)
    limit = clip[:, None] * jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    return jnp.clip(blocks, -limit, limit).reshape(w.shape)


def _widened(weights: Weights) -> Weights:
    return tuple(w.astype(jnp.float32) for w in weights)


def _plus(weights: Weights, moved: Weights | None) -> Weights:
    return tuple(w + d for w, d in zip(weights, moved or (), strict=True))
