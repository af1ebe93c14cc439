"""The tables of results/for_diffusers that are measured: TRD of variants/trd_diffusers.py against the usual spacings.

    python results/for_diffusers/experiments.py trd_ddim trd_dpm2          # then python results/report.py
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import ROOT, append_row, load_script, opened, sha256_of, start  # noqa: E402
import c2f_trd as c2f  # noqa: E402
from common import noise_for, progress  # noqa: E402

STEPS = (5, 10)
HELD_OUT = 64                          # samples beside the 16 of the search


class AsUNet2DModel(torch.nn.Module):
    """A network of c2f_trd.py as diffusers' pipelines call theirs."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, net, config):
        super().__init__()
        self.net, self.config = net, SimpleNamespace(sample_size=config["res"], in_channels=config["channels"])

    def forward(self, x, t):
        x = x.contiguous(memory_format=torch.channels_last)
        return SimpleNamespace(sample=self.net(x, torch.as_tensor(t).expand(len(x))))


@torch.no_grad()
def sample(unet, scheduler, noise, **steps):
    """The loop of diffusers' pipelines: x0 (n, C, R, R) from noise, and the steps taken."""
    scheduler.set_timesteps(**steps)
    xt = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        xt = scheduler.step(unet(scheduler.scale_model_input(xt, t), t).sample, t, xt).prev_sample
    return xt, [int(t) for t in scheduler.timesteps]


def compare(experiment, order):
    """Rows of an experiment: loss of TRD and of the usual spacings, through the schedulers of diffusers, on the network
    of c2f_trd.py."""
    from diffusers import DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler
    from diffusers.schedulers import AysSchedules
    trd = load_script("trd_diffusers")
    _, net, config, _, _ = opened("c2f_trd", "--checkpoint weights/c2f_trd/base.pt --method base --device cpu")
    unet = AsUNet2DModel(net, config)
    common = dict(prediction_type="v_prediction", clip_sample=False)

    def solver(order, **options):
        return DPMSolverMultistepScheduler.from_config(common, solver_order=order, **options)

    first, n = c2f.CALIBRATION_SEED, c2f.CALIBRATION           # the search's noise, then that of others
    noise = noise_for(range(first, first + n + HELD_OUT), (config["channels"], config["res"], config["res"]))
    eps_model_for, _ = trd.eps_model_of(DDPMPipeline(unet, solver(1)), batch=n)
    grid, alpha_bar = c2f.uniform_steps(c2f.T - 1, c2f.REFERENCE_STEPS), trd.alpha_bar_of(solver(1))
    x_ref = torch.cat([c2f.dpm_solver_pp_sample(eps_model_for(range(n)), z.double(), grid, alpha_bar, order=1)
                       for z in progress(noise.split(n), "reference", n)]).float()
    for K in STEPS:
        plan = trd.search_timesteps(DDPMPipeline(unet, solver(order)), K, held_out=0, batch=n)
        own = DDIMScheduler.from_config(common) if order == 1 else solver(2)
        trailing, karras = type(own).from_config(own.config, timestep_spacing="trailing"), dict(use_karras_sigmas=True)
        arms = {arm: (scheduler, dict(num_inference_steps=K)) for arm, scheduler in (
            ("default", own), ("trailing", trailing), ("Karras", solver(order, **karras)))}
        for kind in ("", "XL") if K == 10 else ():             # the lists that diffusers has
            arms[f"AYS, SD{kind}'s"] = solver(order), dict(timesteps=AysSchedules[f"StableDiffusion{kind}Timesteps"])
        arms["where TRD starts"] = solver(order), dict(timesteps=plan["start"])
        arms["TRD"] = solver(order), dict(timesteps=plan["timesteps"])
        for arm, (scheduler, steps) in arms.items():
            x, taus = sample(unet, scheduler, noise, **steps)
            error = (x - x_ref).square().flatten(1).mean(1)
            cells = {"time steps": " ".join(map(str, taus)), f"loss on the search's {n}": float(error[:n].mean()),
                     f"on {HELD_OUT} others": float(error[n:].mean())}
            if arm == "TRD":
                cells.update({"evaluations a sample": plan["evaluations"]["all"], "seconds": plan["seconds"]})
            row = dict(experiment=experiment, arm=f"{K} steps: {arm}", cells=cells,
                       device=f"CPU, {torch.get_num_threads()} threads", torch=torch.__version__,
                       source_sha256=sha256_of(trd.__file__))
            print(f"{row['arm']}: {cells}", flush=True)
            append_row(ROOT / "results" / "for_diffusers" / "results.jsonl", row)


def trd_ddim():
    """TRD against the scheduler's default, trailing, Karras, AYS: DDIM."""
    compare("trd_ddim", 1)


def trd_dpm2():
    """TRD against the scheduler's default, trailing, Karras, AYS: DPM-Solver++ 2M."""
    compare("trd_dpm2", 2)


FUNCTIONS = (trd_ddim, trd_dpm2)

if __name__ == "__main__":
    start(FUNCTIONS)
