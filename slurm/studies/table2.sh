#!/bin/bash
# Table 2: certified accuracy on ten ImageNet classes: denoisers before a classifier, by queries (DeepZero, ZO-AE-DS) and first-order.
# From the root of the clone: bash slurm/studies/table2.sh submit, then bash slurm/studies/table2.sh report; on two cores: SIZE=small bash slurm/studies/table2.sh
#SBATCH --job-name=table2
#SBATCH --ntasks=4
#SBATCH --cpus-per-task=1           # run.threads of the input
#SBATCH --time=24:00:00             # of one stretch: a member requeues itself until its run is finished
#SBATCH --requeue                   # lets it, and lets Slurm after a node failure
#SBATCH --open-mode=append          # a requeued member must not truncate what it printed before
#SBATCH --signal=B:USR1@120         # B: to this script, which forwards it

IN=inputs/defense-imagenet10.toml
WHITE='zo.estimator=autograd sparsity.ratio=0.0 model.weights= model.trainable=["*"]'
members() {
    local pixels=224 latent=1568 depth=20 width=64 epochs="40 90 20" certify="--images 500 --n 10000" more="" base ae tune last name
    local ratio=0.3333333 batch=50 # of the fine-tuning: 1152 of the 1,728 weights of the last layer move in a step
    case $SIZE in # epochs: of the classifier, of the pre-training, of the fine-tuning
        small) pixels=64 latent=192 depth=7 width=32 epochs="40 10 0.5" ratio=0.6666667 batch=8 certify="--images 50 --n 1000 --adaptive" ;;
        look) pixels=32 latent=192 depth=4 width=8 epochs="4 4 1" ratio=0.0 certify="--images 20 --n 100" more="data.train_limit=400" ;;
    esac
    read -ra epochs <<< "$epochs"
    base="data.image_size=$pixels $more"
    echo "$IN classifier $base $WHITE task.kind=classification model.name=resnet20 data.augment=true optim.lr=3e-3 stop.epochs=${epochs[0]}"
    echo
    base="$base task.classifier=$DIR/classifier model.depth=$depth model.width=$width"
    ae="model.name=ae-ds model.image_size=$pixels model.latent=$latent"
    echo "$IN pretrained $base $WHITE task.loss=mse optim.lr=1e-3 stop.epochs=${epochs[1]}"
    echo "$IN pretrained-ae $base $ae $WHITE task.loss=mse optim.lr=1e-3 stop.epochs=${epochs[1]}"
    echo
    last="model.trainable=[\"model.$((2 * depth - 2)).weight\"] sparsity.ratio=$ratio"
    tune="$base data.batch_size=$batch stop.epochs=${epochs[2]}"
    echo "$IN deepzero $tune model.weights=$DIR/pretrained $last"
    echo "$IN ceiling $tune model.weights=$DIR/pretrained $last zo.estimator=autograd"
    echo "$IN fo-ds $tune $WHITE model.weights=$DIR/pretrained optim.lr=1e-5"
    echo "$IN zo-ae-ds $tune $ae model.weights=$DIR/pretrained-ae zo.estimator=latent sparsity.ratio=0.0 model.trainable=[\"denoiser.*\",\"encoder.*\"]"
    echo
    for name in pretrained deepzero ceiling fo-ds zo-ae-ds; do
        echo "certify certify-$name $DIR/$name -o $DIR/certify --label $name $certify"
    done
    echo "certify certify-none $DIR/pretrained -o $DIR/certify --label none --no-denoiser $certify"
}

source "${SLURM_SUBMIT_DIR:-$PWD}/slurm/studies/study.sh" || { echo "submit from the root of the clone" >&2; exit 4; }
report() { if some "$DIR"/certify/*.h5; then python -m dzhpc.report "$DIR"/certify/*.h5 -o "$DIR/report"; fi; }
study table2 "$@"
