"""python -m clustr_jax is the command clustr-jax."""

from clustr_jax.command import console

if __name__ == "__main__":
    console()
