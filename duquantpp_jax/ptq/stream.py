"""Rotations that cost nothing online: of the residual stream (R1) and of the value heads (R2).

    h' = h R_1:    E' = E R_1                      the embedding
                   W' = R_1^T W,  b' = b R_1       o_proj, down_proj, which write to h
                   W' = W diag(g) R_1,  g' = 1     q, k, v, up, gate, head, which read n(h) g
    v' = v R_2:    W' = R_2^T W,  b' = b R_2       rows of v_proj, head by head
                   W' = W R_2                      columns of o_proj

An RMSNorm without gain commutes with an orthogonal matrix, n(h R) = n(h) R, for it divides by the
length of h; so its gain moves into the linears that read it. (R1 is refused where a family norms
what is added to h: that gain has no linear to move into.) Attention mixes value heads by
weights that no rotation of v changes. The float function is therefore the same, whatever the width,
and nothing is left to do online. Query heads that share a value head share its R_2. A tied head
reads n(h) g while the embedding does not, so it becomes a matrix of its own.

Products are in float64; each tensor is then rounded once, to the type that it had.

Sources: SliceGPT, arXiv 2401.15024, for the gains; QuaRot, arXiv 2404.00456, for Hadamard matrices;
SpinQuant, arXiv 2405.16406, for the names R1 and R2.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple, get_args

import jax
import numpy as np
from jaxtyping import Float, Float64

from duquantpp_jax.commands.options.common import RotationName
from duquantpp_jax.models import SITE_WEIGHTS, SITES, DecoderConfig
from duquantpp_jax.models.parameters import input_norms
from duquantpp_jax.recipes import known
from duquantpp_jax.transforms.hadamard import sign_factors

_VALUE, _OUT = "self_attn.v_proj", "self_attn.o_proj"
_WRITERS = (_OUT, "mlp.down_proj")
_ROWS = 4096
"""Rows that are in float64 at once."""

Stored = Float[np.ndarray, "..."]
"""A parameter in the type of the checkpoint; what is made of it has the same type."""


class Rotation(NamedTuple):
    """R = diag(signs) (F_1 x F_2 x ...), Kronecker products of orthogonal factors."""

    signs: Float64[np.ndarray, " k"]
    factors: tuple[Float64[np.ndarray, "_ _"], ...]

    def __call__(self, x: Float64[np.ndarray, "n k"]) -> Float64[np.ndarray, "n k"]:
        """x R."""
        moved, after = x * self.signs, x.shape[-1]
        for factor in self.factors:
            after //= len(factor)
            moved = moved.reshape(-1, len(factor), after)
            moved = np.einsum("bia,ij->bja", moved, factor, optimize=True)
        return moved.reshape(x.shape)


@functools.lru_cache(maxsize=64)
def rotation(name: str, size: int, seed: int, *place: int) -> Rotation:
    """The rotation of a name and a size; where it is random, of a seed and a place in the model.

    Raises:
      ValueError: No Hadamard matrix of this size is known.
    """
    # The walk draws from the first numbers, one for each site.
    key = functools.reduce(jax.random.fold_in, (len(SITES), *place), jax.random.key(seed))
    if name == "random_orthogonal":
        normal = np.asarray(jax.random.normal(key, (size, size)), np.float64)
        return Rotation(np.ones(size), (np.linalg.qr(normal)[0],))
    try:
        factors = tuple(signs / np.sqrt(len(signs)) for signs in sign_factors(size))
    except ValueError as error:
        raise ValueError(f"{error}; random_orthogonal has every side") from None
    signs = jax.random.rademacher(key, (size,)) if name == "random_hadamard" else np.ones(size)
    return Rotation(np.asarray(signs, np.float64), factors)


@dataclasses.dataclass(frozen=True)
class Turn:
    """Which rotations a float model is turned by; none of them by default.

    Attributes:
      stream: Of the residual stream (R1).
      values: Of the value heads (R2): one for each head of each layer.
      seed: For those that are random.

    Raises:
      ValueError: An unknown name.
    """

    stream: str | None = None
    values: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (self.stream, self.values):
            if name is not None:
                known("rotation", name, get_args(RotationName))

    @property
    def draws(self) -> bool:
        """Whether another seed gives another model."""
        return not {self.stream, self.values} <= {None, "hadamard"}

    def config(self, config: DecoderConfig) -> DecoderConfig:
        """The turned model's: its head is not tied if the stream is turned.

        Raises:
          ValueError: There is no such rotation of its sizes, or the family has norms in its way.
        """
        if self.stream is not None and config.post_norms:
            raise ValueError(
                f"the residual stream of a {config.architecture} cannot be rotated: norms after "
                "attention and MLP have a gain for each channel of it; rotate the value heads only"
            )
        if self.values is not None:
            rotation(self.values, config.head_dim, self.seed, 0)
        if self.stream is None:
            return config
        if config.num_experts:
            raise ValueError(
                f"the stream of a {config.architecture} is not rotated: its routers read it too; "
                "rotate the values alone"
            )
        rotation(self.stream, config.hidden_size, self.seed)
        return dataclasses.replace(config, tie_word_embeddings=False)

    def layer(
        self, config: DecoderConfig, number: int, parameters: Mapping[str, Stored]
    ) -> dict[str, Stored]:
        """The parameters of a layer of the turned model, by name inside it."""
        turned = dict(parameters)
        if self.stream is self.values is None:
            return turned
        for name in (_VALUE, _OUT):  # are turned twice, and rounded once
            turned[name] = turned[name].astype(np.float64)
        if self.stream is not None:
            stream = rotation(self.stream, config.hidden_size, self.seed)
            for site, norm in input_norms(config).items():
                gain = turned[norm].astype(np.float64) + config.norm_offset
                for name in SITE_WEIGHTS[site]:
                    turned[name] = _columns(turned[name], stream, gain)
                turned[norm] = np.full_like(turned[norm], 1 - config.norm_offset)
            for name in _WRITERS:
                _rows(turned, name, stream)
        if self.values is not None:
            side, kv_heads = config.head_dim, config.num_key_value_heads
            group = config.num_attention_heads // kv_heads
            place = self.values, side, self.seed, 1, number
            heads = [rotation(*place, head) for head in range(kv_heads)]
            _rows(turned, _VALUE, *heads)
            parts = np.split(turned[_OUT], config.num_attention_heads, axis=1)
            columns = [_columns(part, heads[head // group]) for head, part in enumerate(parts)]
            turned[_OUT] = np.concatenate(columns, axis=1)
        return {n: array.astype(parameters[n].dtype, copy=False) for n, array in turned.items()}

    def outside(self, config: DecoderConfig, w: Stored, norm: Stored | None = None) -> Stored:
        """The embedding, or the head with the weight of the last norm, of the turned model.

        E R_1, or H diag(g) R_1; the last norm is then left with gains of 1.
        """
        if self.stream is None:
            return w
        gain = None if norm is None else norm.astype(np.float64) + config.norm_offset
        return _columns(w, rotation(self.stream, config.hidden_size, self.seed), gain)


def _columns(w: Stored, turned_by: Rotation, gain: Stored | None = None) -> Stored:
    """w diag(gain) R, in the type of w."""
    moved = np.empty_like(w)
    for first in range(0, len(w), _ROWS):
        rows = w[first : first + _ROWS].astype(np.float64)
        moved[first : first + _ROWS] = turned_by(rows if gain is None else rows * gain)
    return moved


def _rows(parameters: dict[str, Stored], name: str, *turned_by: Rotation) -> None:
    """Turns what a linear gives out, in as many equal parts as there are rotations: R^T W, b R."""
    for key in (name, f"{name}.bias"):
        if key in parameters:
            parts = np.split(parameters[key].T, len(turned_by), axis=-1)
            pairs = zip(parts, turned_by, strict=True)
            moved = [_columns(np.atleast_2d(part), turn) for part, turn in pairs]
            parameters[key] = np.concatenate(moved, axis=-1).reshape(parameters[key].T.shape).T
