#!/bin/sh
# The measurements of results/multistage, in parts: sh results/multistage/run.sh PART, PART one of
#   cluster     edges by every clustering but gradient, speed of the optimal denoiser: 10 to 20 minutes
#   weights     Fig. 1(d): arms of 30e12 training MACs (1,818 steps of 128 images unified), FD on the way: 45 minutes each
#   table3      arms of 10e12 MACs, trained as the paper's, each batch of one stage
#   variants    the same with mixed batches, equal widths, other shares of the stages
#   table4      other clusterings, table7: other numbers of stages, table1: EDM, latent: LDM; all with mixed batches
#   tables      cells of the paper
# An arm of 10e12 MACs takes 10 minutes of one busy CPU core (140 images/s) and 6 for three seeds of FD. BUDGET= sets other
# training MACs. weights/multistage holds weights.pt and log.jsonl of the arms of `weights` under their names
# (weights: multistage, mixed batches; separate: its log only). `python results/multistage/rows.py` draws them, stage_losses.py says where their errors are.
set -e
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
BUDGET=${BUDGET:-10e12}
arm() {                     # NAME TABLE OPTIONS...: trains under runs/multistage/NAME, evaluates with three seeds
  name=$1; shift; table=$1; shift
  python multistage.py --train --budget "$BUDGET" --save-every 300 --out "runs/multistage/$name" "$@"
  python multistage.py --evaluate --seeds 3 --experiment "$table" --out "runs/multistage/$name"
}
long() {
  name=$1; shift
  BUDGET=30e12 arm "$name" fig1d --fd-every 300 --fd-n 1000 "$@"
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
  weights)
    long weights --mixed-batches
    long unified --arch unified
    long by-stage
    python multistage.py --train --budget 20e12 --save-every 300 --fd-every 300 --fd-n 1000 \
      --arch separate --widths 24 24 24 --mixed-batches --out runs/multistage/separate ;;
  table3)
    arm unified-10 table3 --arch unified
    arm separate-10 table3 --arch separate --widths 24 24 24
    arm separate-es table3 --arch separate --widths 24 24 24 --early-stopping
    arm separate-tp table3 --arch separate
    arm separate-es-tp table3 --arch separate --early-stopping
    arm by-stage-10 table3 ;;
  variants)
    arm mixed variants --mixed-batches
    arm mixed-length variants --mixed-batches --stage-probability 0.517 0.189 0.294
    arm equal-widths variants --mixed-batches --widths 24 24 24
    python multistage.py --evaluate --n 1000 --experiment "sharing the encoder" --out runs/multistage/equal-widths ;;
  table4)
    python multistage.py --cluster --experiment clustering --clustering gradient \
      --checkpoint weights/multistage/unified.pt --out runs/multistage/plans
    arm time table4 --mixed-batches --clustering time
    arm snr table4 --mixed-batches --clustering snr
    arm gradient table4 --mixed-batches --clustering gradient --plan runs/multistage/plans/plan_gradient_3.json ;;
  table7)
    for n in 2 4 5; do arm stages-$n table7 --mixed-batches --clustering optimal2 --stages $n; done ;;
  table1)
    arm edm table1 --arch unified --diffusion edm
    arm edm-multistage table1 --mixed-batches --diffusion edm ;;
  latent)
    arm latent "table1 ldm" --space latent --mixed-batches
    arm latent-unified "table1 ldm" --space latent --arch unified --autoencoder runs/multistage/latent/autoencoder.pt ;;
  tables)
    python multistage.py --ledger ;;
  *) echo "no part '$part'" >&2; exit 1 ;;
esac; done
