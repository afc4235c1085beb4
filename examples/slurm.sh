#!/bin/bash
# Two nodes of eight GPUs, one process per GPU; SIGTERM comes two minutes before the time is over, the run saves
# and leaves with code 75, and the job goes back into the queue:  sbatch examples/slurm.sh
#SBATCH --job-name=clustr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue

srun .venv/bin/python run.py --config=configs/cifar10.py:clustr_qtrades \
  --workdir="$SLURM_SUBMIT_DIR/runs/cifar10-clustr_qtrades" --platform=cuda --coordinator=auto
code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
