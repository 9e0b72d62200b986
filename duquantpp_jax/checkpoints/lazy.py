"""A float checkpoint read a layer at a time, so that it may be larger than memory."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Integer

from duquantpp_jax.checkpoints.hugging_face import Headers, headers
from duquantpp_jax.checkpoints.shards import read_stored
from duquantpp_jax.models.parameters import EMBEDDING, LAYER


class Checkpoint:
    """A float checkpoint whose headers have been checked and whose weights are still on disk.

    Attributes:
      directory: Where it is.
      config: What its config.json says.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        """Args:
          directory: As for `load`.

        Raises:
          ValueError: As `load`, but for what only the weights themselves show.
        """
        self.directory = Path(directory)
        self._headers: Headers = headers(directory)
        self.config = self._headers.config

    def layer_tensors(self, number: int) -> dict[str, str]:
        """Tensor names of a layer, and the parameter inside the layer that each fills."""
        return {
            name: place.key.removeprefix(LAYER)
            for name, place in self._headers.places.items()
            if place.key.startswith(LAYER) and place.index == number
        }

    def layer(self, number: int) -> dict[str, Float[np.ndarray, "..."]]:
        """The parameters of a layer, in the type that they are stored in.

        Raises:
          ValueError: A tensor has NaN or Inf, or a shard is truncated.
        """
        names = self.layer_tensors(number)
        return {names[name]: array for name, array in read_stored(self._headers.found, names)}

    def outside(self) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
        """What belongs to no layer, tensor by tensor: embedding, last norm, head."""
        places = self._headers.places
        names = [name for name, place in places.items() if not place.key.startswith(LAYER)]
        for name in names:
            yield from read_stored(self._headers.found, [name])  # one at a time in memory

    def embed(
        self, tokens: Integer[np.ndarray, "rows length"]
    ) -> Float32[np.ndarray, "rows length k"]:
        """The hidden states before the first layer."""
        ((_, embedding),) = read_stored(self._headers.found, [f"{EMBEDDING}.weight"])
        return embedding[tokens].astype(np.float32)
