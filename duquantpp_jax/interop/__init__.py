"""Other programs' ways to a model: PyTorch loads an export, clients of OpenAI's HTTP interface ask.

torch_models.py loads; the other files are `duquantpp serve`: requests, the queue of texts, the ASGI
application.
"""

from duquantpp_jax.interop.torch_models import load_transformers

__all__ = ["load_transformers"]
