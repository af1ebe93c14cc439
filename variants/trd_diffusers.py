"""TRD (arXiv 2603.21348, Sec. III-B; c2f_trd.py) for pipelines of diffusers: the few time steps worth taking, found in
minutes, with guidance, in latents. Needs c2f_trd.py and common.py in the folder above.

    plan = search_timesteps(pipe, 8, prompts=["a fox in the snow", "a red house", ...])
    image = pipe("a lighthouse", timesteps=plan["timesteps"]).images[0]

    python variants/trd_diffusers.py PATH_OR_ID --prompt "a fox" "a red house" --steps 8 --out plan.json

The sampler is the script's own, which on the same steps makes what the pipeline's scheduler makes: DDIM or DPM-Solver++
2M. Schedulers, their settings, pipelines without timesteps=, (D25), ...: results/for_diffusers.
"""
import argparse
import copy
import functools
import inspect
import sys
import time
from fractions import Fraction
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from c2f_trd import (BEST_OF, CALIBRATION, CALIBRATION_SEED, POWERS, REFERENCE_STEPS,  # noqa: E402
                     dpm_solver_pp_sample, eps_of_v, trd_search, uniform_steps)
from common import noise_for, progress, run_main, save_json, scale_and_sigma  # noqa: E402

NETWORKS = {"DDPMPipeline": "unet", "DDIMPipeline": "unet", "StableDiffusionPipeline": "unet",
            "StableDiffusionXLPipeline": "unet", "PixArtAlphaPipeline": "transformer",
            "PixArtSigmaPipeline": "transformer"}
CALLABLE = {"DDPMPipeline": ("DDIMScheduler", "DPMSolverMultistepScheduler"), "DDIMPipeline": ("DDIMScheduler",)}
OWN = {"num_inference_steps", "timesteps", "sigmas", "eta", "generator", "latents", "output_type", "denoising_end",
       "guidance_rescale"}     # arguments of a call that the search decides, or that its sampler does not have
OWN_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")
NEEDED = {                     # settings with which a scheduler is the script's sampler on a list of steps
    "DDIMScheduler": dict(clip_sample=False, thresholding=False, set_alpha_to_one=True),
    "EulerDiscreteScheduler": dict(timestep_spacing="leading", final_sigmas_type="zero", interpolation_type="linear",
                                   timestep_type="discrete", **dict.fromkeys(OWN_SIGMAS[:3], False)),
    "DPMSolverMultistepScheduler": dict(algorithm_type="dpmsolver++", solver_type="midpoint", thresholding=False,
                                        final_sigmas_type="zero", **dict.fromkeys(OWN_SIGMAS, False))}


def need(ok, text):
    if not ok:
        raise ValueError(text)


def falls(taus, T):
    """Do the steps fall strictly, in T - 1 .. 0?"""
    return all(a > b for a, b in zip([T, *taus], [*taus, -1]))


def fitting(scheduler):
    """Name of the class and settings (a dict, {} if it fits) with which this scheduler, or in place of one unknown
    DPM-Solver++ 2M, is the script's sampler on a list of steps."""
    from diffusers import DPMSolverMultistepScheduler
    name = type(scheduler).__name__
    need(hasattr(scheduler, "alphas_cumprod"), f"{name} has no alphas_cumprod: for flows take trd_flow.py")
    if name not in NEEDED or scheduler.alphas_cumprod[-1] == 0:
        scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)
        name = "DPMSolverMultistepScheduler"
    wrong = {key: v for key, v in NEEDED[name].items() if scheduler.config.get(key, v) != v}
    if scheduler.config.get("solver_order", 1) > 2:
        wrong["solver_order"] = 2
    return name, wrong


def order_of(scheduler):
    """1 (DDIM) or 2 (DPM-Solver++ 2M): what the scheduler is. ValueError, with the line that mends it, if neither."""
    (name, wrong), given = fitting(scheduler), type(scheduler).__name__
    mend = "".join(f", {key}={value!r}" for key, value in wrong.items())
    need(name == given and not wrong, f"{given} as set is no DDIM or DPM-Solver++ 2M from a list of steps to clean "
         f"data: pipe.scheduler = {name}.from_config(pipe.scheduler.config{mend})")
    need(scheduler.config.prediction_type in ("epsilon", "v_prediction", "sample"),
         f"prediction_type '{scheduler.config.prediction_type}': TRD knows epsilon, v_prediction, sample")
    return scheduler.config.get("solver_order", 1)


def alpha_bar_of(scheduler):
    """Float64 (T + 1,): the scheduler's alphas_cumprod, then 1: clean data, t = -1."""
    return torch.cat([scheduler.alphas_cumprod.double().cpu(), torch.ones(1, dtype=torch.float64)])


def default_timesteps(scheduler, steps):
    """The steps that the scheduler itself takes, a list of ints."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    return [int(t + 0.5) for t in scheduler.timesteps.tolist()]


def with_timesteps(scheduler, timesteps):
    """A copy of a scheduler that takes these steps, falling ints, whatever number of steps it is asked for: for
    pipelines without timesteps= (DDPMPipeline, DDIMPipeline), and for DDIMScheduler, which takes no list."""
    order_of(scheduler)
    plain, taus, T = type(scheduler), [int(t) for t in timesteps], scheduler.config.num_train_timesteps
    need(taus and falls(taus, T), f"the steps must fall, in {T - 1} .. 0: {taus}")
    takes_list = plain.__name__ != "DDIMScheduler"

    class WithTimesteps(plain):
        def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, **kwargs):
            need(timesteps is None or [int(t) for t in timesteps] == taus, f"this scheduler takes the steps {taus}")
            if takes_list:
                return super().set_timesteps(timesteps=taus, device=device, **kwargs)
            self.num_inference_steps, self.timesteps = len(taus), torch.tensor(taus, device=device)

        @functools.wraps(plain.step)
        def step(self, model_output, timestep, *args, **kwargs):
            if not takes_list:         # DDIMScheduler goes to timestep - T // num_inference_steps: the next of taus
                i = taus.index(int(timestep))
                self.num_inference_steps = Fraction(T, taus[i] - [*taus, -1][i + 1])
            return super().step(model_output, timestep, *args, **kwargs)

    functools.update_wrapper(WithTimesteps, plain, updated=())     # its name is saved
    return WithTimesteps.from_config(scheduler.config)


def network_call(pipe, **arguments):
    """What the pipeline calls its network with: x (n, C, h, w) of a sample (n = 1) or a pair [null, text] (n = 2), and
    the keywords, without the step. So the pipeline itself encodes prompts and sizes; it makes two steps for it."""
    network, scheduler, seen = getattr(pipe, NETWORKS[type(pipe).__name__]), pipe.scheduler, []
    shown = {key: v for key, v in vars(pipe).items() if key == "_progress_bar_config"}
    hook = network.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        pipe.scheduler = copy.deepcopy(scheduler)
        pipe.set_progress_bar_config(disable=True)
        pipe(num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0), **arguments)
    finally:
        hook.remove()
        del pipe._progress_bar_config
        vars(pipe).update(shown)
        pipe.scheduler = scheduler
    (x, *_), kwargs = seen[0]
    return x, {key: v for key, v in kwargs.items() if key != "timestep"}


def eps_model_of(pipe, prompts=None, guidance_scale=None, batch=4, **call):
    """The pipeline as a function of samples' numbers that gives their eps_model; the shape (C, h, w) of a sample.

    prompts: texts, or dicts of arguments of the pipeline's call (prompt_embeds=, ...), of one image each: sample i has
    prompt i mod their number; None for pipelines without text. guidance_scale w: None is the pipeline's own. batch:
    samples (pairs, with guidance) in a call of the network. call: arguments of each call (height=, ...).
    eps_model(xt, t) -> eps_hat: xt (m B, C, h, w) float64 on the CPU, m copies of the B samples; t (m B,) int64. With
    guidance null + w (text - null); then of v, sqrt(alpha_bar) v + sqrt(1 - alpha_bar) xt, of x0, (xt -
    sqrt(alpha_bar) x0) / sqrt(1 - alpha_bar). The network runs in its own dtype. ValueError: what does not fit."""
    kind, scheduler = type(pipe).__name__, pipe.scheduler
    order_of(scheduler)
    need(kind in NETWORKS, f"TRD knows {', '.join(NETWORKS)}, not {kind}")
    need(type(scheduler).__name__ in CALLABLE.get(kind, NEEDED), f"{kind} fits no {type(scheduler).__name__}: take "
         "DDPMPipeline(pipe.unet, DPMSolverMultistepScheduler.from_config(pipe.scheduler.config))")
    need(batch >= 1, f"batch {batch}: at least 1")
    need(not OWN & set(call), f"{', '.join(sorted(OWN & set(call)))}: not in a search")
    network, text = getattr(pipe, NETWORKS[kind]), kind not in CALLABLE
    if text:
        need(prompts and not isinstance(prompts, str),
             f'{kind} makes images of texts: give prompts=["a fox", "a red house", ...]')
        default = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
        w = default if guidance_scale is None else guidance_scale
        prompts = [dict(prompt=prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        calls = [network_call(pipe, guidance_scale=w, **call, **prompt) for prompt in progress(prompts, "prompts")]
        need(all(len(x) == 1 or len(x) == 2 and w > 1 for x, _ in calls), "prompts: one image each")
    else:
        need(not (prompts or call) and guidance_scale is None, f"{kind} takes no prompts, guidance_scale, {list(call)}")
        side, dtype = network.config.sample_size, next(network.parameters()).dtype
        size = (side, side) if isinstance(side, int) else side
        calls = [(torch.empty(1, network.config.in_channels, *size, dtype=dtype, device=pipe._execution_device), {})]
    n, (C, *size) = len(calls[0][0]), calls[0][0].shape[1:]
    alpha_bar = alpha_bar_of(scheduler)

    def join(*leaves):                                         # of each sample: all first ones, then all second ones
        batched = torch.is_tensor(leaves[0]) and leaves[0].shape[:1] == (n,)
        return torch.cat([v[i:i + 1] for i in range(n) for v in leaves]) if batched else leaves[0]

    def predict(x, t, part):
        like, kwargs = calls[part[0]][0], tree_map(join, *(calls[i][1] for i in part))
        x, t = torch.cat([x] * n).to(like), torch.cat([t] * n).to(like.device)
        out = network(x, t) if not text else network(x, timestep=t, **kwargs)
        out = (out[0] if isinstance(out, tuple) else out.sample)[:, :C].cpu().double()         # no learned variance
        if n == 1:
            return out
        null, text_hat = out.chunk(2)
        return null + w * (text_hat - null)

    def eps_model_for(numbers):
        owners = [int(i) % len(calls) for i in numbers]

        def eps_model(xt, t):
            rows = torch.arange(len(xt))
            out = torch.cat([predict(xt[r], t[r], [owners[i % len(owners)] for i in r.tolist()])
                             for r in rows.split(batch)])
            if scheduler.config.prediction_type == "epsilon":
                return out
            if scheduler.config.prediction_type == "v_prediction":
                return eps_of_v(out, xt, t, alpha_bar)
            scale, sigma = scale_and_sigma(t, alpha_bar, xt)
            return (xt - scale * out) / sigma
        return eps_model
    return eps_model_for, (C, *size)


def starting_steps(start, scheduler, steps):
    """Lists of steps, of which the search begins with the best. start: "best": the script's (D12) and the scheduler's
    own; "inclusive", "exclusive": the script's; "default": the scheduler's own; or a list."""
    T = scheduler.config.num_train_timesteps
    if start == "best":
        found = [uniform_steps(T - 1, steps, power) for power in BEST_OF] + [default_timesteps(scheduler, steps)]
    elif isinstance(start, str):
        need(start in (*POWERS, "default"), f"start '{start}': best, inclusive, exclusive, default or a list of steps")
        found = [uniform_steps(T - 1, steps, POWERS[start]) if start in POWERS else default_timesteps(scheduler, steps)]
    else:
        found = [[int(t) for t in start]]
        need(len(found[0]) == steps, f"start: {len(found[0])} steps, not {steps}")
    fit = [taus for taus in found if falls(taus, T)]
    need(fit, f"start: the steps must fall, in {T - 1} .. 0: {found[0]}")
    return fit


@torch.no_grad()
def search_timesteps(pipe, steps, prompts=None, guidance_scale=None, calibration=CALIBRATION,
                     reference_steps=REFERENCE_STEPS, start="best", held_out=CALIBRATION, batch=4,
                     seed=CALIBRATION_SEED, out=None, **call):
    """TRD: the steps with which the pipeline's sampler comes closest to 100 steps of DDIM, in mean squared error of
    `calibration` samples (of latents, where it has them), from the noise of seed, seed + 1, ...

    pipe: one of NETWORKS; its scheduler is the solver. steps: at least 2. prompts, guidance_scale, batch, call: as in
    eps_model_of; take what will be used later. start: as in starting_steps. held_out: further samples, only
    measured. out: a path, where the plan is written as JSON.
    Returns the plan, a dict: timesteps (falling ints, all evaluated) for pipe(..., timesteps=) or set_timesteps;
    default: the scheduler's own; start: where the search began; loss: {default, start, after} on the calibration
    samples (None: no falling ints), held_out: the same on the others; evaluations of the network a sample, by the
    search and by all; seconds; sweeps: loss after each.
    Leaves the pipeline as it was. ValueError: what does not fit."""
    begun, scheduler = time.time(), pipe.scheduler
    for name, number, least in (("steps", steps, 2), ("calibration", calibration, 1), ("held_out", held_out, 0)):
        need(isinstance(number, int) and number >= least, f"{name} {number}: a whole number, at least {least}")
    eps_model_for, shape = eps_model_of(pipe, prompts, guidance_scale, batch, **call)
    order, alpha_bar = order_of(scheduler), alpha_bar_of(scheduler)
    T = len(alpha_bar) - 1
    need(steps < reference_steps <= T, f"reference_steps {reference_steps}: more than {steps}, at most {T}")
    starts, own = starting_steps(start, scheduler, steps), default_timesteps(scheduler, steps)
    numbers = torch.arange(calibration + held_out)
    noise = noise_for(seed + numbers, shape).double()          # on the CPU: next to the network it costs nothing

    def sample(part, taus, order):
        return dpm_solver_pp_sample(eps_model_for(part), noise[part], taus, alpha_bar, order)

    grid, parts = uniform_steps(T - 1, reference_steps), numbers.split(batch)
    x_ref = torch.cat([sample(part, grid, 1) for part in progress(parts, "reference", batch)])
    need(x_ref.isfinite().all(), "the network gives values that are not finite: load it in another dtype")
    search, others, evaluations = numbers[:calibration], numbers[calibration:], reference_steps

    def loss(part, taus):
        nonlocal evaluations
        if not falls(taus, T):
            return None
        evaluations += len(taus) * (part is search)
        return float((sample(part, taus, order) - x_ref[part]).square().mean())

    losses = [loss(search, taus) for taus in progress(starts, "starts", calibration)]
    first = starts[losses.index(min(losses))]
    (taus,), report = trd_search([(eps_model_for(search), noise[search])], [first], x_ref[search], alpha_bar, order)
    plan = dict(timesteps=taus, default=own, start=first)
    plan["loss"] = dict(default=loss(search, own), start=report["loss"][0], after=report["loss"][-1])
    plan["held_out"] = {key: loss(others, steps) for key, steps in dict(default=own, start=first, after=taus).items()
                        if held_out}
    plan.update(evaluations=dict(search=report["evaluations"][0], all=evaluations + report["evaluations"][0]),
                seconds=round(time.time() - begun, 2), sweeps=report["loss"], pipeline=type(pipe).__name__,
                scheduler=type(scheduler).__name__, settings=NEEDED[type(scheduler).__name__],
                solver="dpm2" if order == 2 else "ddim", guidance_scale=guidance_scale, calibration=calibration)
    pipe.maybe_free_model_hooks()                              # offloads
    if out:
        save_json(out, plan)
    return plan


def describe(plan):
    """A plan in words."""
    lines = [f"{key}: " + ", ".join(f"{k} {v if v is None else format(v, '.3e')}" for k, v in plan[key].items())
             for key in ("loss", "held_out")]
    return "\n".join([f"timesteps={plan['timesteps']}", *lines,
                      f"{plan['evaluations']['all']} evaluations a sample, {plan['seconds']} s"])


def command(dtype):
    """The command line, its pipeline."""
    p = argparse.ArgumentParser(description="Time steps (TRD) as JSON")
    p.add_argument("path")
    p.add_argument("--prompt", nargs="+")
    for name, kind, default in (("steps", int, 8), ("guidance", float, None), ("batch", int, 4),
                                ("out", Path, "plan.json")):
        p.add_argument(f"--{name}", type=kind, default=default)
    args = p.parse_args()
    from diffusers import DiffusionPipeline
    device, dtype = ("cuda", dtype) if torch.cuda.is_available() else ("cpu", torch.float32)
    return args, DiffusionPipeline.from_pretrained(args.path, dtype=dtype).to(device)


def main():
    import diffusers
    args, pipe = command(torch.float16)
    name, wrong = fitting(pipe.scheduler)
    if wrong or name != type(pipe.scheduler).__name__:
        print(f"the scheduler, here and where the steps will be used: {name}, {wrong}")
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **wrong)
    print(describe(search_timesteps(pipe, args.steps, args.prompt, args.guidance, batch=args.batch, out=args.out)))


if __name__ == "__main__":
    run_main(main, "trd_diffusers")
