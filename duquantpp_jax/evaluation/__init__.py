"""What a model predicts on rows of text, its distance from another, and how sure that is."""

from duquantpp_jax.evaluation.predict import Predictor, Reference

__all__ = ["Predictor", "Reference"]
