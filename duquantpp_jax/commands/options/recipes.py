"""What `duquantpp recipes` is asked."""

import dataclasses

from duquantpp_jax.commands.options.common import Plain, Printing, Terminal


@dataclasses.dataclass(frozen=True)
class RecipesOptions(Plain):
    """Lists recipes, roundings and formats: what each does, what it costs, and its source."""

    terminal: Printing = Terminal()
