#!/bin/bash
# Fig. A6: steps an hour on several numbers of ranks, each of them a core or a GPU.
# From the root of the clone: sbatch slurm/studies/a6.sh, then bash slurm/studies/a6.sh report; on two cores: SIZE=small bash slurm/studies/a6.sh
#SBATCH --job-name=a6
#SBATCH --array=0-1%8
#SBATCH --ntasks=8
#SBATCH --cpus-per-task=1           # run.threads of the input
#SBATCH --time=24:00:00             # of one stretch: a member requeues itself until its run is finished
#SBATCH --requeue                   # lets it, and lets Slurm after a node failure
#SBATCH --open-mode=append          # a requeued member must not truncate what it printed before
#SBATCH --signal=B:USR1@120         # B: to this script, which forwards it

members() {
    local ranks=1,2 steps=5 depth=3 small="inputs/resnet20-small.toml"
    if [ "$SIZE" = paper ]; then ranks=2,4,6,8 small="inputs/resnet20.toml"; fi
    if [ "$SIZE" = look ]; then steps=3 depth=1 small="$small --set sparsity.ratio=0.999 --set sparsity.scores=random"; fi
    echo "bench resnet20 scaling $small --ranks $ranks --steps $steps --json $DIR/resnet20.json"
    echo "bench cnn scaling inputs/cnn.toml --set model.depth=$depth --ranks $ranks --steps $((4 * steps)) --json $DIR/cnn.json"
}

source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/studies/study.sh" || { echo "submit from the root of the clone" >&2; exit 4; }
report() { if some "$DIR"/*.json; then python -m dzhpc.report "$DIR"/*.json -o "$DIR/report"; fi; }
study a6 "$@"
