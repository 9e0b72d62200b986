"""Everything that is read from or written to a disk as a model."""

from duquantpp_jax.checkpoints.directory import Quantized, is_quantized, load_any, load_quantized
from duquantpp_jax.checkpoints.hugging_face import load_config, load_tokenizer, save, sha256
from duquantpp_jax.checkpoints.job import Job
from duquantpp_jax.checkpoints.lazy import load

__all__ = ["Job", "Quantized", "is_quantized", "load", "load_any", "load_config", "load_quantized"]
__all__ += ["load_tokenizer", "save", "sha256"]
