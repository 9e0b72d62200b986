"""What moves the inputs of packed weights, as a transform_config of compressed-tensors says it.

A group moves the input of each linear that it names, in blocks of head_dim channels or as a whole:

    hadamard          x H / sqrt(n)      H of Sylvester's construction
    random-hadamard   x T / sqrt(n)      T of the checkpoint
    random-matrix     x T

with n the side of the matrix, and the transpose of H or T where it says inverse (an inverse of
random-matrix is stored as such). T is `X.{group}_input.weight` for a linear X; linears of a group
that share one have it stored for the first of them alone. What moves weights (weight_input,
weight_output) has moved them before they were stored. Other locations are refused.

Source: compressed-tensors 0.20, transform/. vLLM divides by sqrt(n) for random-matrix, too.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from duquantpp_jax.checkpoints.shards import read_stored
from duquantpp_jax.core import Transform
from duquantpp_jax.models.fields import short
from duquantpp_jax.transforms.block import BlockAffine, BlockRotation, KroneckerRotation
from duquantpp_jax.transforms.hadamard import DENSE_SIDE, hadamard, hadamard_factors

HADAMARD, RANDOM, MATRIX = KINDS = ("hadamard", "random-hadamard", "random-matrix")
_STORED = ("weight_input", "weight_output")
_HEAD = "lm_head"


class Group(NamedTuple):
    """How a group of transform_config moves the inputs of linears; `size` None is the width."""

    name: str
    kind: str
    size: int | None
    inverse: bool

    @property
    def tensor(self) -> str:
        """What stands behind the name of a linear in that of its matrix."""
        return f".{self.name}_input.weight"


def moved_online(fields: Mapping[str, Any], linears: Sequence[str]) -> dict[str, Group]:
    """The linears of a checkpoint whose input is moved when the model runs, and how.

    Args:
      fields: Of config.json.
      linears: Names of all linears.

    Raises:
      ValueError: transform_config says what is not read here.
    """
    packing = fields.get("quantization_config")
    config = packing.get("transform_config") if isinstance(packing, dict) else None
    groups = config.get("config_groups") if isinstance(config, dict) else None
    if not groups:
        return {}
    moved: dict[str, Group] = {}
    for group, targets, ignored in _inputs(groups):
        chosen = [
            name
            for name in (*linears, _HEAD)
            if _named(name, targets) and not _named(name, ignored)
        ]
        if not chosen:
            raise _wrong(group.name, f"targets {short(targets)}, which names no linear")
        for name in chosen:
            if name == _HEAD or name in moved:
                raise _wrong(group.name, f"{name}, which is lm_head or moved by another group")
            moved[name] = group
    return moved


def matrix_tensors(
    moved: Mapping[str, Group], widths: Mapping[str, int], found: Mapping[str, Any]
) -> dict[str, int]:
    """The matrices that a checkpoint stores, by the names of their tensors, and their sides."""
    names = {linear + group.tensor: (linear, group) for linear, group in moved.items()}
    return {
        name: group.size or widths[linear]
        for name, (linear, group) in names.items()
        if name in found
    }


def stored_matrix(linear: str, group: Group, width: int, found: Mapping[str, Any]) -> str | None:
    """The tensor of the matrix that moves the input of a linear; None where none is stored.

    Raises:
      ValueError: The group needs one.
    """
    if (own := linear + group.tensor) in found:
        return own
    shape = (group.size or width,) * 2
    others = [n for n, t in found.items() if n.endswith(group.tensor) and t.shape == shape]
    if len(others) > 1 or (not others and group.kind != HADAMARD):
        raise ValueError(
            f"tensor {own} is missing, and {len(others)} others have its place: transform_config "
            "needs it, or one that the linears of its group share"
        )
    return others[0] if others else None


def transform_of(
    tensor: str | None, group: Group, width: int, found: Mapping[str, Any]
) -> Transform:
    """What moves an input of a width.

    Args:
      tensor: Of `stored_matrix`.

    Raises:
      ValueError: The sides do not fit, or the matrix is not what the group says.
    """
    side, stored = group.size or width, None
    if width % side:
        raise _wrong(group.name, f"head_dim {side}, which does not divide an input of {width}")
    if tensor is not None:
        ((_, array),) = read_stored(found, [tensor])
        stored = array.astype(np.float64) / (1 if group.kind == MATRIX else np.sqrt(side))
    if group.kind == HADAMARD:
        if side & (side - 1):
            raise _wrong(group.name, f"type {HADAMARD} of side {side}, which is no power of two")
        if stored is not None and not np.allclose(stored, hadamard(side), atol=1e-3):
            raise ValueError(f"tensor {tensor} is not Sylvester's matrix, which {HADAMARD} means")
        small = side <= DENSE_SIDE  # it is symmetric, its own inverse
        return (
            BlockRotation(hadamard(side)[None])
            if small
            else KroneckerRotation(hadamard_factors(side))
        )
    if stored is None:
        raise _wrong(group.name, f"type {group.kind}, and the checkpoint no matrix")
    turned = stored.T if group.inverse and group.kind != MATRIX else stored
    try:
        inverse = np.linalg.inv(turned)
    except np.linalg.LinAlgError:
        raise ValueError(
            f"tensor {tensor} is singular: no weight was moved by its inverse"
        ) from None
    return BlockAffine(*(jnp.asarray(m[None], jnp.float32) for m in (turned, inverse)))


def _inputs(groups: Any) -> Iterator[tuple[Group, Sequence[str], Sequence[str]]]:
    """Groups that move inputs, with targets and what they ignore."""
    if not isinstance(groups, dict):
        raise _wrong("config_groups", short(groups))
    for name, scheme in groups.items():
        match scheme:
            case {"type": kind, "apply": list(places)} if kind in KINDS:
                size = scheme.get("head_dim")
            case _:
                raise _wrong(name, f"{short(scheme)}, which is not of type {', '.join(KINDS)}")
        if size is not None and (type(size) is not int or size < 1):
            raise _wrong(name, f"head_dim {short(size)}")
        for place in places:
            location = place.get("location") if isinstance(place, dict) else place
            if location in _STORED:
                continue
            if location != "input" or scheme.get("randomize"):
                what = f"location {short(location)}" if location != "input" else "randomize"
                raise _wrong(name, f"{what}: what is read are inputs, and weights that were moved")
            targets, ignored = (_names(name, place.get(k, [])) for k in ("targets", "ignore"))
            yield Group(name, kind, size, bool(place.get("inverse"))), targets, ignored


def _names(group: str, given: Any) -> list[str]:
    """Names and patterns; those that could take long to match are refused."""
    names = [given] if isinstance(given, str) else given
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise _wrong(group, f"targets {short(given)}")
    for pattern in (name[3:] for name in names if name.startswith("re:")):
        repeats = len(re.findall(r"[*+{]", pattern))
        try:
            fine = repeats <= 4 and not re.search(r"\)[*+{]", pattern) and re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            fine = False
        if not fine:
            raise _wrong(group, f"the pattern {short(pattern)}: give a simpler one, or names")
    return names


def _named(linear: str, targets: Sequence[str]) -> bool:
    return any(
        re.match(target[3:], linear) is not None
        if target.startswith("re:")
        else target in (linear, "Linear")
        for target in targets
    )


def _wrong(group: str, what: str) -> ValueError:
    return ValueError(f"config.json: transform_config: {group} has {what}")
