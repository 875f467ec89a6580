#!/bin/bash
# Open questions: how sparse, a vision transformer, ResNet-56. First-order runs with sparse gradients are stand-ins for those by CGE.
# From the root of the clone: sbatch slurm/studies/open.sh, then bash slurm/studies/open.sh report; on two cores: SIZE=small bash slurm/studies/open.sh
#SBATCH --job-name=open
#SBATCH --array=0-35%8
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1           # run.threads of the input
#SBATCH --time=24:00:00             # of one stretch: a member requeues itself until its run is finished
#SBATCH --requeue                   # lets it, and lets Slurm after a node failure
#SBATCH --open-mode=append          # a requeued member must not truncate what it printed before
#SBATCH --signal=B:USR1@120         # B: to this script, which forwards it

members() {
    local ratio model seed vit="optim.name=adam optim.lr=1e-3 optim.weight_decay=0.0"
    # Five epochs are what two cores can do; small batches make many steps of them, and each epoch has an S of its own.
    if [ "$SIZE" = small ]; then MORE="stop.epochs=5 data.batch_size=128 optim.warmup_epochs=1.0 sparsity.redraw_epochs=1"; fi
    for ratio in 0.8 0.9 0.95 0.98 0.99 0.995 0.999; do
        if [ "$SIZE" != look ]; then echo "inputs/resnet20.toml standin-resnet20/$ratio $AUTOGRAD sparsity.ratio=$ratio $MORE"; fi
        for seed in 0 1 2; do # by queries, at any size
            echo "inputs/digits.toml deepzero-digits/$ratio-seed$seed sparsity.ratio=$ratio run.seed=$seed eval.every_epochs=10"
        done
    done
    for ratio in 0.9 0.99 0.999; do # 8 x 8 pixels: 2 layers of width 48
        for model in autograd cge; do
            if [ "$SIZE.$model" = look.cge ]; then continue; fi # hours a run
            echo "inputs/digits.toml $model-vit-digits/$ratio zo.estimator=$model model.name=vit-tiny model.depth=2 model.width=48 model.patch=2 model.image_size=8 model.in_channels=1 sparsity.ratio=$ratio $vit eval.every_epochs=10"
        done
    done
    if [ "$SIZE" = look ]; then return; fi
    echo "inputs/resnet20.toml standin-resnet56/0.9 $AUTOGRAD model.name=resnet56 $MORE"
    echo "inputs/resnet20.toml standin-vit-tiny/0.9 $AUTOGRAD model.name=vit-tiny $vit $MORE"
}

source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/studies/study.sh" || { echo "submit from the root of the clone" >&2; exit 4; }
OVER=sparsity.ratio
study open "$@"
