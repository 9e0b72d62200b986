"""A float checkpoint read a layer at a time, so that it may be larger than memory; turned, where
rotations of its residual stream and value heads are given (ptq/stream.py)."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Integer

from duquantpp_jax.checkpoints.experts import linears
from duquantpp_jax.checkpoints.hugging_face import headers, load_config
from duquantpp_jax.checkpoints.online import moved_online
from duquantpp_jax.checkpoints.shards import read_stored
from duquantpp_jax.checkpoints.source import source
from duquantpp_jax.core import MXArray
from duquantpp_jax.models import Decoder, DecoderConfig
from duquantpp_jax.models.parameters import EMBEDDING, HEAD, LAYER, NORM
from duquantpp_jax.ptq.stream import Turn

LARGEST_SCALE = 252
"""The last E8M0 byte whose products with elements of E2M1 are all finite in float32."""


class Checkpoint:
    """A float checkpoint whose headers have been checked and whose weights are still on disk.

    Attributes:
      found: Where each tensor lies.
      places: The parameter that each tensor fills.
      config: What its config.json says; of the turned model.
      linears: The stored linears that each linear is, or is made of.
      moved: How inputs of stored linears are moved when the model runs.

    Raises:
      ValueError: As `load`, but for what only the weights themselves show; or there is no such
        rotation.
    """

    def __init__(self, directory: str | os.PathLike[str], turn: Turn | None = None):
        self.directory, self._turn = Path(directory), turn or Turn()
        self.source, config, self.found, self.places = headers(directory)
        self._tied, self.config = config.tie_word_embeddings, self._turn.config(config)
        self.linears = linears(config)
        names = dict.fromkeys(name for parts in self.linears.values() for name in parts)
        self.moved = moved_online(self.source.fields(), [*names])

    def size(self) -> int:
        """Bytes of the files that hold the weights."""
        files = {tensor.shard for tensor in self.source.tensors().values()}
        return sum(path.stat().st_size for path in files)

    def layer_tensors(self, number: int) -> dict[str, str]:
        """Tensor names of a layer, and the parameter inside the layer that each fills."""
        return {
            name: place.key.removeprefix(LAYER)
            for name, place in self.places.items()
            if place.key.startswith(LAYER) and place.index == number
        }

    @property
    def packed(self) -> bool:
        """Whether it has packed weights."""
        return any(getattr(tensor, "packed", None) for tensor in self.found.values())

    @property
    def parameter_bytes(self) -> float:
        """Bytes of a parameter as it is read, in the mean; packed ones are decoded to bfloat16."""
        sizes = [(math.prod(t.shape), 4 if t.dtype == "F32" else 2) for t in self.found.values()]
        return sum(count * each for count, each in sizes) / sum(count for count, _ in sizes)

    def check_unmoved(self) -> None:
        """Raises ValueError if inputs are moved online: decoded weights are no float model then."""
        if self.moved:
            raise ValueError(
                f"{self.directory} has weights for inputs that its transform_config moves: "
                "give the model that they were made from"
            )

    def layer(self, number: int) -> dict[str, Float[np.ndarray, "..."]]:
        """The parameters of a layer, as `read_stored` gives them; packed ones are decoded."""
        self.check_unmoved()
        names = self.layer_tensors(number)
        stored = {names[name]: array for name, array in read_stored(self.found, names)}
        return self._turn.layer(self.config, number, stored)

    def layer_as_stored(
        self, number: int
    ) -> tuple[dict[str, Float[np.ndarray, "..."]], dict[str, MXArray]]:
        """The parameters of a layer that are floats, and those that are packed.

        Raises:
          ValueError: A weight is NaN or Inf.
        """
        names, packed = self.layer_tensors(number), {}
        for name, inside in names.items():
            if (decode := getattr(self.found[name], "packed", None)) is not None:
                packed[inside] = decode()
                if _may_be_infinite(packed[inside]):
                    next(read_stored(self.found, [name]))  # checks the numbers
        floats = [name for name, inside in names.items() if inside not in packed]
        return {names[n]: array for n, array in read_stored(self.found, floats)}, packed

    def outside(self) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
        """What belongs to no layer, tensor by tensor: embedding, untied head, last norm."""
        norm, matrix = self._read(NORM), self._embedding()
        yield f"{EMBEDDING}.weight", self._turn.outside(self.config, matrix)
        if not self.config.tie_word_embeddings:
            matrix = matrix if self._tied else self._read(HEAD)
            yield f"{HEAD}.weight", self._turn.outside(self.config, matrix, norm)
        plain = np.full_like(norm, 1 - self.config.norm_offset)
        yield f"{NORM}.weight", norm if self._turn.stream is None else plain

    def embed(
        self, tokens: Integer[np.ndarray, "rows length"]
    ) -> Float32[np.ndarray, "rows length k"]:
        """The hidden states before the first layer."""
        embedding = self._turn.outside(self.config, self._embedding())
        return embedding[tokens].astype(np.float32) * np.float32(self.config.embedding_scale)

    def decoder(self) -> Decoder:
        """The whole model in memory, as `take_layers` has its parameters."""
        layers = [self.layer(number) for number in range(self.config.num_hidden_layers)]
        return Decoder(self.config, take_layers(layers) | outermost(self.outside()))

    def _embedding(self) -> Float[np.ndarray, "vocab k"]:
        """As stored; raises ValueError if a tied head is stored that differs from it."""
        matrix, stored = self._read(EMBEDDING), f"{HEAD}.weight" in self.places
        if self._tied and stored and not np.array_equal(self._read(HEAD), matrix):
            raise ValueError(
                f"{self.directory}: lm_head.weight differs from model.embed_tokens.weight, but "
                "config.json says tie_word_embeddings: it must be false, or the two equal"
            )
        return matrix

    def _read(self, name: str) -> Float[np.ndarray, "..."]:
        ((_, array),) = read_stored(self.found, [f"{name}.weight"])
        return array


def _may_be_infinite(array: MXArray) -> bool:
    if (whole := array.tensor_scale) is None:
        return int(array.scale_bytes().max()) > LARGEST_SCALE
    return not np.isfinite(whole).all() or int((array.scale_bytes() & 127).max()) == 127


def outline(
    directory: str | os.PathLike[str], turn: Turn, *, weights: bool
) -> tuple[DecoderConfig, bool, float]:
    """The turned model's configuration, whether weights are packed, and bytes of a parameter.

    Args:
      weights: Whether they must be there; else config.json is enough, which says all three.
    """
    path = Path(directory)
    if weights or not path.is_dir() or any(path.glob("*.safetensors*")):
        checkpoint = Checkpoint(directory, turn)
        checkpoint.check_unmoved()
        return checkpoint.config, checkpoint.packed, checkpoint.parameter_bytes
    fields = source(directory).fields()
    packed, kind = "quantization_config" in fields, fields.get("dtype", fields.get("torch_dtype"))
    return turn.config(load_config(directory)), packed, 4.0 if kind == "float32" else 2.0


def take_layers(layers: Sequence[dict[str, np.ndarray]]) -> dict[str, Float[Array, "layers ..."]]:
    """The parameters of a decoder's layers, taken out of the mappings one by one, so that the
    host has no second copy of the model.

    They stay in the types that they have; those that differ in it from layer to layer are widened
    to float32.
    """

    def joined(name: str) -> Array:
        arrays = [layer.pop(name) for layer in layers]
        kinds = {array.dtype for array in arrays}
        return jnp.asarray(np.stack(arrays, dtype=np.float32 if len(kinds) > 1 else None))

    return {LAYER + name: joined(name) for name in tuple(layers[0])}


def outermost(tensors: Iterable[tuple[str, np.ndarray]]) -> dict[str, Float[Array, "..."]]:
    """The parameters that belong to no layer, of pairs of a tensor's name and array."""
    return {name.removesuffix(".weight"): jnp.asarray(array) for name, array in tensors}


def load(directory: str | os.PathLike[str]) -> Decoder:
    """The float decoder in a Hugging Face directory, or whatever else `source` takes.

    Parameters in bfloat16 and float16 stay so in memory. The model widens a layer's while the layer
    runs, which is exact.

    >>> from duquantpp_jax.checkpoints import testbed  # or any Hugging Face directory
    >>> model = load(testbed.directory())
    >>> model.config.num_hidden_layers, model.config.hidden_size
    (4, 256)

    Raises:
      ValueError: One line naming the file or tensor, what was wrong and what would be right.
    """
    return Checkpoint(directory).decoder()
