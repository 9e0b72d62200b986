"""A quantized checkpoint: a Hugging Face directory whose config.json says that it is quantized.

    config.json             the float model's, with a quantization_config that names the job, and
                            model_type duquantpp_jax, which transformers and vLLM refuse
    quantization.json       the job alone; written first
    layer-00000.safetensors ...                  a file for each layer
    outside-*.safetensors                        embedding, last norm, head: as they were
    quantized.safetensors.index.json             which tensor is where; written last but config.json
    tokenizer.json, generation_config.json, ...  copied

No file has a name under which transformers looks for weights: it would leave out, with a warning,
what it does not know, and draw random weights in their place. config.json comes last: a directory
without it is one that `quantize` has not finished. A layer's file holds

    model.layers.3.mlp.up_proj.codes, .scales     packed as formats/tensors.py says
    model.layers.3.mlp_in/transform.links.0.scale  what the site's input is moved by, exactly
    model.layers.3.mlp.down_proj.weight            a linear left in float, as it was
    model.layers.3.mlp.down_proj.codes, .scales    one left packed, as it was
    model.layers.3.input_layernorm.weight          all else, as it was

and in its metadata one entry, a JSON text with the schema, the job, and what it takes to read the
tensors. (The order of several entries is not the same from run to run.)
"""

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from duquantpp_jax.checkpoints.job import SCHEMA, Job
from duquantpp_jax.checkpoints.lazy import Checkpoint, outermost, take_layers
from duquantpp_jax.checkpoints.packed import load_packed
from duquantpp_jax.checkpoints.shards import read_json
from duquantpp_jax.checkpoints.source import CONFIG, Directory
from duquantpp_jax.core import Fitted
from duquantpp_jax.formats.tensors import from_tensors
from duquantpp_jax.models import Decoder, DecoderConfig, Linear, dense
from duquantpp_jax.models.parameters import (
    LINEARS,
    SITE_WEIGHTS,
    SITES,
    layer_prefix,
    tensor_name,
)
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.site import PackedFloat, QuantizedLinear, QuantizedSite
from duquantpp_jax.ptq.walk import State, stack_layers
from duquantpp_jax.recipes import find_format
from duquantpp_jax.transforms.storage import from_arrays

METHOD = "duquantpp_jax"
JOB, REPORT = "quantization.json", "report.json"
ABOUT = "duquantpp_jax"
"""The entry of a file's metadata."""


def layer_file(number: int) -> str:
    """Name of a layer's file."""
    return f"layer-{number:05d}.safetensors"


def is_quantized(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory was written by `duquantpp quantize`, finished or not."""
    return (Path(directory) / JOB).is_file()


class Quantized:
    """A quantized checkpoint whose weights are still on disk.

    Attributes:
      fields: What config.json says, as that of the float model.
      job: What was done.

    Raises:
      ValueError: There is none, it is not finished, or was written by a newer version.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        if not is_quantized(directory):
            raise ValueError(
                f"{directory} is no quantized model: give what duquantpp quantize wrote"
            )
        described = read_json(self.directory / JOB)
        check_schema(self.directory / JOB, described.get("schema"))
        self.job = Job.from_dict(described.get("job", {}))
        if not (self.directory / CONFIG).is_file():
            raise ValueError(
                f"{directory} is not finished: run the duquantpp quantize that began it again"
            )
        self.fields = Directory(self.directory).fields()
        about = self.fields.pop("quantization_config", {})
        if "model_type" in about:  # older directories kept it in its place
            self.fields["model_type"] = about["model_type"]
        self.config = DecoderConfig.from_dict(self.fields)

    @property
    def plan(self) -> Plan:
        """What was done to which linears."""
        return self.job.plan(self.config, done=True)

    def layer(self, number: int) -> tuple[dict[str, np.ndarray], dict[str, QuantizedSite]]:
        """What `read_layer` gives."""
        return read_layer(self.directory / layer_file(number))

    def report(self) -> list[dict[str, Any]]:
        """What quantizing cost each linear (docs/quantize.md)."""
        return read_json(self.directory / REPORT)["linears"]

    def outside(self) -> dict[str, np.ndarray]:
        """Embedding, last norm and head, by tensor name, in the type they are stored in."""
        files = sorted(self.directory.glob("outside-*.safetensors"))
        return {name: array for file in files for name, array in load_file(file).items()}


def read_about(path: Path) -> dict[str, Any]:
    """What a layer's file says of it; raises ValueError if it is none that this version reads."""
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): quantize again") from None
    if not isinstance(about, dict):
        raise ValueError(f"{path} was not written by duquantpp_jax quantize")
    check_schema(path, about.get("schema"))
    return about


def check_schema(path: Path, schema: Any) -> None:
    """Raises ValueError unless this version reads the schema."""
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        raise ValueError(
            f"{path} has schema {schema!r}, and this version reads {SCHEMA}: "
            + ("install a newer duquantpp_jax" if newer else "quantize again")
        )


def read_layer(path: Path) -> tuple[dict[str, np.ndarray], dict[str, QuantizedSite]]:
    """The parameters of a layer that are no weights of linears, and its sites.

    Raises:
      ValueError: As `read_about`; or its parts do not fit together.
    """
    about = read_about(path)
    prefix, arrays, stored = layer_prefix(about["layer"]), about["arrays"], about.get("stored", {})
    tensors = load_file(path)

    def weight(name: str) -> Any:
        if name in stored:
            return PackedFloat(from_tensors(prefix + name, stored[name], tensors))
        if name in arrays:
            return from_tensors(prefix + name, arrays[name], tensors)
        return jnp.asarray(tensors[f"{prefix}{name}.weight"])

    sites = {}
    for site in SITES:
        own = f"{prefix}{site}/"
        moved = {k.removeprefix(own): a for k, a in tensors.items() if k.startswith(own)}
        fitted = from_arrays(moved, about["sites"][site])
        if not isinstance(fitted, Fitted):
            raise ValueError(f"{path}: site {site} holds {type(fitted).__name__}, not Fitted")
        weights = tuple(map(weight, SITE_WEIGHTS[site]))
        sites[site] = QuantizedSite(fitted.transform, weights, fitted.clip, fitted.scale_offset)
    names = {name: name.removeprefix(prefix).removesuffix(".weight") for name in tensors}
    own = (name for name in names if name == prefix + tensor_name(names[name]))
    return {names[n]: tensors[n] for n in own if names[n] not in LINEARS}, sites


def load_quantized(directory: str | os.PathLike[str]) -> tuple[Decoder, QuantizedLinear, State]:
    """A quantized model: `model(tokens, linear, state)` gives the logits it had when quantized.

    Raises:
      ValueError: As `Quantized`.
    """
    quantized = Quantized(directory)
    numbers = range(quantized.config.num_hidden_layers)
    rest, layers = zip(*(quantized.layer(number) for number in numbers), strict=True)
    parameters = take_layers(rest) | outermost(quantized.outside().items())
    decoder = Decoder(quantized.config, parameters, linears=False)
    return decoder, quantized.plan.linear, stack_layers(layers)


def load_any(
    directory: str | os.PathLike[str], activation_format: str | None = None
) -> tuple[Decoder, Linear, Any]:
    """A float, quantized or packed model: the decoder, the `linear` it calls, and its state.

    Args:
      activation_format: Of the inputs of packed weights, which are used as stored, by its name in
        duquantpp_jax.recipes.

    Raises:
      ValueError: As `load` and `Quantized`; or a format is given and no weight is packed.
    """
    if is_quantized(directory) and activation_format is None:
        return load_quantized(directory)
    if not is_quantized(directory):
        checkpoint = Checkpoint(directory)
        if checkpoint.packed:
            format = None if activation_format is None else find_format(activation_format)
            return load_packed(checkpoint, format)
        if activation_format is None:
            return checkpoint.decoder(), dense, None
    raise ValueError(
        f"--activation-format is for packed weights, which {directory} does not have: leave it "
        "out, or quantize the model"
    )
