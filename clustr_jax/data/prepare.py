"""python -m clustr_jax.prepare NAME [DIR]: downloads a data set, once, to be read without TensorFlow.

Needs tensorflow-cpu (`make prepare-tf`). DIR is $TFDS_DATA_DIR, or TFDS' own default, unless it is given.
"""

import sys

from clustr_jax import data
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.programs import program


@program(computes=False)
def main(argv: list[str]) -> int:
    """Returns the exit code: 0 done, 2 a name that does not exist, TensorFlow or the network missing."""
    name = data.ALIASES.get(argv[0], argv[0]) if argv else ""
    usage = f"usage: python -m clustr_jax.prepare {{{','.join(data.PREPARED)}}} [DIR]"
    if argv and argv[0] in ("-h", "--help"):
        print(usage)
        return 0
    if name not in data.PREPARED or len(argv) > 2:
        print(usage, file=sys.stderr)
        return 2
    directory = argv[1] if len(argv) > 1 else data.default_data_dir()
    try:
        import tensorflow_datasets as tfds

        # array_record files can be read in any order, as data.prepared does
        tfds.builder(name, data_dir=directory, file_format="array_record").download_and_prepare()
    except Exception as error:  # TFDS passes on whatever the network and TensorFlow have to say
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name} could not be downloaded and prepared in {directory}: {reason}; it needs the "
            f"network and TensorFlow (make prepare-tf)"
        ) from error
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
