"""duquantpp_jax: rotations, MX scale rules and rounding for 4-bit language models, in JAX.

Here are the five nouns and the calls that most programs start from. Each is imported when it is
first asked for, so that the command line can answer before JAX is there.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from duquantpp_jax.checkpoints import load, load_quantized, load_tokenizer
    from duquantpp_jax.core import (
        Chain,
        Fitted,
        Format,
        MXArray,
        Needs,
        Recipe,
        ScaleRule,
        Stats,
        Transform,
    )
    from duquantpp_jax.evaluation import Predictor, Reference
    from duquantpp_jax.formats import MXFP4, MXFP6, MXFP8, NVFP4
    from duquantpp_jax.kernels import quantized_linear
    from duquantpp_jax.lab import Cell
    from duquantpp_jax.models import Decoder, DecoderConfig
    from duquantpp_jax.ptq import (
        MXLinear,
        Plan,
        calibrate,
        convert,
        fit_linear,
        quantize,
        quantize_decoder,
        quantize_linear,
    )
    from duquantpp_jax.recipes import FITS, FORMATS, ROUNDINGS, fake_quantize, recipe

__version__ = "0.1.0"

__all__ = ["Chain", "Fitted", "Format", "MXArray", "Needs", "Recipe", "ScaleRule", "Stats"]
__all__ += ["MXFP4", "MXFP6", "MXFP8", "NVFP4", "Transform"]
__all__ += ["FITS", "FORMATS", "Cell", "Decoder", "DecoderConfig", "Plan", "Predictor"]
__all__ += ["ROUNDINGS", "Reference", "calibrate", "fit_linear", "load", "load_quantized"]
__all__ += ["load_tokenizer", "quantize_decoder", "quantize_linear", "quantized_linear", "recipe"]
__all__ += ["MXLinear", "convert", "fake_quantize", "quantize"]

_NOUNS = ("Chain", "Fitted", "Format", "MXArray", "Needs", "Recipe", "ScaleRule", "Stats")
_QUANTIZERS = ("quantize_decoder", "quantize_linear")
_LATER = {
    "checkpoints": ("load", "load_quantized", "load_tokenizer"),
    "core": (*_NOUNS, "Transform"),
    "evaluation": ("Predictor", "Reference"),
    "formats": ("MXFP4", "MXFP6", "MXFP8", "NVFP4"),
    "kernels": ("quantized_linear",),
    "lab": ("Cell",),
    "models": ("Decoder", "DecoderConfig"),
    "ptq": ("MXLinear", "Plan", "calibrate", "convert", "fit_linear", "quantize", *_QUANTIZERS),
    "recipes": ("FITS", "FORMATS", "ROUNDINGS", "fake_quantize", "recipe"),
}


def __getattr__(name: str) -> Any:
    for room, names in _LATER.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
