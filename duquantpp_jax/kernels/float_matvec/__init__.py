"""Products of few tokens in float with packed weights, as decoding in W4A16 needs them."""
