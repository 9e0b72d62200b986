"""A transform, a rounding and a format of nobody's package; tests copy this file out of theirs."""

import dataclasses

import jax.numpy as jnp
from flax import struct

from duquantpp_jax.core import Element, Fitted, Needs, Transform
from duquantpp_jax.formats import MX


@struct.dataclass
class Mirror(Transform):
    """x' = x - 2 (x . v) v with one unit vector v of all channels: no block keeps to itself."""

    v: jnp.ndarray

    def activations(self, x):
        return x - 2 * jnp.sum(x * self.v, axis=-1, keepdims=True) * self.v

    def weights(self, w):
        return self.activations(w)

    def inverse(self):
        return self


@dataclasses.dataclass(frozen=True)
class FitMirror:
    """v is the bisector of the largest channel's axis and the even direction."""

    needs = Needs.NOTHING

    def __call__(self, weights, stats, recipe, key):
        width = len(stats.absmax)
        v = jnp.full(width, -(width**-0.5)).at[jnp.argmax(stats.absmax)].add(1.0)
        return Fitted(Mirror(v / jnp.linalg.norm(v)))


@dataclasses.dataclass(frozen=True)
class Shrunk:
    """Rounds a weight that is a little smaller to nearest."""

    by: float = 0.98
    needs = Needs.NOTHING

    def __call__(self, w, format, stats):
        return format.quantize(self.by * w)


MIRROR, SHRUNK = FitMirror(), Shrunk()
GRID = MX(Element("e1m2", 1, 2, bias=1, max_code=0b111, dtype=jnp.uint8))
