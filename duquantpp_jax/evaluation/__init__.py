"""What a model predicts on rows of text, its distance from another, and how sure that is.

>>> from duquantpp_jax.checkpoints import load_tokenizer, testbed
>>> model = testbed.load()
>>> rows = rows_of_text("once upon a time " * 60, load_tokenizer(testbed.directory()), bos=0,
...                     protocol=Protocol(stream=True, window=63, bos=True))
>>> reference = Reference(Predictor(model), rows.tokens[:2])
>>> sums: RowSums = reference.row_sums(Predictor(model))  # here a quantized one
>>> sums.kl.tolist(), sums.agreement.tolist()
([0.0, 0.0], [63.0, 63.0])
"""

from duquantpp_jax.evaluation.intervals import Estimate, clusters, estimate, holm
from duquantpp_jax.evaluation.predict import Predictor, Reference, RowSums, kl_divergence
from duquantpp_jax.evaluation.rows import PROTOCOLS, Protocol, Rows, read_text, rows_of_text
from duquantpp_jax.evaluation.sqnr import linear_sqnr, mean_sqnr

__all__ = ["PROTOCOLS", "Estimate", "Predictor", "Protocol", "Reference", "RowSums", "Rows"]
__all__ += ["clusters", "estimate", "holm", "kl_divergence", "linear_sqnr", "mean_sqnr"]
__all__ += ["read_text", "rows_of_text"]
