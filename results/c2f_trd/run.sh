#!/bin/sh
# Everything in results/c2f_trd from the shipped weights; each part takes 45 to 60 minutes on one CPU core.
#   sh results/c2f_trd/run.sh ddim & sh results/c2f_trd/run.sh dpm2 & wait
#   python results/rows.py; python results/report.py                   # pictures, tables, figures
# --transition 706: the PCA's 151 is below the plateau of FD for this small network (README, Fig. 5).
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
  for strategy in label xy 2T 2dms; do       # Table I: fine-tunes the shipped base model, 16 -> 32
    python c2f_trd.py --train --checkpoint weights/c2f_trd/weights.pt --low 16 --strategy $strategy \
      --finetune-iters 400 --out runs/table1/$strategy
    python c2f_trd.py --search --evaluate --out runs/table1/$strategy --method c2f --solver ddim \
      --steps 20 --spacing exclusive --pca 512 --transition 706 --experiment table1
  done
  $run --evaluate --method base --solver ddim --steps 20 --spacing exclusive --experiment table1
fi
$run --search --method trd c2f+trd --solver "$1" --steps 20 --two-phase --sweeps 4 --transition 706
$run --evaluate --compile $all --solver "$1" --steps 20 --seeds 3 --experiment fig6
$run --evaluate --compile --method base c2f --solver "$1" --steps 40 --experiment fig6
for spacing in exclusive trailing; do
  $run --evaluate --compile --method base c2f --solver "$1" --steps 5 10 --spacing $spacing \
    --experiment spacing
done
$run --evaluate --compile --method base --solver "$1" --steps 6 11 --experiment fig6
$run --search --method trd c2f+trd --solver "$1" --steps 40 --two-phase --sweeps 1 --transition 706
$run --evaluate --compile --method trd c2f+trd --solver "$1" --steps 40 --experiment fig6
