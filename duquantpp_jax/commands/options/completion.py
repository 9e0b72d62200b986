"""What `duquantpp completion` is asked."""

import dataclasses
from typing import Literal

import tyro

from duquantpp_jax.commands.options.common import Plain, Printing, Terminal


@dataclasses.dataclass(frozen=True)
class CompletionOptions(Plain):
    """Prints a script that completes commands and options in a shell.

    For bash: source <(duquantpp completion bash). For fish: duquantpp completion fish | source. For
    zsh: duquantpp completion zsh > DIR/_duquantpp, where DIR is in fpath. Scripts ask python3.
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """The shell."""
    terminal: Printing = Terminal()
