"""Train, evaluate and report on one work directory. Run again, it resumes.

python run.py --config=configs/cifar10.py:clustr_qtrades [--workdir=DIR]
python run.py --help        and --list, which says what each config, method and variant is

The program is clustr_jax/command/train.py; `clustr-jax train` is the same one.
"""

import sys

from clustr_jax.command.train import _prepare_process, main, program  # noqa: F401

if __name__ == "__main__":
    program(sys.argv)
