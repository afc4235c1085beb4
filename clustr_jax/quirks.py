"""python -m clustr_jax.quirks WORKDIR: what each departure of the paper buys; see evaluation.quirks."""

import sys

from clustr_jax.evaluation.quirks import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
