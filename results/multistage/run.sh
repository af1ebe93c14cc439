#!/bin/sh
# The measurements of results/multistage, in parts: sh results/multistage/run.sh PART, PART one of
#   cluster     edges by every clustering but gradient, speed of the optimal denoiser: 10 to 20 minutes
#   arms        Table 3 and Fig. 1(d): arms of equal training MACs (30e12: 1,818 steps of 128 images unified)
#   more        the other arms of Table 3
#   clusterings Table 4: three more clusterings (the fourth is `arms`' multistage)
#   stages      Table 7: n = 2, 4, 5 (1 and 3 are in `arms`)
#   edm         Table 1: unified and multistage EDM, stages as drawn by EDM and in equal shares
#   latent      Table 1, LDM: an autoencoder once, unified and multistage on its latents
#   tables      cells of the paper
# An arm takes 28 minutes of one busy CPU core (140 images/s), 5 more for FD of 1,000 images on the way, and 10 for three
# seeds of FD: 45 minutes. BUDGET= sets other training MACs, PROCESSES=2 takes two cores to an arm. The weights.pt and
# log.jsonl of the arms are in weights/multistage, the
# multistage one's as weights.*; `python results/multistage/rows.py` draws them.
set -e
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
BUDGET=${BUDGET:-30e12}
go="torchrun --nproc_per_node=${PROCESSES:-1} -- multistage.py"
[ "${PROCESSES:-1}" = 1 ] && go="python multistage.py"
arm() {                     # NAME TABLE OPTIONS...: trains under runs/multistage/NAME, evaluates with three seeds
  name=$1; shift; table=$1; shift
  $go --train --budget "$BUDGET" --save-every 300 --fd-every 300 --fd-n 1000 --out "runs/multistage/$name" "$@"
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
    arm unified table3 --arch unified ;;
  more)
    arm separate-es-tp table3 --arch separate --early-stopping
    arm separate table3 --arch separate --widths 24 24 24
    arm separate-es table3 --arch separate --widths 24 24 24 --early-stopping
    arm separate-tp table3 --arch separate ;;
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
  latent)
    arm latent "table1 ldm" --space latent
    arm latent-unified "table1 ldm" --space latent --arch unified --autoencoder runs/multistage/latent/autoencoder.pt ;;
  tables)
    python multistage.py --ledger ;;
  *) echo "no part '$part'" >&2; exit 1 ;;
esac; done
