#!/bin/sh
# Everything in results/c2f_trd from the shipped weights, in parts of about an hour on one CPU core each:
#   sh results/c2f_trd/run.sh ddim & sh results/c2f_trd/run.sh dpm2 & wait
#   sh results/c2f_trd/run.sh table1; sh results/c2f_trd/run.sh extra
#   python results/rows.py; python results/report.py                   # pictures, tables, figures
set -e
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
run="python c2f_trd.py --checkpoint weights/c2f_trd/weights.pt"
all="--method base trd c2f c2f+trd"
case $1 in
ddim|dpm2)
  $run --search --method trd c2f+trd --solver "$1" --steps 5 10
  $run --search --method trd c2f+trd --solver "$1" --steps 20 --two-phase --sweeps 4
  $run --search --method trd c2f+trd --solver "$1" --steps 40 --two-phase --sweeps 1
  $run --evaluate --compile $all --solver "$1" --steps 5 10 20 --seeds 3 --experiment fig6 --per-class
  [ "$1" = dpm2 ] || $run --evaluate --compile --method base --solver ddim --steps 100 --seeds 3 \
    --experiment fig6 --per-class
  $run --evaluate --compile $all --solver "$1" --steps 40 --experiment fig6
  $run --evaluate --compile --method base --solver "$1" --steps 6 11 --experiment fig6
  for spacing in exclusive trailing; do
    $run --evaluate --compile --method base c2f --solver "$1" --steps 5 10 --spacing $spacing \
      --experiment spacing
  done
  [ "$1" = dpm2 ] || $run --evaluate --sweep-transition --solver ddim --steps 20 --experiment sweep
  ;;
table1)                       # fine-tunes the shipped base model in four ways, 16 -> 32
  for strategy in label xy 2T 2dms; do
    python c2f_trd.py --train --checkpoint weights/c2f_trd/weights.pt --low 16 --strategy $strategy \
      --finetune-iters 600 --out runs/table1/$strategy
    python c2f_trd.py --search --evaluate --out runs/table1/$strategy --method c2f --solver ddim \
      --steps 20 --spacing exclusive --pca 512 --experiment table1
  done
  $run --evaluate --method base --solver ddim --steps 20 --spacing exclusive --experiment table1
  ;;
extra)                        # what more calibration samples, the other end rule and two phases buy
  for solver in ddim dpm2; do
    $run --search --method c2f+trd --solver $solver --steps 5 10 --two-phase --plans runs/two-phase
    $run --search --method trd --solver $solver --steps 10 --calibration 64 --plans runs/calibration64
    $run --search --method trd --solver $solver --steps 10 --ends bounded --plans runs/bounded
  done
  ;;
esac
