"""What `duquantpp recipes` is asked."""

import dataclasses

from duquantpp_jax.commands.options.common import Flag


@dataclasses.dataclass(frozen=True)
class RecipesOptions:
    """Lists recipes, roundings and formats: what each does, what it costs, and its source.

    Attributes:
      json: Print them as JSON.
    """

    json: Flag = False
