"""What `duquantpp kernels` is asked."""

import dataclasses

from duquantpp_jax.commands.options.common import Plain, Printing, Terminal


@dataclasses.dataclass(frozen=True)
class Options(Plain):
    """Compile every kernel for a GPU that is not there, and read its machine code.

    Attributes:
      target: The GPU.
      only: Only cases whose kernel, shape or label contains this text.
    """

    target: str = "b200"
    only: str = ""
    terminal: Printing = Terminal()
