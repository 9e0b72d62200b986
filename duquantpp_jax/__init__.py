"""duquantpp_jax: rotations, MX scale rules and rounding for 4-bit language models, in JAX."""
