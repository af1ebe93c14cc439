#!/bin/sh
# The measurements of results/postdiff. First the model (an estimate for two CPU cores, from c2f_trd's rate of
# 28 GMACs/s in training: 640,000 images of 61 MMACs, 70 minutes), copied to weights/postdiff:
#   OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 -- postdiff.py --train
# then each seed, two at a time, one CPU core each:
#   sh results/postdiff/run.sh 0 & sh results/postdiff/run.sh 1 & wait; sh results/postdiff/run.sh 2
# and what needs one seed only: sh results/postdiff/run.sh once
# Plain 20 steps are 2.4 GMACs an image; at an estimated 10 GMACs/s a core 1,000 images take 4 minutes. In units
# of that: fig4 27, fig5 5, fig8 3, table1 9, table5 4: 48 units, 3.2 hours a seed; once: 15 units, an hour,
# and 15 minutes of fine-tuning on two cores. n is 1,000 throughout: FD compares at equal n only.
set -e
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
run="python postdiff.py --checkpoint weights/postdiff/weights.pt"
if [ "$1" = once ]; then
  # Rows of images: plain, mixed and PostDiff, 20 and 8 steps each, the same prompts and seeds
  $run --sample --method base mixed postdiff --steps 20 8 --n 16 --out runs/postdiff-rows
  cp runs/postdiff-rows/samples.png results/postdiff/rows.png
  # Appendix A, Fig. 7
  $run --profile --n 64                         # python results/postdiff/figures.py draws it, and fig4, 5, 8
  # Appendix D, Fig. 9: do small sets rank s as a large one does?  Then the calibration within 40 % of the MACs
  $run --search --method mixed --s 0 0.3 0.5 0.6 --calibration 2000 --experiment fig9 --plans runs/postdiff-fig9
  $run --search --method postdiff --steps 8 12 16 20 --s 0 0.3 0.5 0.6 --calibration 250 --budget 0.4 \
    --experiment calibration --plans weights/postdiff
  # The same with DPM-Solver++
  $run --evaluate --method base mixed postdiff --solver dpm2 --steps 20 8 --n 1000 --experiment solver
  # Appendix F, Table 7: fine-tuning on the fixed resolution schedule, before and after
  OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 -- postdiff.py --train --checkpoint weights/postdiff/weights.pt \
    --out runs/postdiff-finetune
  $run --evaluate --method base mixed postdiff --n 1000 --experiment table7
  python postdiff.py --checkpoint "$(ls runs/postdiff-finetune/*/weights.pt | tail -1)" --evaluate \
    --method base mixed postdiff --n 1000 --experiment table7
  # Table 2's other kinds in small: an LCM, distilled from the model; a DiT, trained like it
  OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 -- postdiff.py --train --distill \
    --checkpoint weights/postdiff/weights.pt --out runs/postdiff-lcm
  OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 -- postdiff.py --train --arch dit --out runs/postdiff-dit
  for kind in lcm dit; do
    python postdiff.py --checkpoint "$(ls runs/postdiff-$kind/*/weights.pt | tail -1)" --evaluate \
      --method base mixed postdiff --n 1000 --experiment "table2 $kind"
  done
  exit
fi
evaluate="$run --evaluate --n 1000 --seed $1"
# Fig. 4: fewer steps or mixed resolution? s = 0 is the plain sampler
$evaluate --method mixed --steps 8 10 12 14 16 18 20 --s 0 0.1 0.2 0.3 0.4 0.5 0.6 --experiment fig4
# Fig. 5: full PostDiff at 20 steps, and at fewer, with m varied
$evaluate --method postdiff --steps 20 14 --m 0.25 0.5 0.75 0.9 1 --experiment fig5
# Fig. 8: beta (those that fit the network)
$evaluate --method mixed --steps 8 14 20 --beta 0.25 0.5 0.75 --experiment fig8
# Table 1: the cache choices; the original with and without guidance; DeepCache alone
$evaluate --method base --experiment table1
$evaluate --method cache --k 1 --m 0 --choice none --experiment table1
$evaluate --method cache --m 1 --experiment table1
$evaluate --method cache --m 0.25 0.5 0.75 --choice ave cond uncond cfg --experiment table1
# Table 5: k and m
$evaluate --method postdiff --k 2 3 4 5 --experiment table5
$evaluate --method postdiff --m 0.45 0.6 0.9 --experiment table5
