"""`python -m duquantpp_jax` is the command `duquantpp`."""

import sys

from duquantpp_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
