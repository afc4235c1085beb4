"""python -m clustr_jax.fidelity: the authors' switches as a table; see clustr_jax.reference.switches."""

from clustr_jax.reference.switches import table

if __name__ == "__main__":
    print(table())
