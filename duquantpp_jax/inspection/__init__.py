"""`duquantpp inspect`: where a model's outliers sit, and what a quantized model holds."""

from duquantpp_jax.inspection.look import Inspection, InspectOptions, inspect
from duquantpp_jax.inspection.show import figures_of, sentence, table

__all__ = ["InspectOptions", "Inspection", "figures_of", "inspect", "sentence", "table"]
