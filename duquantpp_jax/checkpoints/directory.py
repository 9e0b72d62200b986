"""A quantized checkpoint: a Hugging Face directory whose config.json says that it is quantized.

    config.json             the float model's, with a quantization_config that names the job, and
                            model_type duquantpp_jax, which transformers and vLLM refuse
    quantization.json       the job alone; written first
    SHA256SUMS              the hash of every file, by which it is checked when it is read (seal.py)
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

and in its metadata one entry, a JSON text with the schema, the job, what it takes to read the
tensors, and a hash of all of this, by which a resumed run knows the file. (The order of several
entries is not the same from run to run.)
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors.numpy import load_file

from duquantpp_jax import files
from duquantpp_jax.checkpoints.job import SCHEMA, Job
from duquantpp_jax.checkpoints.lazy import Checkpoint, outermost, take_layers
from duquantpp_jax.checkpoints.packed import load_packed
from duquantpp_jax.checkpoints.seal import SEALED, check_all_there, sealed
from duquantpp_jax.checkpoints.source import CONFIG, Directory
from duquantpp_jax.core import Fitted, Format, MXArray
from duquantpp_jax.files import check_finite, read_json, refusing
from duquantpp_jax.formats.tensors import from_tensors
from duquantpp_jax.models import Decoder, DecoderConfig, Linear, dense
from duquantpp_jax.models.parameters import (
    LAYER,
    LINEARS,
    SITE_WEIGHTS,
    SITES,
    experts,
    layer_prefix,
    parameter_shapes,
    tensor_name,
)
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.site import PackedFloat, QuantizedLinear, QuantizedSite, quantize_input
from duquantpp_jax.ptq.walk import State, stack_layers
from duquantpp_jax.recipes import find_format
from duquantpp_jax.transforms.storage import from_arrays

METHOD = "duquantpp_jax"
JOB, REPORT = SEALED, "report.json"
TENSOR_SCALE = "tensor_scale"
"""Of the activations of a site, in a layer's file, where calibration has chosen it."""
AGAIN = "copy the file again, or quantize again with --overwrite"


def layer_file(number: int) -> str:
    """Name of a layer's file."""
    return f"layer-{number:05d}.safetensors"


def is_quantized(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory was written by `duquantpp quantize`, finished or not.

    >>> is_quantized("quantized")  # duquantpp quantize --out quantized
    True
    """
    return (Path(directory) / JOB).is_file()


class Quantized:
    """A quantized checkpoint whose weights are still on disk.

    >>> Quantized("quantized").job.recipe  # duquantpp quantize --out quantized
    'block_hadamard'

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
        self.job = read_job(self.directory)
        if not (self.directory / CONFIG).is_file():
            raise ValueError(
                f"{directory} is not finished: run the duquantpp quantize that began it again"
            )
        check_all_there(self.directory)
        sealed(self.directory / JOB)
        self.fields = Directory(self.directory).fields()
        with refusing(self.directory / CONFIG, AGAIN):
            about = self.fields.pop("quantization_config", {})
            if "model_type" in about:  # older directories kept it in its place
                self.fields["model_type"] = about["model_type"]
            self.config = DecoderConfig.from_dict(self.fields)
        found = len(list(self.directory.glob(layer_file(0).replace("00000", "*"))))
        if found != self.config.num_hidden_layers:
            raise ValueError(
                f"{directory} has {found} files of layers, and {CONFIG} says "
                f"{self.config.num_hidden_layers}: {AGAIN}"
            )

    @functools.cached_property
    def plan(self) -> Plan:
        """What was done to which linears."""
        return self.job.plan(self.config, done=True)

    @property
    def activation_formats(self) -> dict[str, str]:
        """Those of sites that have a quantized linear, by the full names of their formats."""
        layers = range(self.config.num_hidden_layers)
        formats = self.job.activation_formats.items()
        return {s: name for s, name in formats if any(self.plan.names(s, n) for n in layers)}

    def layer(self, number: int) -> tuple[dict[str, np.ndarray], dict[str, QuantizedSite]]:
        """What `read_layer` gives, checked against the seal, the job and config.json."""
        path, plan = sealed(self.directory / layer_file(number)), self.plan
        with refusing(path, AGAIN):
            return verified_layer(path, number, self.job, plan)

    def report(self) -> list[dict[str, Any]]:
        """What quantizing cost each linear (docs/quantize.md)."""
        path = sealed(self.directory / REPORT)
        kinds = {"linear": str, "bytes": int, "sqnr_db": int | float | None}
        with refusing(path, AGAIN):
            for row in (rows := read_json(path)["linears"]):
                files.check_fields(row, kinds)
        return rows

    def outside(self) -> dict[str, np.ndarray]:
        """Embedding, last norm and head, by tensor name, in the type they are stored in."""
        shapes = {n: s for n, s in parameter_shapes(self.config).items() if "*" not in n}
        found: dict[str, np.ndarray] = {}
        for path in sorted(self.directory.glob("outside-*.safetensors")):
            with refusing(sealed(path), AGAIN):
                tensors = load_file(path)
            check_finite(path, tensors)
            found |= tensors
        wanted = {f"{name}.weight": shape for name, shape in shapes.items()}
        if (shapes := {name: array.shape for name, array in found.items()}) != wanted:
            raise ValueError(
                f"{self.directory}: its outside-*.safetensors hold {shapes}, and config.json says "
                f"{wanted}: {AGAIN}"
            )
        return found


def read_job(directory: Path) -> Job:
    """The job of a directory; raises ValueError if there is none that this version reads."""
    described = read_json(path := directory / JOB, AGAIN)
    check_schema(path, described.get("schema"))
    with refusing(path, AGAIN):
        return Job.from_dict(described.get("job", {}))


def read_about(path: Path) -> dict[str, Any]:
    """What a layer's file says of it; raises ValueError if it is none that this version reads."""
    about = files.read_about(path, AGAIN)
    check_schema(path, about.get("schema"))
    return about


def about_layer(path: Path, number: int, job: Job) -> dict[str, Any]:
    """What a layer's file says of it; raises ValueError if it is of another layer or job."""
    about = read_about(path)
    with refusing(path, AGAIN):
        if about["layer"] != number:
            raise ValueError(f"{path} holds layer {about['layer']}, and not {number}: {AGAIN}")
        if other := Job.from_dict(about["job"]).difference(job):
            raise ValueError(f"{path} is of a job with {other}, which {JOB} says: {AGAIN}")
    return about


def check_schema(path: Path, schema: Any) -> None:
    """Raises ValueError unless this version reads the schema."""
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        raise ValueError(
            f"{path} has schema {schema!r}, and this version reads {SCHEMA}: "
            + ("install a newer duquantpp_jax" if newer else "quantize again with --overwrite")
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
        scale = moved.get(TENSOR_SCALE)
        scale = None if scale is None else jnp.asarray(scale)
        parts = fitted.transform, weights, fitted.clip, fitted.scale_offset, scale
        sites[site] = QuantizedSite(*parts)
    names = {name: name.removeprefix(prefix).removesuffix(".weight") for name in tensors}
    own = (name for name in names if name == prefix + tensor_name(names[name]))
    return {names[n]: tensors[n] for n in own if names[n] not in LINEARS}, sites


def verified_layer(
    path: Path, number: int, job: Job, plan: Plan
) -> tuple[dict[str, np.ndarray], dict[str, QuantizedSite]]:
    """What `read_layer` gives; raises ValueError unless it is what the job makes of this layer."""
    about_layer(path, number, job)
    rest, sites = read_layer(path)
    every = parameter_shapes(plan.config).items()
    shapes = {name.removeprefix(LAYER): shape[1:] for name, shape in every if LAYER in name}
    found = {name: array.shape for name, array in rest.items()}
    for site, state in sites.items():
        found |= zip(SITE_WEIGHTS[site], (w.shape for w in state.weights), strict=True)
        leaves = jax.tree.leaves(dataclasses.replace(state, weights=()))
        for array in leaves:
            check_finite(path, {site: np.asarray(array)})
        for name, weight in zip(SITE_WEIGHTS[site], state.weights, strict=True):
            packed = weight.packed if isinstance(weight, PackedFloat) else weight
            if not isinstance(packed, MXArray):
                check_finite(path, {name: np.asarray(packed)})
            elif count := _nan_scales(packed):
                raise ValueError(f"{path}: {name} has NaN or Inf in {count} scales: {AGAIN}")
    for site, width in plan.widths(number).items():
        names, format = plan.names(site, number), plan.recipes[site].weight_format
        for name, weight in zip(SITE_WEIGHTS[site], sites[site].weights, strict=True):
            kind = isinstance(weight, MXArray) and weight.block_size
            if kind != (name in names and format.block_size):
                raise ValueError(f"{path}: {name} has blocks of {kind}, and not of {format}")
            if name in names:
                shapes[name] = (*shapes[name][:-1], width)
        state = dataclasses.replace(sites[site], weights=())
        if experts(plan.config, site):  # the first of them, without compiling a slice
            state = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[0]), state)
        wanted = dict(plan.formats)[site].calibrated_scale(jnp.float32(1))
        if (wanted is None) != (state.tensor_scale is None):
            raise ValueError(f"{path}: {site} has a scale for activations, or none: {AGAIN}")
        x = jax.ShapeDtypeStruct((1, width), jnp.float32)
        moved = _seen.eval_shape(x, state, format=dict(plan.formats)[site])
        if moved.shape != x.shape:
            raise ValueError(f"{path}: {site} of width {width} is moved to {moved.shape[1]}")
    if found != shapes:
        name = next(n for n in shapes | found if shapes.get(n) != found.get(n))
        raise ValueError(
            f"{path}: {name} has shape {found.get(name)}, and {CONFIG} says {shapes.get(name)}: "
            f"{AGAIN}"
        )
    check_finite(path, rest)
    return rest, sites


def _nan_scales(array: MXArray) -> int:
    """How many scales are NaN or Inf: byte 255 of E8M0, magnitude 127 of E4M3."""
    scales = np.asarray(array.scales)
    if array.tensor_scale is not None and not np.isfinite(array.tensor_scale).all():
        return scales.size
    if scales.dtype == np.float32:
        return int(np.count_nonzero(~np.isfinite(scales)))
    mask = 255 if scales.dtype == jnp.float8_e8m0fnu else 127
    return int(np.count_nonzero(scales.view(np.uint8) & mask == mask))


@functools.partial(jax.jit, static_argnames="format")
def _seen(x: Array, site: QuantizedSite, *, format: Format) -> Array:
    return quantize_input(x, site, format)


def load_quantized(directory: str | os.PathLike[str]) -> tuple[Decoder, QuantizedLinear, State]:
    """A quantized model: `model(tokens, linear, state)` gives the logits it had when quantized.

    >>> model, linear, state = load_quantized("quantized")  # duquantpp quantize --out quantized
    >>> state["mlp_in"].weights[0].elements.dtype.name
    'float4_e2m1fn'

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

    >>> list(load_any("quantized")[2])  # duquantpp quantize --out quantized
    ['attention_in', 'attention_out', 'mlp_in', 'mlp_out']

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
