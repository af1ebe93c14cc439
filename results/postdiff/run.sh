#!/bin/sh
# The measurements of results/postdiff, in parts: sh results/postdiff/run.sh PART..., PART one of
#   train     the model, 100 minutes of one busy CPU core; its weights.pt, log.jsonl: weights/postdiff/weights.*
#   main      plain 20 and 8 steps, mixed, hybrid cache, PostDiff: three seeds, 20 minutes
#   fewer     Figs. 4, 5, 8: fewer steps or cheaper steps; 70 minutes
#   cache     Table 1: the cache choices; Table 5: k and m; one seed, 15 minutes
#   rows      rows of images; Appendix A's profile: 5 minutes
#   calibrate Appendix D, Fig. 9: do small sets rank s as a large one does?  Then Sec. 2.4's calibration
#   solver    DPM-Solver++ instead of DDIM; 5 minutes
#   guidance  what the weight w does to plain sampling
#   finetune  Appendix F, Table 7: on the fixed resolution schedule, before and after
#   kinds     Table 2's other kinds in small: an LCM, distilled from the model; a DiT, trained like it: two hours
# Plain 20 steps are 2.4 GMACs an image: 1,000 images take 2 minutes of a core. n is 1,000: FD compares at equal
# n only. `python results/report.py` makes the tables and figures.
set -e
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
run="python postdiff.py --checkpoint weights/postdiff/weights.pt"
evaluate="$run --evaluate --n 1000"
for part in "$@"; do case $part in
  train)
    python postdiff.py --train --iters 3600 --save-every 200 ;;
  main)
    $evaluate --method base mixed cache postdiff --seeds 3 --experiment main
    $evaluate --method base --steps 8 --seeds 3 --experiment main ;;
  fewer)
    $evaluate --method base --steps 12 16 --seeds 3 --experiment fig4
    $evaluate --method mixed --steps 8 12 --seeds 3 --experiment fig4
    $evaluate --method mixed --steps 20 --s 0.2 0.3 0.6 --seeds 3 --experiment fig4
    $evaluate --method postdiff --steps 8 12 16 --seeds 3 --experiment fig4
    $evaluate --method mixed --steps 8 --s 0.3 --seeds 3 --experiment aim
    $evaluate --method postdiff --steps 14 --s 0.3 --seeds 3 --experiment aim
    $evaluate --method postdiff --s 0.3 --k 3 --experiment aim
    $evaluate --method mixed --beta 0.75 --seeds 3 --experiment fig8 ;;
  cache)
    $evaluate --method base --experiment table1
    $evaluate --method cache --k 1 --m 0 --choice none --experiment table1            # without guidance
    $evaluate --method cache --m 1 --experiment table1                                # DeepCache alone
    $evaluate --method cache --m 0.5 --choice ave cond uncond cfg --experiment table1
    $evaluate --method cache --m 0.25 0.75 --experiment table1
    $evaluate --method postdiff --k 1 2 3 4 5 --experiment table5
    $evaluate --method postdiff --m 0.45 0.6 0.9 1 --experiment table5 ;;
  rows)
    python results/postdiff/rows.py
    $run --profile --n 64 ;;
  calibrate)
    $run --search --method mixed --steps 8 12 --s 0 0.3 0.5 0.6 --calibration 2000 --experiment fig9 --plans runs/postdiff-fig9
    $run --search --method mixed --s 0 0.3 0.5 --calibration 250 --budget 0.4 --experiment calibration --plans weights/postdiff ;;
  solver)
    $evaluate --method base --solver dpm2 --steps 20 8 --experiment solver
    $evaluate --method mixed --solver dpm2 --steps 8 --s 0.3 --experiment solver
    $evaluate --method postdiff --solver dpm2 --experiment solver ;;
  guidance)
    for w in 1 2 5; do $evaluate --method base --guidance $w --experiment guidance; done ;;
  finetune)
    $run --train --finetune-iters 400 --out runs/postdiff-finetune
    python postdiff.py --checkpoint "$(ls runs/postdiff-finetune/*/weights.pt | tail -1)" --evaluate \
      --method base mixed postdiff --n 1000 --experiment table7 ;;
  kinds)
    $run --train --distill --lcm-iters 700 --save-every 100 --out runs/postdiff-lcm
    python postdiff.py --train --arch dit --iters 2400 --save-every 100 --out runs/postdiff-dit
    for kind in lcm dit; do
      for file in weights.pt log.jsonl; do
        cp "$(ls runs/postdiff-$kind/*/$file | tail -1)" weights/postdiff/$kind.${file##*.}
      done
      python postdiff.py --checkpoint weights/postdiff/$kind.pt --evaluate --method base mixed postdiff --n 1000 --seeds 3 \
        --experiment "table2 $kind"
    done
    python postdiff.py --checkpoint weights/postdiff/lcm.pt --evaluate --method base --steps 4 --n 1000 --seeds 3 --experiment "table2 lcm"
    python postdiff.py --checkpoint weights/postdiff/lcm.pt --evaluate --method mixed --s 0.25 --n 1000 --seeds 3 --experiment "table2 lcm" ;;
  *) echo "no part '$part'" >&2; exit 1 ;;
esac; done
