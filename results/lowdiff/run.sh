#!/bin/sh
# The measurements of results/lowdiff, on two CPU cores: the parts `a` and `b` side by side, one core each.
#   sh results/lowdiff/run.sh train-a & sh results/lowdiff/run.sh train-b & wait        # 5.5 hours
#   sh results/lowdiff/run.sh measure                                                   # 2.5 hours on one core
#   sh results/lowdiff/run.sh choices                                                   # 4 hours on one core
#   sh results/lowdiff/run.sh emoji                                                     # 8 hours on one core
# Every run of a data set trains for the same MACs (EDM's 5,000 steps of 128 images). The hours follow from measured
# rates of one core: at 32x32, 135 images/s in training for EDM, 110 for LowDiff, 13 and 17 in sampling; at 64x64, 54
# and 30, 2.1 and 3.1. With a GPU: DATA=fashion or DATA=cifar10, and TRAIN="--budget 5e14" for a longer run.
set -e
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
data=${DATA:-fashion10k}
out=runs/lowdiff-$data
newest() { ls -t "$out/$1"/*/checkpoint.pt | head -1; }

train() {                                      # 80 minutes a run: name, then options
  name=$1; shift
  python lowdiff.py --train --data "$data" --out "$out/$name" $TRAIN "$@"
}

case "$1" in
train-a)                                       # without labels
  train edm --arch edm
  train three
  train two --stages 16 32
  train cdm --arch cdm --stages 16 32
  ;;
train-b)                                       # with labels
  train edm-cond --cond --arch edm
  train three-cond --cond
  train two-cond --cond --stages 16 32
  train cdm-cond --cond --arch cdm --stages 16 32
  ;;
measure)
  # Tables 2, 5, 6, 8: 2.5 minutes a seed, three seeds of eight networks, and the images/s of each beside EDM's
  for name in edm three two cdm edm-cond three-cond two-cond cdm-cond; do
    python lowdiff.py --evaluate --checkpoint "$(newest $name)" --seeds 3 --experiment "tables 2 5 6 8"
  done
  # EDM with as few evaluations as LowDiff has at full resolution, and as its effective NFE
  for steps in 9 11; do
    python lowdiff.py --evaluate --checkpoint "$(newest edm)" --steps $steps --seeds 3 --experiment "edm, fewer steps"
  done
  # Tables 10, 11 (captioned 12) and 12, the figure of FD against the truncation point: 2 minutes a plan
  for name in two three; do
    python lowdiff.py --search --sweep truncation steps range --checkpoint "$(newest $name)"
  done
  # What comes out of each stage, from the same seeds, beside EDM
  python lowdiff.py --sample --show-stages --n 12 --checkpoint "$(newest three-cond)" "$(newest edm-cond)" \
    --out runs/lowdiff-grid
  cp runs/lowdiff-grid/samples.png results/lowdiff/stages.png
  ;;
choices)                                       # D3 - D5, with two stages: 75 minutes of training each
  train told --stages 16 32 --told
  train scale --stages 16 32 --cond-scale input
  train bilinear --stages 16 32 --up bilinear
  for name in told scale bilinear; do
    python lowdiff.py --evaluate --checkpoint "$(newest $name)" --experiment choices
  done
  ;;
emoji)                                         # Tables 3, 7, 9: 64x64; 100 minutes of training each
  data=emoji out=runs/lowdiff-emoji
  train edm --preset small-64 --arch edm
  train four --preset small-64
  train two --preset small-64 --stages 32 64
  train cdm --preset small-64 --arch cdm --stages 32 64
  for name in edm four two cdm; do
    python lowdiff.py --evaluate --checkpoint "$(newest $name)" --experiment "tables 3 7 9"
  done
  ;;
*)
  echo "usage: sh results/lowdiff/run.sh train-a | train-b | measure | choices | emoji"; exit 1
  ;;
esac
