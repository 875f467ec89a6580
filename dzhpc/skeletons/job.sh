#!/bin/sh
#SBATCH --job-name=NAME
#SBATCH --ntasks=2
#SBATCH --cpus-per-task=1
#SBATCH --time=1:00:00
#SBATCH --signal=B:USR1@180 --requeue --open-mode=append
# Run:  sbatch NAME/job.sh        from the folder that holds NAME/; without Slurm: sh NAME/job.sh
export OMP_NUM_THREADS=1
BEFORE
# shortly before its time is up the job is warned, stops with a checkpoint (exit code 75), and is submitted again
trap 'kill -USR1 $pid' USR1
mpirun -n "${SLURM_NTASKS:-2}" python -m dzhpc.train NAME/NAME.toml & pid=$!
while kill -0 $pid 2> /dev/null; do wait $pid; code=$?; done
if [ "$code" = 138 ]; then wait $pid; code=$?; fi # it ended while the warning was passed on
if [ "$code" = 75 ] && [ -n "$SLURM_JOB_ID" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
