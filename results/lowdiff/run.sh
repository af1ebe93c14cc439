#!/bin/sh
# The measurements of results/lowdiff, on two CPU cores, one for each part that runs beside another.
#   sh results/lowdiff/run.sh train-a & sh results/lowdiff/run.sh train-b & wait        # 85 minutes
#   sh results/lowdiff/run.sh measure                                                   # 100 minutes on one core
#   sh results/lowdiff/run.sh latent                                                    # an hour on one core
#   python results/lowdiff/where.py                                                     # 20 minutes on one core
#   python results/lowdiff/speed.py                                                     # alone on the machine
#   sh results/lowdiff/run.sh rest                                                      # two hours on one core
# Not run yet: choices 2, emoji 8 hours on one core.
# Every run of a data set trains for the same MACs: 9.4e12 forward, 2,019 steps of EDM, a 0.4th of the default. With
# a GPU: DATA=fashion or DATA=cifar10, and BUDGET=5e14 for a longer run.
set -e
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
data=${DATA:-fashion10k}
out=runs/lowdiff-$data
budget=${BUDGET:-9.4e12}

train() {                                      # 25 minutes a run: name, then options
  name=$1; shift
  python lowdiff.py --train --data "$data" --out "$out/$name" --budget "$budget" "$@"
  cp "$(ls -t "$out/$name"/*/weights.pt | head -1)" "weights/lowdiff/$name.pt"
  cp "$(ls -t "$out/$name"/*/log.jsonl | head -1)" "weights/lowdiff/$name.jsonl"
}

evaluate() {                                   # name, then options
  name=$1; shift
  python lowdiff.py --evaluate --checkpoint "weights/lowdiff/$name.pt" "$@"
}

case "$1" in
train-a)                                       # with labels
  train weights --cond                        # three stages: the default of --sample
  train two-cond --cond --stages 16 32
  train cdm-cond --cond --arch cdm --stages 16 32
  ;;
train-b)                                       # EDM; three stages without labels
  train edm-cond --cond --arch edm
  train edm --arch edm
  train three
  ;;
measure)
  # Tables 2, 5, 6, 8
  for name in edm-cond weights two-cond cdm-cond edm three; do
    evaluate $name --seeds 3 --experiment "tables 2 5 6 8"
  done
  # Table 11 and the figure of FD against the truncation point: on images of their own (seed 7)
  python lowdiff.py --search --sweep truncation --n 1000 --seed 7 --plans runs/plans-two-cond \
    --checkpoint weights/lowdiff/two-cond.pt
  # EDM with as many evaluations as LowDiff's last stage, and as its effective NFE
  for steps in 9 12; do
    evaluate edm-cond --steps $steps --experiment "edm, fewer steps"
  done
  # Truncated later, as the sweep says
  evaluate weights --truncate 25 17 --seeds 3 --experiment "later truncation"
  # What comes out of each stage, from the same seeds, beside EDM
  python lowdiff.py --sample --show-stages --n 16 --out runs/lowdiff-grid --checkpoint weights/lowdiff/weights.pt \
    weights/lowdiff/edm-cond.pt
  cp runs/lowdiff-grid/samples.png results/lowdiff/stages.png
  ;;
latent)                                        # Table 4: the same autoencoder for both
  budget=6e12
  train dit --space latent --cond --arch dit
  train latent --space latent --cond --autoencoder weights/lowdiff/dit.pt
  evaluate dit --steps 100 --n 1000 --experiment "table 4"
  evaluate latent --n 1000 --experiment "table 4"
  ;;
rest)                                          # Tables 10, 12; two rows more
  python lowdiff.py --search --sweep truncation --n 1000 --seed 7 --plans runs/plans-weights \
    --checkpoint weights/lowdiff/weights.pt
  python lowdiff.py --search --sweep steps range --n 1000 --seed 7 --plans runs/plans-two-cond \
    --checkpoint weights/lowdiff/two-cond.pt
  evaluate dit --steps 50 --n 1000 --experiment "table 4"
  train two --stages 16 32
  train cdm --arch cdm --stages 16 32
  for name in two cdm; do
    evaluate $name --seeds 3 --experiment "tables 2 5 6 8"
  done
  ;;
choices)                                       # D3 - D5, with two stages
  train told --cond --stages 16 32 --told
  train scale --cond --stages 16 32 --cond-scale input
  train bilinear --cond --stages 16 32 --up bilinear
  for name in told scale bilinear; do
    evaluate $name --experiment choices
  done
  ;;
emoji)                                         # Tables 3, 7, 9: 64x64; 100 minutes of training each
  data=emoji budget=2.6e13
  train emoji-edm --preset small-64 --arch edm
  train emoji-four --preset small-64
  train emoji-two --preset small-64 --stages 32 64
  train emoji-cdm --preset small-64 --arch cdm --stages 32 64
  for name in emoji-edm emoji-four emoji-two emoji-cdm; do
    evaluate $name --experiment "tables 3 7 9"
  done
  ;;
*)
  echo "usage: sh results/lowdiff/run.sh train-a | train-b | measure | latent | rest | choices | emoji"; exit 1
  ;;
esac
