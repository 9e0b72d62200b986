"""Other programs' ways to a model: PyTorch loads an export, qwix takes our formats in its rules,
clients of OpenAI's HTTP interface ask.

torch_models.py loads, qwix_rules.py is for qwix; the other files are `duquantpp serve`: requests,
the queue of texts, the ASGI application.
"""

from duquantpp_jax.interop.qwix_rules import from_qwix, qwix_provider, to_qwix
from duquantpp_jax.interop.torch_models import load_transformers

__all__ = ["from_qwix", "load_transformers", "qwix_provider", "to_qwix"]
