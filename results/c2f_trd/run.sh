#!/bin/sh
# The measurements of results/c2f_trd from the shipped weights. One solver to a CPU core, side by side:
#   sh results/c2f_trd/run.sh ddim & sh results/c2f_trd/run.sh dpm2 & wait         # three hours
#   sh results/c2f_trd/run.sh strategies                               # Table I, low resolution 16: an hour
#   python results/ranks.py 16.pt; python results/rows.py; python results/report.py     # figures, tables
# --transition 706: the PCA's 151 is below the plateau of FD for this small network (D3; README, Fig. 5).
set -e
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
weights=weights/c2f_trd/weights.pt
run="python c2f_trd.py --checkpoint $weights --plans weights/c2f_trd"
all="--method base trd c2f c2f+trd"
trd="--method trd c2f+trd --solver $1"

if [ "$1" = strategies ]; then                 # Table I at 16 -> 32, each fine-tuned from the shipped base
  for strategy in label xy 2T 2dms; do
    torchrun --nproc_per_node=2 -- c2f_trd.py --train --checkpoint $weights --low 16 --strategy $strategy \
      --out runs/low16/$strategy
    tuned="python c2f_trd.py --checkpoint $(ls runs/low16/$strategy/*/weights.pt)"
    $tuned --evaluate --compile --method c2f --solver dpm2 --steps 10 20 --seeds 3 --transition 706 --experiment table1
    if [ $strategy = label ]; then             # is 8 too low for this data?
      cp runs/low16/label/*/weights.pt 16.pt
      $tuned --evaluate --sweep-transition --solver ddim --steps 20 --experiment sweep16
      $tuned --search --method c2f+trd --solver dpm2 --steps 5 10 --transition 706 --experiment low16
      $tuned --evaluate --compile --method c2f c2f+trd --solver dpm2 --steps 5 10 --seeds 3 --experiment low16
    fi
  done
  exit
fi

# Fig. 6, Fig. 5, classes, spacings
$run --search $trd --steps 5 10 --transition 706
$run --evaluate --compile $all --solver $1 --steps 5 10 --seeds 3 --experiment fig6 --per-class
if [ "$1" = ddim ]; then
  $run --evaluate --compile --method base --solver ddim --steps 100 --seeds 3 --experiment fig6 --per-class
else
  $run --evaluate --sweep-transition --solver ddim --steps 20 --experiment sweep
fi
$run --evaluate --compile --method base c2f --solver $1 --steps 5 10 20 --spacing exclusive --seeds 3 --experiment spacing
$run --evaluate --method base c2f --solver $1 --steps 5 10 --spacing trailing --experiment spacing

# TRD's options: from the better spacing, ends that move both ways, more samples, two phases
$run --search $trd --steps 5 10 --spacing exclusive --ends bounded --transition 706 --plans runs/bounded
$run --search --method c2f+trd --solver $1 --steps 5 10 --two-phase --transition 706 --plans runs/two-phase
for plans in bounded two-phase; do
  methods=$([ $plans = bounded ] && echo trd)
  $run --evaluate --compile --method $methods c2f+trd --solver $1 --steps 5 10 --plans runs/$plans --seeds 3 \
    --experiment options
done

# 20 and 40 steps, two sweeps
$run --search $trd --steps 20 40 --two-phase --sweeps 2 --transition 706
$run --evaluate --compile $all --solver $1 --steps 20 --seeds 3 --experiment fig6
seeds=$([ "$1" = ddim ] && echo 1 || echo 3)
$run --evaluate --compile $all --solver $1 --steps 40 --seeds $seeds --experiment fig6

# 64 samples
$run --search $trd --steps 5 10 --calibration 64 --two-phase --transition 706 --plans runs/64
$run --search $trd --steps 5 10 --calibration 64 --two-phase --spacing exclusive --ends bounded --transition 706 \
  --plans runs/bounded-64
for plans in 64 bounded-64; do
  $run --evaluate --compile --method trd c2f+trd --solver $1 --steps 5 10 --plans runs/$plans --seeds 3 \
    --experiment options
done

# equal MACs: what the low-resolution steps cost (0.56 of a full step), spent on one more full step
$run --search --method trd --solver $1 --steps 6 11 --plans runs/equal
$run --evaluate --compile --method base trd --solver $1 --steps 6 11 --plans runs/equal --seeds 3 --experiment fig6
