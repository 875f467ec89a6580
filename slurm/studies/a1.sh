#!/bin/bash
# Table A1: seconds of an estimate with as many queries as parameters, in four parts, by RGE and by CGE.
# From the root of the clone: sbatch slurm/studies/a1.sh, then bash slurm/studies/a1.sh report; on two cores: SIZE=small bash slurm/studies/a1.sh
#SBATCH --job-name=a1
#SBATCH --array=0-4%8
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1           # run.threads of the input
#SBATCH --time=24:00:00             # of one stretch: a member requeues itself until its run is finished
#SBATCH --requeue                   # lets it, and lets Slurm after a node failure
#SBATCH --open-mode=append          # a requeued member must not truncate what it printed before
#SBATCH --signal=B:USR1@120         # B: to this script, which forwards it

members() {
    local depth queries
    case $SIZE in paper) queries=100000 ;; small) queries=256 ;; look) queries=16 ;; esac # from which the others are extrapolated
    for depth in 1 2 3 4 5; do
        echo "bench depth$depth stages --model cnn:$depth --queries $queries --repeats 5 --json $DIR/depth$depth.json"
    done
}

source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/studies/study.sh" || { echo "submit from the root of the clone" >&2; exit 4; }
report() { if some "$DIR"/depth*.json; then python -m dzhpc.report "$DIR"/depth*.json -o "$DIR/report"; fi; }
study a1 "$@"
