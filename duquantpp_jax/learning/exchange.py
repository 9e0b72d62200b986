"""The state of learning as a checkpoint of orbax, and back.

Orbax has no hash of what it wrote: a run goes on from the project's own file (learning/state.py),
and what comes from orbax gets a new hash.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from duquantpp_jax import files

AGAIN = "give the state of an unfinished run of duquantpp learn, a file in --out/progress"


def to_orbax(state: str | os.PathLike[str], directory: str | os.PathLike[str]) -> None:
    """Writes a state as a checkpoint of orbax: its tensors by name, and its settings.

    Args:
      state: A file that learning has written.
      directory: Where nothing stands yet.

    Raises:
      ValueError: The file is no state, or orbax is not installed.
    """
    orbax = _orbax()
    tensors, about = files.read_tensors(Path(state), AGAIN)
    items = orbax.args.Composite(
        tensors=orbax.args.StandardSave(tensors), about=orbax.args.JsonSave(about)
    )
    with orbax.Checkpointer(orbax.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(Path(directory).resolve(), items)


def from_orbax(directory: str | os.PathLike[str], state: str | os.PathLike[str]) -> None:
    """Writes the state that `to_orbax` wrote; its numbers are what orbax reads.

    Raises:
      ValueError: The directory is no such checkpoint, or orbax is not installed.
    """
    orbax, place = _orbax(), Path(directory).resolve()
    with files.refusing(place, "give a directory that to_orbax wrote"):
        with orbax.Checkpointer(orbax.CompositeCheckpointHandler()) as checkpointer:
            items = orbax.args.Composite(
                tensors=orbax.args.StandardRestore(), about=orbax.args.JsonRestore()
            )
            found = checkpointer.restore(place, items)
        tensors = {name: np.asarray(value) for name, value in found["tensors"].items()}
        about = dict(found["about"])
    files.write_tensors(Path(state), tensors, about)


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError:
        raise ValueError("this needs orbax: pip install 'duquantpp_jax[orbax]'") from None
    return orbax.checkpoint
