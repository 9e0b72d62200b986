"""Post-training quantization: the walk over a model's layers, and what it does at each site."""

from duquantpp_jax.ptq.calibration import calibrate
from duquantpp_jax.ptq.fuse import fuse_layer, online_cost
from duquantpp_jax.ptq.modules import convert, quantize
from duquantpp_jax.ptq.mx_linear import MXLinear
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.report import ModuleReport
from duquantpp_jax.ptq.site import QuantizedLinear, QuantizedSite, fit_linear, quantize_linear
from duquantpp_jax.ptq.stores import store
from duquantpp_jax.ptq.walk import fit_decoder, quantize_decoder, quantize_layer

__all__ = ["Plan", "QuantizedLinear", "QuantizedSite", "calibrate", "fit_decoder", "fit_linear"]
__all__ += ["fuse_layer", "online_cost", "quantize_decoder", "quantize_layer", "quantize_linear"]
__all__ += ["MXLinear", "ModuleReport", "convert", "quantize", "store"]
