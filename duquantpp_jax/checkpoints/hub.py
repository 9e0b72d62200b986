"""Models of the Hugging Face hub, by `hf:ORG/NAME`, or `hf:ORG/NAME@REVISION`.

The name itself asks for the download; what the hub's own cache has is not downloaded again. Nothing
else in this package uses the network, except `evaluate --download`.
"""

import functools
import re
from pathlib import Path

from duquantpp_jax import files

PREFIX = "hf:"
PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE*", "NOTICE*")
"""The files that are read; weights in pickles and other formats are left out."""
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


@functools.cache
def snapshot(name: str) -> Path:
    """The directory of a model of the hub, downloaded where the cache does not have it.

    Args:
      name: As at the top of this file.

    Raises:
      ValueError: This is no such name, huggingface_hub is not installed, or the hub did not give
        the model.
    """
    if (parts := _NAME.fullmatch(name.removeprefix(PREFIX))) is None:
        raise ValueError(
            f"{name} names no model of the hub: give hf:ORG/NAME or hf:ORG/NAME@COMMIT"
        )
    try:
        from huggingface_hub import snapshot_download  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"{name} needs huggingface_hub: pip install 'duquantpp_jax[hub]', or download the "
            "model and give its directory"
        ) from None
    try:
        found = snapshot_download(
            parts[1],
            revision=parts[2],
            allow_patterns=list(PATTERNS),
            ignore_patterns=["*/*"],  # a pattern matches in every directory
        )
    except Exception as error:  # of several libraries: no network, no such model, no permission
        raise ValueError(
            f"cannot get {name} ({type(error).__name__}: {files.one_line(error)}): check the name "
            "and the network, or give the directory of a model that is on this machine"
        ) from None
    return Path(found)
