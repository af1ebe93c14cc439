"""TRD (arXiv 2603.21348, Sec. III-B; c2f_trd.py) for flow-matching pipelines of diffusers, Stable Diffusion 3 and Flux:
the few noise levels worth taking, with guidance, in latents. Needs c2f_trd.py and common.py in the folder above it,
changed.py and trd_diffusers.py beside it.

    plan = search_sigmas(pipe, 8, prompts=["a fox in the snow", "a red house", ...])
    image = pipe("a lighthouse", sigmas=plan["sigmas"], num_inference_steps=8).images[0]

    python variants/trd_flow.py PATH_OR_ID --prompt "a fox" "a red house" --steps 8 --out plan.json

Euler's method on a flow, xt = (1 - sigma) x0 + sigma eps, is DDIM at alpha_bar = (1 - sigma)^2 / ((1 - sigma)^2 +
sigma^2), in units of its denominator's root: so the script searches it as it is. (D28), ...: results/for_diffusers.
"""
import inspect
import time

import torch
from torch.utils._pytree import tree_map

from changed import copy_of
from trd_diffusers import command, describe, need              # which finds the scripts
from common import noise_for, progress, run_main, save_json

T = 10_000                             # noise levels among which is searched: sigma = (t + 1) / T, before the shift
LAST = 1 - 1e-6                        # in place of sigma = 1, where alpha_bar would be 0
PIPELINES = ("StableDiffusion3Pipeline", "FluxPipeline")
OWN = {"num_inference_steps", "timesteps", "sigmas", "generator", "latents", "output_type", "mu", "true_cfg_scale",
       "skip_guidance_layers"}         # arguments of a call that the search decides, or that its sampler does not have
WRONG = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling",
         "shift_terminal")             # settings of the scheduler that are not Euler's method on a shifted list

script = copy_of("c2f_trd")
candidate_steps = script.candidate_steps
# The pipeline begins with noise of unit variance, whatever its first sigma: that stays 1 (D28).
script.candidate_steps = lambda taus, i, n=script.CANDIDATES: candidate_steps(taus, i, n) if i else []


def network_call(pipe, **arguments):
    """What the pipeline calls its transformer with, in two steps from sigma 1 and .5: the first input x, keywords, what
    it takes for the time at sigma = 1; k of the scheduler's shift, sigma -> k sigma / (1 + (k - 1) sigma)."""
    scheduler, seen = pipe.scheduler, []
    hook = pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs),
                                                      with_kwargs=True)
    try:
        pipe.scheduler = type(scheduler).from_config(scheduler.config)
        pipe(sigmas=[1.0, 0.5], num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0),
             **arguments)
        sigma = float(pipe.scheduler.sigmas[1])
    finally:
        hook.remove()
        pipe.scheduler = scheduler
    need(len(seen) == 2, f"{len(seen)} calls of the network in two steps: TRD knows one a step")
    kwargs = dict(seen[0])
    x, time_of_one = kwargs.pop("hidden_states"), float(kwargs.pop("timestep").flatten()[0])
    return x, kwargs, time_of_one, sigma / (1 - sigma)


def shifted(sigma, k):
    """The scheduler's shift; of a tensor, float64."""
    return (k * sigma / (1 + (k - 1) * sigma)).clamp(max=LAST)


def eps_model_of(pipe, prompts, guidance_scale=None, batch=4, **call):
    """The pipeline as a function of samples' numbers that gives their eps_model; the shape of a sample; k of its shift.

    As trd_diffusers.eps_model_of; eps_model(xt, t) -> eps_hat has xt (m B, C, h, w) in units of sqrt((1 - sigma)^2 +
    sigma^2), sigma = shifted((t + 1) / T); of the network's v, eps_hat = x + (1 - sigma) v for the flow's x."""
    kind, scheduler = type(pipe).__name__, pipe.scheduler
    need(kind in PIPELINES, f"TRD knows {', '.join(PIPELINES)} here, trd_diffusers.py others: not {kind}")
    need(type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler" and not any(map(scheduler.config.get, WRONG)),
         "the scheduler is no plain Euler: pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config("
         f"pipe.scheduler.config, {', '.join(f'{key}=None' for key in WRONG if scheduler.config.get(key))})")
    need(batch >= 1, f"batch {batch}: at least 1")
    need(not OWN & set(call), f"{', '.join(sorted(OWN & set(call)))}: not in a search")
    need(prompts and not isinstance(prompts, str), f'{kind}: give prompts=["a fox", "a red house", ...]')
    default = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
    w = default if guidance_scale is None else guidance_scale
    calls = [network_call(pipe, guidance_scale=w, **call, **(dict(prompt=p) if isinstance(p, str) else p))
             for p in progress(prompts, "prompts")]
    n, k = len(calls[0][0]), calls[0][3]
    need(all(len(x) == n for x, *_ in calls) and n in (1, 2) and (n == 1 or w > 1), "prompts: one image each")

    def join(*leaves):                                         # of each sample: all first ones, then all second ones
        batched = torch.is_tensor(leaves[0]) and leaves[0].shape[:1] == (n,)
        return torch.cat([v[i:i + 1] for i in range(n) for v in leaves]) if batched else leaves[0]

    def predict(x, sigma, part):
        like, _, time_of_one, _ = calls[part[0]]
        x = torch.cat([x] * n).to(like).reshape(-1, *like.shape[1:])
        out = pipe.transformer(hidden_states=x, timestep=torch.cat([sigma * time_of_one] * n).to(like),
                               **tree_map(join, *(calls[i][1] for i in part)))
        out = (out[0] if isinstance(out, tuple) else out.sample).cpu().double()
        null, text = out.chunk(2) if n == 2 else (out, out)
        return null + w * (text - null)

    def eps_model_for(numbers):
        owners = [int(i) % len(calls) for i in numbers]

        def eps_model(xt, t):
            sigma, rows = shifted((t.double() + 1) / T, k), torch.arange(len(xt))
            s = sigma.view(-1, 1, 1, 1)
            x = xt * ((1 - s) ** 2 + s ** 2).sqrt()
            v = torch.cat([predict(x[r], sigma[r], [owners[i % len(owners)] for i in r.tolist()])
                           for r in rows.split(batch)])
            return x + (1 - s) * v.view_as(x)
        return eps_model

    shape = tuple(calls[0][0].shape[1:])
    return eps_model_for, shape if len(shape) == 3 else (1, *shape), k         # Flux: a sequence


def alpha_bar_of(k):
    """Float64 (T + 1,): of the levels, then 1: clean data, t = -1."""
    sigma = shifted(torch.arange(1, T + 1, dtype=torch.float64) / T, k)
    return torch.cat([(1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma ** 2), torch.ones(1, dtype=torch.float64)])


def default_steps(pipe, steps, k):
    """The levels that the pipeline takes without sigmas=, as steps t: those of its scheduler (SD3), or, of Flux, sigmas
    from 1 to 1 / steps."""
    sigma = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    if "Flux" not in type(pipe).__name__:
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, use_dynamic_shifting=False, shift=k)
        scheduler.set_timesteps(steps)
        sigma = scheduler.sigmas[:-1].double()
        sigma = sigma / (k - (k - 1) * sigma)                  # the shift is undone
    return [max(int(float(s) * T + 0.5) - 1, 0) for s in sigma]


@torch.no_grad()
def search_sigmas(pipe, steps, prompts, guidance_scale=None, calibration=script.CALIBRATION,
                  reference_steps=script.REFERENCE_STEPS, held_out=script.CALIBRATION, batch=4,
                  seed=script.CALIBRATION_SEED, out=None, **call):
    """TRD: the noise levels with which the pipeline comes closest to `reference_steps` steps of its own, in mean
    squared error of `calibration` samples of latents from the noise of seed, seed + 1, ... The search begins with the
    best of the script's spacings (D12), whose first step is the first level, and the pipeline's own.

    pipe: one of PIPELINES. The others and the plan: as in trd_diffusers.search_timesteps, but that the plan has, in
    place of time steps, sigmas: what pipe(..., sigmas=) takes, before the scheduler's shift. ValueError: what does not
    fit."""
    begun = time.time()
    for name, number, least in (("steps", steps, 2), ("calibration", calibration, 1), ("held_out", held_out, 0)):
        need(isinstance(number, int) and number >= least, f"{name} {number}: a whole number, at least {least}")
    need(steps < reference_steps <= T, f"reference_steps {reference_steps}: more than {steps}, at most {T}")
    eps_model_for, shape, k = eps_model_of(pipe, prompts, guidance_scale, batch, **call)
    alpha_bar, own, numbers = alpha_bar_of(k), default_steps(pipe, steps, k), torch.arange(calibration + held_out)
    noise, evaluations = noise_for(seed + numbers, shape).double(), reference_steps

    def sample(part, taus):
        return script.dpm_solver_pp_sample(eps_model_for(part), noise[part], taus, alpha_bar, 1)

    grid = script.uniform_steps(T - 1, reference_steps, 1)
    x_ref = torch.cat([sample(part, grid) for part in progress(numbers.split(batch), "reference", batch)])
    need(x_ref.isfinite().all(), "the network gives values that are not finite: load it in another dtype")
    search, others = numbers[:calibration], numbers[calibration:]

    def loss(part, taus):
        nonlocal evaluations
        evaluations += len(taus) * (part is search)
        return float((sample(part, taus) - x_ref[part]).square().mean())

    starts = [own, *(script.uniform_steps(T - 1, steps, power) for power in script.BEST_OF if power)]
    losses = [loss(search, taus) for taus in progress(starts, "starts", calibration)]
    first = starts[losses.index(min(losses))]
    (taus,), report = script.trd_search([(eps_model_for(search), noise[search])], [first], x_ref[search], alpha_bar)
    levels = {key: [(t + 1) / T for t in found] for key, found in dict(sigmas=taus, default=own, start=first).items()}
    plan = dict(levels, loss=dict(default=losses[0], start=report["loss"][0], after=report["loss"][-1]))
    plan["held_out"] = {key: loss(others, found) for key, found in dict(default=own, start=first, after=taus).items()
                        if held_out}
    plan.update(evaluations=dict(search=report["evaluations"][0], all=evaluations + report["evaluations"][0]),
                seconds=round(time.time() - begun, 2), sweeps=report["loss"], pipeline=type(pipe).__name__, shift=k,
                guidance_scale=guidance_scale, calibration=calibration)
    pipe.maybe_free_model_hooks()                              # offloads
    if out:
        save_json(out, plan)
    return plan


def main():
    args, pipe = command(torch.bfloat16)
    plan = search_sigmas(pipe, args.steps, args.prompt, args.guidance, batch=args.batch, out=args.out)
    print(describe(dict(plan, timesteps=plan["sigmas"])).replace("timesteps", "sigmas", 1))


if __name__ == "__main__":
    run_main(main, "trd_flow")
