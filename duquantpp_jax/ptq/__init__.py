"""Post-training quantization: the walk over a model's layers, and what it does at each site."""
