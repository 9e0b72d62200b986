"""Products of few tokens with packed weights, as decoding needs them."""
