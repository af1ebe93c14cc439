#!/bin/sh
# The measurements of results/c2f_trd from the shipped weights. One solver to a CPU core, side by side:
#   sh results/c2f_trd/run.sh ddim & sh results/c2f_trd/run.sh dpm2 & wait             # two hours
#   sh results/c2f_trd/run.sh strategies                            # Table I, low resolution 16: an hour, two cores
#   python results/rows.py; python results/report.py                # pictures; tables, figures
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
    python c2f_trd.py --checkpoint runs/low16/$strategy/*/weights.pt --evaluate --compile --method c2f --solver dpm2 \
      --steps 10 20 --seeds 3 --transition 706 --experiment table1
  done
  python results/finetuned.py runs/low16/label/*/weights.pt
  python results/ranks.py runs/low16/label/*/weights.pt                # Fig. 5
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
for spacing in exclusive trailing; do
  $run --evaluate --method base c2f --solver $1 --steps 5 10 --spacing $spacing --experiment spacing
done

# 20 and 40 steps: two sweeps, one seed
$run --search $trd --steps 20 40 --two-phase --sweeps 2 --transition 706
$run --evaluate --compile $all --solver $1 --steps 20 40 --experiment fig6

# TRD's options: from the better spacing with ends that move both ways; 64 samples; two phases
$run --search $trd --steps 5 10 --spacing exclusive --ends bounded --transition 706 --plans runs/bounded
$run --evaluate --compile --method trd c2f+trd --solver $1 --steps 5 10 --plans runs/bounded --seeds 3 --experiment options
$run --search --method trd --solver $1 --steps 5 10 --calibration 64 --plans runs/64
$run --evaluate --compile --method trd --solver $1 --steps 5 10 --plans runs/64 --seeds 3 --experiment options
$run --search --method c2f+trd --solver $1 --steps 5 10 --two-phase --transition 706 --plans runs/two-phase
$run --evaluate --compile --method c2f+trd --solver $1 --steps 5 10 --plans runs/two-phase --seeds 3 --experiment options

# equal MACs: what the low-resolution steps cost (0.56 of a full step), spent on one more full step
$run --search --method trd --solver $1 --steps 6 11 --plans runs/equal
$run --evaluate --method base trd --solver $1 --steps 6 11 --plans runs/equal --experiment fig6
