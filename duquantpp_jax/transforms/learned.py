"""Transforms that an optimiser moves: from unconstrained arrays to the matrices of the blocks.

With M0 the matrix where learning starts, and all parameters zero there,

    expm          R = M0 expm(A - A^T)                       orthogonal where M0 is
    cayley        R = M0 (I - K)^-1 (I + K),  K = A - A^T    orthogonal where M0 is
    affine        M = M0 + D                                 its inverse by solving
    affine_expm   M = expm(S) M0                             M^-1 = M0^-1 expm(-S)
    affine_lu     M = M0 (I + L) diag(exp(d)) (I + U)        L, U strictly triangular

M0 stays a factor because a rotation far from it can be out of reach from the identity: Sylvester's
H32 has 16 eigenvalues -1, where Cayley's map has its pole.

Sources: SpinQuant, arXiv 2405.16406 (Cayley); FlatQuant, arXiv 2410.09426 (affine).
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from duquantpp_jax.core import Transform
from duquantpp_jax.transforms.basic import Smooth, links
from duquantpp_jax.transforms.block import BlockAffine, lower

HIGHEST = jax.lax.Precision.HIGHEST

Parameters = dict[str, Float[Array, "*layers blocks r r"]]
"""What the optimiser moves; zero where learning starts."""


class Parametrization(abc.ABC):
    """A map from unconstrained arrays to the matrices of the blocks."""

    names: tuple[str, ...]

    def init(self, start: BlockAffine) -> Parameters:
        """The parameters of `start` itself: zeros."""
        return {name: jnp.zeros_like(start.matrices) for name in self.names}

    @abc.abstractmethod
    def transform(self, start: BlockAffine, parameters: Parameters) -> BlockAffine:
        """The transform that the parameters name."""


@dataclasses.dataclass(frozen=True)
class Expm(Parametrization):
    """R = M0 expm(A - A^T)."""

    names = ("a",)

    def transform(self, start: BlockAffine, parameters: Parameters) -> BlockAffine:
        a = parameters["a"]
        return _rotated(start, jax.scipy.linalg.expm(a - _t(a)))


@dataclasses.dataclass(frozen=True)
class Cayley(Parametrization):
    """R = M0 (I - K)^-1 (I + K), K = A - A^T."""

    names = ("a",)

    def transform(self, start: BlockAffine, parameters: Parameters) -> BlockAffine:
        k = parameters["a"] - _t(parameters["a"])
        eye = jnp.eye(k.shape[-1], dtype=k.dtype)
        return _rotated(start, jnp.linalg.solve(eye - k, eye + k))


@dataclasses.dataclass(frozen=True)
class Affine(Parametrization):
    """M = M0 + D."""

    names = ("d",)

    def transform(self, start: BlockAffine, parameters: Parameters) -> BlockAffine:
        matrices = start.matrices + parameters["d"]
        return BlockAffine(matrices, jnp.linalg.inv(matrices))


@dataclasses.dataclass(frozen=True)
class AffineExpm(Parametrization):
    """M = expm(S) M0, so that M^-1 = M0^-1 expm(-S)."""

    names = ("s",)

    def transform(self, start: BlockAffine, parameters: Parameters) -> BlockAffine:
        s = parameters["s"]
        forward, back = jax.scipy.linalg.expm(s), jax.scipy.linalg.expm(-s)
        return BlockAffine(_mm(forward, start.matrices), _mm(start.inverses, back))


@dataclasses.dataclass(frozen=True)
class AffineLU(Parametrization):
    """M = M0 (I + L) diag(exp(d)) (I + U); d is the diagonal of the parameter "u"."""

    names = ("l", "u")

    def transform(self, start: BlockAffine, parameters: Parameters) -> BlockAffine:
        eye = jnp.eye(start.matrices.shape[-1], dtype=start.matrices.dtype)
        scale = jnp.exp(jnp.diagonal(parameters["u"], axis1=-2, axis2=-1))
        lower_part = eye + jnp.tril(parameters["l"], -1)
        upper_part = scale[..., :, None] * (eye + jnp.triu(parameters["u"], 1))
        eye = jnp.broadcast_to(eye, lower_part.shape)
        solve = jax.scipy.linalg.solve_triangular
        back = _mm(solve(upper_part, eye, lower=False), solve(lower_part, eye, lower=True))
        return BlockAffine(
            _mm(start.matrices, _mm(lower_part, upper_part)), _mm(back, start.inverses)
        )


PARAMETRIZATIONS: dict[str, Parametrization] = {
    "expm": Expm(),
    "cayley": Cayley(),
    "affine": Affine(),
    "affine_expm": AffineExpm(),
    "affine_lu": AffineLU(),
}


def block_affine(transform: Transform, width: int, size: int) -> BlockAffine:
    """The transform as matrices and inverses of side `size`, smoothing included.

    Raises:
      ValueError: It has no such form (a permutation, a larger rotation).
    """
    lowered = lower(transform, width, size)
    match links(lowered):
        case (Smooth() as smooth, BlockAffine() as blocks):
            scale = smooth.scale.reshape(-1, size)
            return BlockAffine(
                blocks.matrices / scale[:, :, None], blocks.inverses * scale[:, None, :]
            )
    raise ValueError(
        f"{type(transform).__name__} is not made of matrices of side {size}: "
        "learning starts from transforms that are"
    )


def _rotated(start: BlockAffine, rotation: Float[Array, "*blocks r r"]) -> BlockAffine:
    return BlockAffine(_mm(start.matrices, rotation), _mm(_t(rotation), start.inverses))


def _t(matrices: Float[Array, "*blocks r r"]) -> Float[Array, "*blocks r r"]:
    return jnp.swapaxes(matrices, -1, -2)


def _mm(a: Float[Array, "*blocks r r"], b: Float[Array, "*blocks r r"]) -> Array:
    return jnp.matmul(a, b, precision=HIGHEST)
