"""Transforms that an optimiser moves: from unconstrained arrays to the matrices of the blocks.

With M0 the matrix where learning starts, and all parameters zero there,

    expm          R = M0 expm(A - A^T)                       orthogonal where M0 is
    cayley        R = M0 (I - K)^-1 (I + K),  K = A - A^T    orthogonal where M0 is
                    = M0 (2 (I - K)^-1 - I)
    smooth_rotation   diag(exp(d)) M0 (I - K)^-1 (I + K),    d the diagonal of A
    affine        M = M0 + D                                 its inverse by solving
    affine_expm   M = expm(S) M0                             M^-1 = M0^-1 expm(-S)
    affine_lu     M = M0 (I + L) diag(exp(d)) (I + U)        L, U strictly triangular

M0 stays a factor because a rotation far from it can be out of reach from the identity: Sylvester's
H32 has 16 eigenvalues -1, where Cayley's map has its pole.

Since zero parameters are the start, a bound on the condition number is kept by drawing parameters
towards zero. What has been learned is settled in float64 on the host: rotations are made orthogonal
to the last bit of float32, inverses of other matrices computed anew.

Sources: SpinQuant, arXiv 2405.16406 (Cayley); FlatQuant, arXiv 2410.09426 (affine).
"""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from duquantpp_jax.core import Chain, Transform
from duquantpp_jax.transforms.basic import Smooth
from duquantpp_jax.transforms.block import BlockAffine, polished

HIGHEST = jax.lax.Precision.HIGHEST

_LOOSER = 1 + 1e-5
"""So much float32 may be beyond a bound on the condition number."""
_DRIFT = 1e-4
"""So far from orthogonal a rotation may be before it is polished, to be no other matrix."""

Parameters = dict[str, Float[Array, "*layers blocks r r"]]
"""What the optimiser moves; zero where learning starts."""


@dataclasses.dataclass(frozen=True)
class Parametrization(abc.ABC):
    """A map from unconstrained arrays to the matrices of the blocks."""

    names: ClassVar[tuple[str, ...]]
    rotates = scales = False
    """Whether a start that rotates still does, and whether channels are scaled before it."""

    def init(self, start: BlockAffine) -> Parameters:
        """The parameters of `start` itself: zeros."""
        return {name: jnp.zeros_like(start.matrices) for name in self.names}

    @abc.abstractmethod
    def transform(self, start: BlockAffine, parameters: Parameters) -> BlockAffine:
        """The transform that the parameters name."""

    def bounded(
        self, start: BlockAffine, parameters: Parameters, max_condition: float
    ) -> Parameters:
        """The parameters of each block times the largest .9^n with which s_max / s_min of its
        matrix is within a bound, in which the start must lie (`check_condition`)."""

        def beyond(parameters: Parameters) -> Bool[Array, "*layers blocks"]:
            return _condition(self.transform(start, parameters)) > _LOOSER * max_condition

        def shrunk(carry: tuple[Array, Parameters]) -> tuple[Array, Parameters]:
            far = beyond(carry[1])[..., None, None]
            less = {name: jnp.where(far, 0.9 * a, a) for name, a in carry[1].items()}
            return carry[0] + 1, less

        def unfinished(carry: tuple[Array, Parameters]) -> Bool[Array, ""]:
            return (carry[0] < 300) & jnp.any(beyond(carry[1]))  # .9^300 is nothing to float32

        return jax.lax.while_loop(unfinished, shrunk, (jnp.int32(0), parameters))[1]


class Expm(Parametrization):
    """R = M0 expm(A - A^T)."""

    names = ("a",)
    rotates = True

    def transform(self, start: BlockAffine, parameters: Parameters) -> BlockAffine:
        a = parameters["a"]
        return _rotated(start, jax.scipy.linalg.expm(a - a.mT))


class Cayley(Parametrization):
    """R = M0 (I - K)^-1 (I + K), K = A - A^T."""

    names = ("a",)
    rotates = True

    def transform(self, start: BlockAffine, parameters: Parameters) -> BlockAffine:
        k = parameters["a"] - parameters["a"].mT
        eye = jnp.eye(k.shape[-1], dtype=k.dtype)
        return _rotated(start, 2 * inverse(eye - k) - eye)


class SmoothCayley(Parametrization):
    """M = diag(exp(d)) M0 (I - K)^-1 (I + K), d the diagonal of A."""

    names = ("a",)
    rotates = scales = True

    def transform(self, start: BlockAffine, parameters: Parameters) -> BlockAffine:
        rotated = Cayley().transform(start, parameters)
        scale = jnp.exp(jnp.diagonal(parameters["a"], axis1=-2, axis2=-1))[..., None]
        return BlockAffine(scale * rotated.matrices, rotated.inverses / scale.mT)


class Affine(Parametrization):
    """M = M0 + D."""

    names = ("d",)

    def transform(self, start: BlockAffine, parameters: Parameters) -> BlockAffine:
        matrices = start.matrices + parameters["d"]
        return BlockAffine(matrices, inverse(matrices))


class AffineExpm(Parametrization):
    """M = expm(S) M0, so that M^-1 = M0^-1 expm(-S)."""

    names = ("s",)

    def transform(self, start: BlockAffine, parameters: Parameters) -> BlockAffine:
        s = parameters["s"]
        forward, back = jax.scipy.linalg.expm(s), jax.scipy.linalg.expm(-s)
        return BlockAffine(_mm(forward, start.matrices), _mm(start.inverses, back))


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
        forward = _mm(start.matrices, _mm(lower_part, upper_part))
        return BlockAffine(forward, _mm(back, start.inverses))


PARAMETRIZATIONS: dict[str, Parametrization] = {
    "expm": Expm(),
    "cayley": Cayley(),
    "smooth_rotation": SmoothCayley(),
    "affine": Affine(),
    "affine_expm": AffineExpm(),
    "affine_lu": AffineLU(),
}


def block_affine(transform: Transform, width: int, size: int) -> BlockAffine:
    """The transform as matrices and inverses of side `size`, smoothing included.

    Raises:
      ValueError: It has no such form (a permutation, a larger rotation).
    """
    if (blocks := transform.as_blocks(width, size)) is None:
        raise ValueError(
            f"{type(transform).__name__} is not made of matrices of side {size}: "
            "learning and refining start from transforms that are (block_hadamard, wush)"
        )
    divisor, matrices, inverses = blocks.whole(width, size)
    divisor = divisor.reshape(-1, size)
    return BlockAffine(matrices / divisor[:, :, None], inverses * divisor[:, None, :])


def check_condition(start: BlockAffine, max_condition: float) -> None:
    """Raises ValueError unless each matrix has a condition number within the bound."""
    found = float(np.linalg.cond(np.asarray(start.matrices, np.float64)).max())
    if not found <= _LOOSER * max_condition:
        raise ValueError(
            f"max_condition = {max_condition:g}, but learning starts from matrices with condition "
            f"number {found:.4g}: give a larger bound or a start within it (FitWush has one)"
        )


def settled(transform: BlockAffine, parametrization: Parametrization | None) -> Transform:
    """What has been learned, exact to float32; diag(1 / s) R as a Smooth, which folds, and R."""
    matrices = np.asarray(transform.matrices, np.float64)
    if parametrization is not None and parametrization.rotates:
        lengths = np.linalg.norm(matrices, axis=-1, keepdims=True)
        scales = parametrization.scales or bool(np.abs(lengths - 1).max() >= _DRIFT)
        unit = matrices / lengths if scales else matrices
        if np.abs(unit @ unit.mT - np.eye(unit.shape[-1])).max() < _DRIFT:
            rotations = polished(unit)
            rotation = BlockAffine(rotations, rotations.mT)
            divisor = jnp.asarray(1 / lengths.reshape(*lengths.shape[:-3], -1), jnp.float32)
            return Chain((Smooth(divisor), rotation)) if scales else rotation
    return BlockAffine(transform.matrices, jnp.asarray(np.linalg.inv(matrices), jnp.float32))


def _condition(transform: BlockAffine) -> Float[Array, "*layers blocks"]:
    s = jnp.linalg.svd(transform.matrices, compute_uv=False)
    return s[..., 0] / s[..., -1]


def _rotated(start: BlockAffine, rotation: Float[Array, "*blocks r r"]) -> BlockAffine:
    return BlockAffine(_mm(start.matrices, rotation), _mm(rotation.mT, start.inverses))


def _mm(a: Float[Array, "*blocks r r"], b: Float[Array, "*blocks r r"]) -> Array:
    return jnp.matmul(a, b, precision=HIGHEST)


@jax.custom_jvp
@jax.jit
def inverse(matrices: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """The inverse of each matrix, by Gauss-Jordan elimination; not finite where there is none.

    E_k, elementary operations with the largest pivot at or below the diagonal, make column k of
    (M, I) a unit vector: E_(n-1) ... E_0 (M, I) = (I, M^-1). And dM^-1 = -M^-1 dM M^-1.

    On a CPU, `jnp.linalg.inv` calls a BLAS whose threads synchronize for each matrix of a batch. It
    takes a third of the time of this on an idle machine, but 10 to 70 times on a busy one.
    """
    n = matrices.shape[-1]
    rows = jnp.arange(n)
    eye = jnp.broadcast_to(jnp.eye(n, dtype=matrices.dtype), matrices.shape)

    def eliminate(k: Array, both: Array) -> Array:
        column = jnp.abs(_at(both, k, -1))
        pivot = jnp.argmax(jnp.where(rows >= k, column, -jnp.ones_like(column)), axis=-1)
        is_pivot = (rows == pivot[..., None])[..., None]
        largest = jnp.sum(jnp.where(is_pivot, both, jnp.zeros_like(both)), axis=-2)
        row = (largest / _at(largest, k, -1)[..., None])[..., None, :]
        both = jnp.where(is_pivot, _at(both, k, -2)[..., None, :], both)
        rest = both - _at(both, k, -1)[..., None] * row
        return jnp.where((rows == k)[:, None], row, rest)

    both = jnp.concatenate([matrices, eye], axis=-1)
    return jax.lax.fori_loop(0, n, eliminate, both)[..., n:]


@inverse.defjvp
def _derivative(
    primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Float[Array, "*batch n n"], Float[Array, "*batch n n"]]:
    back = inverse(primals[0])
    return back, -_mm(back, _mm(tangents[0], back))


def _at(array: Array, k: Array, axis: int) -> Array:
    return jax.lax.dynamic_index_in_dim(array, k, axis=axis, keepdims=False)
