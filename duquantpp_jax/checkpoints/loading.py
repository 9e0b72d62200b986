"""Any model's directory, float or quantized: what to call as `model(tokens, linear, state)`."""

import os
from typing import Any

from duquantpp_jax.checkpoints import is_quantized, load, load_quantized
from duquantpp_jax.models import Decoder, Linear, dense


def load_any(directory: str | os.PathLike[str]) -> tuple[Decoder, Linear, Any]:
    """The model in a directory: decoder, the `linear` that it calls, and that linear's state.

    Raises:
      ValueError: It is no model, or one that is not supported; one line that says why.
    """
    if is_quantized(directory):
        return load_quantized(directory)
    return load(directory), dense, None
