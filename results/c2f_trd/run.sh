#!/bin/sh
# The measurements of results/c2f_trd from the shipped weights; each of the two parts takes about an hour on
# one CPU core:
#   sh results/c2f_trd/run.sh ddim & sh results/c2f_trd/run.sh dpm2 & wait
#   python results/rows.py; python results/report.py                   # pictures, tables, figures
# --transition 706: the PCA's 151 is below the plateau of FD for this small network (D3; README, Fig. 5).
set -e
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
run="python c2f_trd.py --checkpoint weights/c2f_trd/weights.pt"
all="--method base trd c2f c2f+trd"
$run --search --method trd c2f+trd --solver "$1" --steps 5 10 --transition 706
$run --evaluate --compile $all --solver "$1" --steps 5 10 --seeds 3 --experiment fig6 --per-class
if [ "$1" = ddim ]; then
  $run --evaluate --compile --method base --solver ddim --steps 100 --seeds 3 --experiment fig6 --per-class
else
  $run --evaluate --sweep-transition --solver ddim --steps 20 --experiment sweep
fi
for spacing in exclusive trailing; do
  $run --evaluate --method base c2f --solver "$1" --steps 5 10 --spacing $spacing --experiment spacing
done
$run --search --method trd c2f+trd --solver "$1" --steps 20 --two-phase --sweeps 2 --transition 706
$run --evaluate --compile $all --solver "$1" --steps 20 --experiment fig6
$run --evaluate --method base c2f --solver "$1" --steps 40 --experiment fig6
