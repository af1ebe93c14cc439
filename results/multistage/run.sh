#!/bin/sh
# The measurements of results/multistage, in parts: sh results/multistage/run.sh PART, PART one of
#   cluster     edges by every clustering (gradient: after `arms`), speed of the optimal denoiser: 10 minutes
#   arms        Table 3 and Fig. 1(d): six arms of equal training MACs (82.5e12: 5,000 steps of 128 images unified)
#   clusterings Table 4: three more clusterings (the fourth is `arms`' multistage)
#   stages      Table 7: n = 2, 4, 5 (1 and 3 are in `arms`)
#   edm         Table 1: unified and multistage EDM, stages as drawn by EDM and in equal shares
#   tables      cells of the paper
# A training arm of 82.5e12 MACs: c2f_trd.py trains the same network at about 220 images/s on two cores beside
# other work, so 640,000 images take 50 minutes, and as many more for FD along the way (10 x 2,000 images of 20
# evaluations: 15 minutes). Estimates: arms 6.5 hours, clusterings 3.3, stages 3.3, edm 3.3; then 10 minutes
# an arm for three seeds of FD. PROCESSES=1 runs without torchrun.
set -e
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
BUDGET=${BUDGET:-82.5e12}
go="torchrun --nproc_per_node=${PROCESSES:-2} -- multistage.py"
[ "${PROCESSES:-2}" = 1 ] && go="python multistage.py"
arm() {                     # NAME OPTIONS...: trains under runs/multistage/NAME, evaluates with three seeds
  name=$1; shift; table=$1; shift
  $go --train --budget "$BUDGET" --fd-every 500 --out "runs/multistage/$name" "$@"
  $go --evaluate --seeds 3 --experiment "$table" --out "runs/multistage/$name"
}
for part in "$@"; do case $part in
  cluster)
    for n in 2 3 4 5; do
      python multistage.py --cluster --experiment clustering --clustering optimal2 --stages $n --out runs/multistage/plans
      python multistage.py --cluster --experiment clustering --clustering optimal2 --stages $n --unit-range --out runs/multistage/plans
    done
    for c in optimal time snr; do python multistage.py --cluster --experiment clustering --clustering $c --out runs/multistage/plans; done
    python multistage.py --cluster --experiment clustering --unit-range --out runs/multistage/plans
    python results/multistage/cluster_speed.py ;;
  arms)
    arm multistage table3
    arm unified table3 --arch unified
    arm separate table3 --arch separate --widths 24 24 24
    arm separate-es table3 --arch separate --widths 24 24 24 --early-stopping
    arm separate-tp table3 --arch separate
    arm separate-es-tp table3 --arch separate --early-stopping ;;
  clusterings)
    python multistage.py --cluster --experiment clustering --clustering gradient --out runs/multistage/unified
    arm time table4 --clustering time
    arm snr table4 --clustering snr
    arm gradient table4 --clustering gradient --plan runs/multistage/unified/plan_gradient_3.json ;;
  stages)
    for n in 2 4 5; do arm stages-$n table7 --clustering optimal2 --stages $n; done ;;
  edm)
    arm edm table1 --arch unified --diffusion edm
    arm edm-multistage table1 --diffusion edm
    arm edm-equal table1 --diffusion edm --stage-probability 0.3334 0.3333 0.3333 ;;
  tables)
    python multistage.py --ledger ;;
  *) echo "no part '$part'" >&2; exit 1 ;;
esac; done
