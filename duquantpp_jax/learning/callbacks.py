"""What is called with the numbers of learning: a function of the step and of numbers by name.

    callback(step, {"loss": .., "held_out_loss": ..})

`train`, `learn` and `learn_fits` call it at every check. `tensorboard` and `wandb` are contexts
that give one; their libraries are imported only there.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from duquantpp_jax import files

Callback = Callable[[int, Mapping[str, float]], object]


@contextlib.contextmanager
def tensorboard(directory: str | os.PathLike[str]) -> Iterator[Callback]:
    """Writes numbers as scalars of TensorBoard.

    Args:
      directory: For the event files; a run that goes on adds one.

    Raises:
      ValueError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "writing for TensorBoard needs tensorboardX: pip install 'duquantpp_jax[tensorboard]'"
        ) from None
    with SummaryWriter(os.fspath(directory)) as writer:

        def log(step: int, numbers: Mapping[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        yield log


@contextlib.contextmanager
def wandb(project: str, **settings: Any) -> Iterator[Callback]:
    """Logs numbers to a run of wandb, which ends with the context.

    Args:
      settings: Others of wandb.init, as config or mode.

    Raises:
      ValueError: wandb is not installed, or does not begin.
    """
    try:
        import wandb as library  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("logging needs wandb: pip install 'duquantpp_jax[wandb]'") from None
    try:
        begun = library.init(project=project, **settings)
    except Exception as error:  # its own kinds, as of no key and no network
        raise ValueError(f"wandb does not begin: {files.one_line(error)}") from None
    with begun as run:
        yield lambda step, numbers: run.log(dict(numbers), step=step)


def each(*callbacks: Callback) -> Callback:
    """A callback that calls each of several."""

    def call(step: int, numbers: Mapping[str, float]) -> None:
        for callback in callbacks:
            callback(step, numbers)

    return call
