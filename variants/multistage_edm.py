"""Multistage on EDM (Table 1): EDM's preconditioning, log-normal noise levels and Heun's sampler, as lowdiff.py has
them, with multistage.py's network and stages. Stages of equal signal-to-noise ratio serve both (footnote 4).

    python variants/multistage_edm.py --train --sample       # clusters first; then trains, draws 64 images
    python variants/multistage_edm.py --train --widths 32 --out runs/edm            # off switch: plain EDM
    python results/evaluate.py multistage_edm                # FD, MACs

A stage gets the training images that EDM's log-normal levels give it, as in the official code: next to the noise it is
less than a percent of them (D9, D18: results/multistage/README.md).
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from changed import copy_of  # noqa: E402
from common import autocast, noise_for, run_main, to_float                                        # noqa: E402
from lowdiff import P_MEAN, P_STD, SIGMA_RANGE, denoise, edm_loss, heun_sample, noise_levels               # noqa: E402
from multistage import stage_of, t_of                                                            # noqa: E402

script = copy_of("multistage")


def sigma_stage(sigma, edges):
    """The stage of a noise level sigma: a float gives an int, a tensor (B,) int64 (B,)."""
    t = t_of(sigma)
    return stage_of(t if torch.is_tensor(sigma) else float(t), edges)


def draw_batch(config, x, y, step):
    """Every random input of a training step, on the CPU, for the whole batch: x0, sigma (B,) float32, rising, eps.

    sigma is log-normal, of all stages in every batch; the official code draws a stage with its share, then rejects
    levels outside it: over many steps the same (D9)."""
    B = config["batch"]
    x0 = to_float(x[torch.randint(0, len(x), (B,))])
    if config["flip"]:
        x0 = torch.where(torch.rand(B, 1, 1, 1) < 0.5, x0.flip(-1), x0)
    sigma = (P_MEAN + P_STD * torch.randn(B)).exp()
    return x0, sigma.sort().values, torch.randn_like(x0)       # sorted: stage by stage (by_stage)


def training_loss(net, config, x0, sigma, eps):
    """EDM's loss, per pixel; each sample by the decoder of its own stage."""
    stage = sigma_stage(sigma.cpu(), config["edges"])          # the one time in a step that the device is waited for
    return edm_loss(lambda x, t, y: net(x, t, stage), x0, sigma, eps) / x0[0].numel()


def generate(net, config, plan, seeds, device):
    """Images (n, C, R, R) of a plan, one for each seed."""
    def denoiser(xt, sigma):
        stage = sigma_stage(sigma, config["edges"])
        with autocast(xt.device, config["precision"]):
            return denoise(lambda x, t, y: net(x, t, stage), xt, torch.full((len(xt),), sigma, device=xt.device))

    noise = noise_for(seeds, (config["channels"], config["res"], config["res"])).to(device)
    return heun_sample(denoiser, noise, noise_levels(plan["steps"], *SIGMA_RANGE))


def preview(net, config, device):
    """32 images of a network in training: eleven evaluations."""
    return generate(net, config, dict(steps=6), range(32), device)


def make_plan(net, config, device):
    """What is run: Heun's steps, the sigma of each evaluation and how many there are in each stage, from a run of the
    sampler."""
    seen, edges = [], config["edges"]
    heun_sample(lambda xt, sigma: (seen.append(sigma), xt)[1], torch.zeros(1, 1, 1, 1),
                noise_levels(config["steps"], *SIGMA_RANGE))
    stages = [sigma_stage(sigma, edges) for sigma in seen]
    return dict(solver="heun", steps=config["steps"], nfe=len(seen), edges=edges, sigmas=[round(s, 6) for s in seen],
                by_stage=[stages.count(s) for s in range(len(edges) + 1)])


def describe(plan):
    """A plan in words, as --sample prints it."""
    return (f"Heun, {plan['steps']} steps, {plan['nfe']} evaluations, {' + '.join(map(str, plan['by_stage']))} from "
            f"the data's stage on, edges {plan['edges']}, sigma {plan['sigmas']}")


script.__doc__, script.SCRIPT = __doc__, "multistage_edm"
script.CONFIG["run"]["out"] = ("runs/multistage_edm", *script.CONFIG["run"]["out"][1:])
script.CONFIG["training"]["shares"] = ([1.0], (1, 1), "those of EDM's levels: no choice")
script.CONFIG["method"] = {"steps": (18, (1, 10_000), "Heun steps, two evaluations each but the last")}
for function in (draw_batch, training_loss, generate, preview, make_plan, describe):
    setattr(script, function.__name__, function)

if __name__ == "__main__":
    run_main(script.main, script.SCRIPT)
