"""A quantized layer as one safetensors file.

    model.layers.3.mlp.up_proj.codes, .scales     packed as formats/storage.py says
    model.layers.3.mlp_in/transform.links.0.scale  what the site's input is moved by, exactly
    model.layers.3.mlp.down_proj.weight            a linear left in float, as it was
    model.layers.3.input_layernorm.weight          all else, as it was

The metadata holds one entry, a JSON text with the schema, the job, and what it takes to read the
tensors. (One, for the order of several is not the same from run to run.)
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from duquantpp_jax import files
from duquantpp_jax.checkpoints.job import SCHEMA
from duquantpp_jax.checkpoints.shards import one_line
from duquantpp_jax.core import Fitted, MXArray
from duquantpp_jax.formats.storage import from_tensors, to_tensors
from duquantpp_jax.models import SITE_WEIGHTS, SITES
from duquantpp_jax.ptq.site import QuantizedSite
from duquantpp_jax.ptq.walk import QuantizedLayer
from duquantpp_jax.transforms.storage import from_arrays, to_arrays

_ABOUT = "duquantpp_jax"
_WEIGHTS = {name for names in SITE_WEIGHTS.values() for name in names}

Tensors = Mapping[str, np.ndarray]


def write_tensors(path: Path, tensors: Tensors, about: Mapping[str, Any]) -> None:
    """Writes a safetensors file, whole or not at all.

    Raises:
      OSError: It cannot be written; most often the disk is full.
    """
    metadata = {"format": "pt"} if not about else {_ABOUT: files.to_json(about).decode()}
    ordered = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    try:
        with files.whole(path) as temporary:
            save_file(ordered, temporary, metadata)
    except SafetensorError as error:
        raise OSError(
            f"cannot write {path} ({one_line(error)}): make room and run the same command again"
        ) from None


def read_about(path: Path) -> dict[str, Any]:
    """What a file's metadata says of it.

    Raises:
      ValueError: It is not one of these files, or was written by a newer version.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get(_ABOUT, "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): quantize again") from None
    if not isinstance(about, dict):
        raise ValueError(f"{path} was not written by duquantpp_jax quantize")
    check_schema(path, about.get("schema"))
    return about


def check_schema(path: Path, schema: Any) -> None:
    """Raises ValueError unless the schema is one that this version reads."""
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        raise ValueError(
            f"{path} has schema {schema!r}, and this version reads {SCHEMA}: "
            + ("install a newer duquantpp_jax" if newer else "quantize again")
        )


def layer_tensors(
    number: int, names: Mapping[str, str], layer: QuantizedLayer
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a layer's file, and what its metadata says besides schema and job.

    Args:
      number: Of the layer.
      names: The tensor name of each parameter inside it.
      layer: As quantized.
    """
    tensors = {
        names[name]: np.asarray(array)
        for name, array in layer.parameters.items()
        if name not in _WEIGHTS
    }
    arrays, structures = {}, {}
    for site in SITES:
        one = layer.sites[site]
        fitted = Fitted(one.transform, None, one.clip, one.scale_offset)
        moved, structures[site] = to_arrays(fitted)
        tensors |= {f"{_prefix(number)}{site}/{path}": np.asarray(a) for path, a in moved.items()}
        for name, weight in zip(SITE_WEIGHTS[site], one.weights, strict=True):
            if isinstance(weight, MXArray):
                own, arrays[name] = to_tensors(_prefix(number) + name, weight)
                tensors |= own
            else:
                tensors[names[name]] = np.asarray(layer.parameters[name])
    about = {"layer": number, "arrays": arrays, "sites": structures}
    return tensors, about


def read_layer(path: Path) -> tuple[dict[str, np.ndarray], dict[str, QuantizedSite]]:
    """The parameters of a layer that are no weights of linears, and its sites.

    Raises:
      ValueError: As `read_about`; or its parts do not fit together.
    """
    about = read_about(path)
    prefix, arrays = _prefix(about["layer"]), about["arrays"]
    with safe_open(path, framework="numpy") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    sites = {}
    for site in SITES:
        own = f"{prefix}{site}/"
        moved = {k.removeprefix(own): a for k, a in tensors.items() if k.startswith(own)}
        fitted = from_arrays(moved, about["sites"][site])
        if not isinstance(fitted, Fitted):
            raise ValueError(f"{path}: site {site} holds {type(fitted).__name__}, not Fitted")
        weights = tuple(
            from_tensors(prefix + name, arrays[name], tensors)
            if name in arrays
            else jnp.asarray(tensors[f"{prefix}{name}.weight"])
            for name in SITE_WEIGHTS[site]
        )
        sites[site] = QuantizedSite(fitted.transform, weights, fitted.clip, fitted.scale_offset)
    rest = {
        name.removeprefix(prefix).removesuffix(".weight"): array
        for name, array in tensors.items()
        if name.endswith((".weight", ".bias"))
    }
    return {name: a for name, a in rest.items() if name not in _WEIGHTS}, sites


def _prefix(number: int) -> str:
    return f"model.layers.{number}."
