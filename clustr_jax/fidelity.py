"""python -m clustr_jax.fidelity: the authors' switches as a table; see clustr_jax.reference.switches."""

import sys

from clustr_jax.reference.switches import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
