#!/bin/bash
# Are first-order runs on the same coordinates stand-ins for those by CGE? The first steps of both, with a checkpoint of each.
# From the root of the clone: sbatch slurm/studies/standin.sh, then bash slurm/studies/standin.sh report; on two cores: SIZE=small bash slurm/studies/standin.sh
#SBATCH --job-name=standin
#SBATCH --array=0-5%8
#SBATCH --ntasks=4
#SBATCH --cpus-per-task=1           # run.threads of the input
#SBATCH --time=24:00:00             # of one stretch: a member requeues itself until its run is finished
#SBATCH --requeue                   # lets it, and lets Slurm after a node failure
#SBATCH --open-mode=append          # a requeued member must not truncate what it printed before
#SBATCH --signal=B:USR1@120         # B: to this script, which forwards it

members() {
    local steps=20 both
    if [ "$SIZE" = look ]; then steps=6; fi
    # Random ratios: the same S, whatever the scores.
    both="data.augment=false sparsity.scores=random sparsity.redraw_epochs=1 checkpoint.every_steps=1 checkpoint.keep=30 optim.warmup_epochs=0.0 data.test_limit=1000"
    pair cge "zo.estimator=cge stop.steps=$steps $both"
    pair autograd "$AUTOGRAD stop.steps=$steps $both"
    pair cge-fine "zo.estimator=cge zo.mu=1e-4 stop.steps=2 $both" # what is left without the error of first order in mu
}

# pair METHOD KEYS: both networks.
pair() {
    echo "inputs/resnet20.toml $1/resnet20 $2 sparsity.ratio=0.99 data.batch_size=64"
    echo "inputs/resnet20.toml $1/cnn8 $2 model.name=cnn8 model.width=16 task.loss=mse data.batch_size=100"
}

source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/studies/study.sh" || { echo "submit from the root of the clone" >&2; exit 4; }
report() { python benchmarks/standin.py "$DIR"; }
study standin "$@"
