#!/bin/bash
# The solver-in-the-loop campaign (inputs/sol.toml): reference simulations, training by queries, evaluation. From the root of the clone:
#   bash slurm/sol.sh                                   # submits the three jobs, each waits until the one before has succeeded
#   INPUT=inputs/sol-small.toml SBATCH="sbatch --ntasks=2 --gpus-per-task=0" bash slurm/sol.sh --set run.seed=1
#   sbatch slurm/sol.sh train --set run.name=FO-SOL --set zo.estimator=autograd         # one stage: simulate, train or evaluate
#   EVALUATE="runs/FO-SOL runs/NON" sbatch slurm/sol.sh evaluate                        # several runs in one table
# Arguments behind the script's name, or the stage's, reach `python -m dzhpc.simulate` and `python -m dzhpc.train`; those of EVALUATE
# reach `python -m dzhpc.evaluate`. Needs: pip install -e '.[sol]', for the simulators of the wake.

#SBATCH --job-name=sol
#SBATCH --ntasks=4                  # ranks; any number gives the same bits, also after a requeue with another one
#SBATCH --gpus-per-task=1           # delete on a cluster without GPUs, and raise --ntasks: one rank a core
#SBATCH --cpus-per-task=1           # run.threads of the input
#SBATCH --time=24:00:00             # of one stretch: a job requeues itself until its stage is finished
#SBATCH --requeue                   # lets it, and lets Slurm after a node failure
#SBATCH --open-mode=append          # a requeued job must not truncate what it printed before
#SBATCH --signal=B:USR1@120         # B: to this script, which forwards it; without, nobody would hear it under mpirun
export INPUT=${INPUT:-inputs/sol.toml}
export EVALUATE=${EVALUATE:-}

# slurmd runs a copy of this script in a folder of its own, so files beside it are found through the folder of the sbatch.
source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/launch.sh" || { echo "submit from the root of the clone" >&2; exit 4; }

if [ -z "${SLURM_JOB_ID:-}" ]; then # not a job yet
    chain slurm/sol.sh "simulate train evaluate" "$@"
    exit
fi

stage=${1:-}
if [ -n "$stage" ]; then shift; fi
need_input "$@"
root=${values[1]:-${DZHPC_DATA:-data}}
reference=$root/${values[0]}.h5
run=$(run_folder "$@") || exit

case $stage in
    simulate)
        mkdir -p "$root"
        launch simulate "$INPUT" -o "$reference" "$@" # nothing left to do where the file is whole
        ;;
    train) launch train "$INPUT" "$@" ;;
    evaluate) launch evaluate "$run" "$INPUT" -o "$run/evaluation" --data-root "$root" $EVALUATE ;;
    *)
        echo "slurm/sol.sh $stage: expected simulate, train or evaluate; without sbatch, bash slurm/sol.sh submits all" >&2
        exit 2
        ;;
esac
