"""Fitted transforms as named arrays and a JSON text, and as safetensors files.

A transform is a tree of frozen dataclasses whose leaves are arrays. Its structure is

    {"type": NAME, "fields": {FIELD: node}}    a dataclass
    {"items": [node, ...]}                     a tuple, such as the links of a chain
    {"array": PATH}                            an array, found under its path
    {"value": V}                               a static field, or None

and PATH says where the array sits: `links.0.scale`. NAME is the class for those of this package,
and `module:Class` for one from outside, whose module must have been imported before it is read:
nothing is imported because a file says so.
"""

import json
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from duquantpp_jax import files
from duquantpp_jax.core import Fitted, Transform

FORMAT = "duquantpp_jax transforms 2"
AGAIN = "make the transforms again"


def to_arrays(
    transform: Transform | Fitted,
) -> tuple[dict[str, Shaped[Array, "..."] | np.ndarray], str]:
    """The arrays by path, and the structure as JSON, of a transform, also stacked, or a `Fitted`.

    Raises:
      ValueError: A field holds neither arrays nor a static value that JSON can say.
    """
    arrays: dict[str, Array | np.ndarray] = {}

    def node(value: Any, path: str) -> dict[str, Any]:
        match value:
            case Transform() | Fitted():
                fields = {
                    name: node(getattr(value, name), f"{path}.{name}".lstrip("."))
                    for name in value.__dataclass_fields__  # type: ignore[union-attr]
                }
                return {"type": _name(type(value)), "fields": fields}
            case tuple():
                return {"items": [node(v, f"{path}.{i}".lstrip(".")) for i, v in enumerate(value)]}
            case jax.Array() | np.ndarray():
                arrays[path] = value
                return {"array": path}
            case None | bool() | int() | float() | str():
                return {"value": value}
        raise ValueError(
            f"{path} of {type(transform).__name__} holds {type(value).__name__}: transforms that "
            "are stored hold arrays, transforms, tuples of them, and static numbers or strings"
        )

    return arrays, json.dumps(node(transform, ""))


def from_arrays(
    arrays: Mapping[str, Shaped[Array, "..."] | np.ndarray], structure: str
) -> Transform | Fitted:
    """What `to_arrays` took apart, bit for bit.

    Args:
      arrays: By path; others than those of the structure are left alone.

    Raises:
      ValueError: The structure is no such text, names a class that is not known or has other
        fields, or an array is missing.
    """

    def value(node: Any, path: str) -> Any:
        match node:
            case {"type": str(name), "fields": dict(fields)}:
                cls = _class(name)
                if set(fields) != set(cls.__dataclass_fields__):
                    raise ValueError(
                        f"{name} is stored with the fields {', '.join(fields) or 'none'}: "
                        f"here it has {', '.join(cls.__dataclass_fields__) or 'none'}"
                    )
                return cls(**{f: value(v, f"{path}.{f}") for f, v in fields.items()})
            case {"items": list(items)}:
                return tuple(value(v, f"{path}.{i}") for i, v in enumerate(items))
            case {"array": str(key)}:
                if key not in arrays:
                    raise ValueError(f"the array {key} of a transform is missing from the file")
                return jnp.asarray(arrays[key])
            case {"value": None | bool() | int() | float() | str() as static}:
                return static
        raise ValueError(f"{path.lstrip('.') or 'this'} is not the structure of a transform")

    try:
        tree = json.loads(structure)
    except json.JSONDecodeError:
        raise ValueError("the structure of a transform is not JSON") from None
    transform = value(tree, "")
    if not isinstance(transform, Transform | Fitted):
        raise ValueError("this is not the structure of a transform")
    return transform


def save(
    path: str | os.PathLike[str], transforms: Mapping[str, Transform | Fitted], of: str = ""
) -> None:
    """Writes transforms, each by a name, to one safetensors file, whole or not at all.

    Args:
      of: What they move, in words; `load` asks for the same.
    """
    tensors, structures = {}, {}
    for name, transform in transforms.items():
        arrays, structures[name] = to_arrays(transform)
        tensors |= {f"{name}/{key}": array for key, array in arrays.items()}
    about = {"format": FORMAT, "of": of, "structures": structures}
    files.write_tensors(pathlib.Path(path), tensors, about)


def load(path: str | os.PathLike[str], of: str = "") -> dict[str, Transform | Fitted]:
    """Reads the transforms that `save` wrote.

    Raises:
      ValueError: The file is none of those, has been changed, holds NaN or Inf, or moves other
        things than `of` says.
    """
    path, transforms = pathlib.Path(path), {}
    tensors, about = files.read_tensors(path, AGAIN)
    if about.get("format") != FORMAT:
        raise ValueError(
            f"{path} says format {about.get('format')!r} and not {FORMAT!r}: "
            f"it was not written by {__name__}.save"
        )
    if about.get("of") != of:
        raise ValueError(f"{path} holds transforms of {about.get('of')!r}, not of {of!r}: {AGAIN}")
    files.check_finite(path, tensors)
    with files.refusing(path, AGAIN):
        for name, structure in about["structures"].items():
            own = f"{name}/"
            arrays = {k.removeprefix(own): t for k, t in tensors.items() if k.startswith(own)}
            transforms[name] = from_arrays(arrays, structure)
    return transforms


def _name(cls: type) -> str:
    inside = cls.__module__.partition(".")[0] == __name__.partition(".")[0]
    return cls.__qualname__ if inside else f"{cls.__module__}:{cls.__qualname__}"


def _class(name: str) -> type:
    """The class of this name among those that are known; ValueError if none is."""
    classes = (*_subclasses(Transform), Fitted)
    known = {_name(cls): cls for cls in classes if cls.__module__ in sys.modules}
    if name not in known:
        module, outside, _ = name.partition(":")
        hint = f"give --import {module}" if outside else "it was written by another version"
        raise ValueError(f"the stored transform {name} is not known here: {hint}")
    return known[name]


def _subclasses(cls: type) -> list[type]:
    return [found for sub in cls.__subclasses__() for found in (sub, *_subclasses(sub))]
