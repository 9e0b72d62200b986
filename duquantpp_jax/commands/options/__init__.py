"""The options of every command: frozen dataclasses that import nothing which computes.

`--help` and what the parser refuses wait for these files alone, and not for JAX.
"""

from duquantpp_jax.commands.options.ablate import AblateFile, AblateOptions
from duquantpp_jax.commands.options.compare import CompareOptions
from duquantpp_jax.commands.options.completion import CompletionOptions
from duquantpp_jax.commands.options.evaluate import EvaluateOptions
from duquantpp_jax.commands.options.export import ExportOptions
from duquantpp_jax.commands.options.generate import GenerateOptions
from duquantpp_jax.commands.options.inspect import InspectOptions
from duquantpp_jax.commands.options.kernels import Options as KernelOptions
from duquantpp_jax.commands.options.learn import LearnOptions, LearnSettings
from duquantpp_jax.commands.options.quantize import QuantizeOptions
from duquantpp_jax.commands.options.recipes import RecipesOptions
from duquantpp_jax.commands.options.serve import ServeOptions

__all__ = ["AblateFile", "AblateOptions", "CompareOptions", "CompletionOptions"]
__all__ += ["EvaluateOptions", "ExportOptions"]
__all__ += ["GenerateOptions", "InspectOptions", "KernelOptions", "LearnOptions", "LearnSettings"]
__all__ += ["QuantizeOptions", "RecipesOptions", "ServeOptions"]
