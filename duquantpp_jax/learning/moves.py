"""What an optimiser moves at a site, and the `linear` of a model that learns.

    y = Q(x T) @ Q(W')^T

    weights = "fixed"    W' = W T^-T, W as the checkpoint has it
    weights = "given"    W' = (W + D) T^-T, D learned: a moving T rounds every weight anew
    weights = "moved"    W' = W T0^-T + D, D learned where it is rounded: T moves the input alone

Q rounds in the forward pass and lets gradients through (quantizer.py).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from duquantpp_jax.core import Fitted, Format, Weights
from duquantpp_jax.learning.quantizer import integer, learnable_quantize
from duquantpp_jax.transforms.block import BlockAffine
from duquantpp_jax.transforms.learned import Parameters, Parametrization


@struct.dataclass
class Learned:
    """What moves at one site; all zeros at the start.

    Attributes:
      transform: Parameters of the transform.
      weights: Added to each weight, where weights learn.
      log_scale: Added to the log2 of each activation block's scale, where that learns.
    """

    transform: Parameters | None
    weights: Weights | None
    log_scale: Float[Array, "*layers blocks"] | None


@dataclasses.dataclass(frozen=True)
class Moves:
    """What moves.

    Attributes:
      transform: How the transform is parametrised, or None: it stays where it starts.
      weights: See the head of this file.
      scale_offset: Whether powers of two for the activations' scales are learned.
      through_amax: As in `learnable_quantize`, for activations and weights.
      round_weights: Whether weights are rounded while learning.
    """

    transform: Parametrization | None
    weights: Literal["fixed", "given", "moved"] = "fixed"
    scale_offset: bool = False
    through_amax: bool = False
    round_weights: bool = True

    def init(self, start: BlockAffine, weights: Weights) -> Learned:
        """Nothing moved yet, of one site or of all layers stacked."""
        still = self.weights == "fixed"
        return Learned(
            self.transform.init(start) if self.transform else None,
            None if still else tuple(jnp.zeros_like(w) for w in weights),
            jnp.zeros(start.matrices.shape[:-2], jnp.float32) if self.scale_offset else None,
        )

    def fitted(self, start: BlockAffine, learned: Learned, weights: Weights) -> Fitted:
        """What has been learned at one site, as a fit gives it."""
        transform = self.moved_transform(start, learned)
        if self.weights == "given":
            weights = _plus(weights, learned.weights)
        elif self.weights == "moved":
            moved = self.moved_weights(start, transform, learned, weights)
            weights = tuple(transform.inverse().weights(w) for w in moved)
        offset = None if learned.log_scale is None else integer(learned.log_scale)
        return Fitted(transform, None if self.weights == "fixed" else weights, scale_offset=offset)

    def moved_transform(self, start: BlockAffine, learned: Learned) -> BlockAffine:
        """T."""
        if self.transform is None or learned.transform is None:
            return start
        return self.transform.transform(start, learned.transform)

    def moved_weights(
        self, start: BlockAffine, transform: BlockAffine, learned: Learned, weights: Weights
    ) -> Weights:
        """W'."""
        match self.weights:
            case "fixed":
                return tuple(transform.weights(w) for w in weights)
            case "given":
                return tuple(transform.weights(w) for w in _plus(weights, learned.weights))
            case "moved":
                return _plus(tuple(start.weights(w) for w in weights), learned.weights)


@dataclasses.dataclass(frozen=True)
class LearningLinear:
    """The `linear` of a model that learns; its state at a site is (start, learned).

    Products are taken in bfloat16 with float32 sums. Numbers of four bits times a power of two
    are bfloat16 numbers, so that the forward products are exact; gradients are rounded.
    """

    moves: Moves
    activation_format: Format
    weight_format: Format

    def __call__(
        self, site: str, x: Array, weights: Weights, state: tuple[BlockAffine, Learned]
    ) -> tuple[tuple[Array, ...], None]:
        moves, (start, learned) = self.moves, state
        weights = tuple(w.astype(jnp.float32) for w in weights)
        transform = moves.moved_transform(start, learned)
        x = transform.activations(x.astype(jnp.float32))
        amax = moves.through_amax
        x = learnable_quantize(self.activation_format, amax, x, learned.log_scale)
        moved = moves.moved_weights(start, transform, learned, weights)
        if moves.round_weights:
            moved = tuple(learnable_quantize(self.weight_format, amax, w, None) for w in moved)
        return tuple(product(x, w) for w in moved), None


@jax.custom_vjp
def product(x: Float[Array, "*tokens k"], w: Float[Array, "n k"]) -> Float[Array, "*tokens n"]:
    """x @ w^T with bfloat16 factors and float32 sums, forward and backward."""
    return _bfloat16("...k,nk->...n", x, w)


def _product_forward(x: Array, w: Array) -> tuple[Array, Any]:
    return product(x, w), (x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))


def _product_backward(kept: Any, g: Array) -> tuple[Array, Array]:
    x, w = kept
    g_rows, x_rows = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    return _bfloat16("...n,nk->...k", g, w), _bfloat16("tn,tk->nk", g_rows, x_rows)


product.defvjp(_product_forward, _product_backward)


def _bfloat16(equation: str, a: Array, b: Array) -> Array:
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _plus(weights: Weights, moved: Weights | None) -> Weights:
    return tuple(w + d for w, d in zip(weights, moved or (), strict=True))
