"""What `duquantpp kernels` is asked."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Options:
    """Compile every kernel for a GPU that is not there, and read its machine code.

    Attributes:
      target: The GPU.
      json: Print the table as JSON.
      only: Only cases whose kernel, shape or label contains this text.
    """

    target: str = "b200"
    json: bool = False
    only: str = ""
