"""python -m clustr_jax.prepare NAME [DIR]: downloads a data set, once; see clustr_jax.data.prepare."""

import sys

from clustr_jax.data.prepare import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
