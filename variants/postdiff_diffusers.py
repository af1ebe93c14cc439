"""PostDiff (arXiv 2508.06160) on pipelines of diffusers: cheaper denoising steps, no training. Copy this file beside
your program. How to use it, also as a command, and D1, D2, ...: results/for_diffusers/README.md.

    with postdiff(pipe):  # or handle = apply_postdiff(pipe) ... handle.remove()
        image = pipe("a fox", num_inference_steps=20).images[0]

The pipeline becomes an instance of a subclass, whose __call__ takes hold of the scheduler and network that it finds,
and lets go however it ends. Why not diffusers' own means: the copy of a module in its HookRegistry calls the original,
and one hook removed disables the next; its caches allow no change of size, and U-Nets have no CacheMixin; callbacks
get no x0_hat, and PixArt has none."""
import argparse
import contextlib
import functools
import inspect
from collections import namedtuple
from fractions import Fraction
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

NAMES = "s", "beta", "k", "m", "depth", "choice"
SETTINGS = {"StableDiffusionPipeline": (0.5, 0.5, 2, 0.75, 1, "cond"),  # Table 2
            "LatentConsistencyModelPipeline": (0.5, 0.5, 1, 0.5, 1, "cond"),
            "StableDiffusionXLPipeline": (0.2, 0.75, 2, 0.75, 1, "cond"),
            "PixArtAlphaPipeline": (0.5, 0.75, 1, 0.75, None, "cond"),
            "StableDiffusion3Pipeline": (0.5, 0.75, 1, 0.75, None, "none")}  # not the paper's (D20)
CHOICES = "cond", "uncond", "ave", "cfg", "none"
SCHEDULERS = "DDIM DDPM EulerDiscrete EulerAncestralDiscrete LCM DPMSolverMultistep UniPCMultistep"  # they give x0_hat
Pass = namedtuple("Pass", "step batch height width full guided frozen")  # of the latent


def need(ok, text):
    if not ok:
        raise ValueError(text)


def token_grid(n, h, w):
    """(height, width) of n tokens that come from an h x w latent by halvings, rounded up."""
    while h * w > n:
        h, w = (h + 1) // 2, (w + 1) // 2
    return h, w


def deep_modules(unet, depth):
    """What DeepCache's branch `depth` skips in a UNet2DConditionModel, in order (D5)."""
    i, layer = divmod(depth, len(unet.up_blocks[-1].resnets))
    down, up = unet.down_blocks[i], unet.up_blocks[-1 - i]

    def layers(block, some):
        return [part[j] for j in some for part in (block.resnets, getattr(block, "attentions", None)) if part]

    return [*layers(down, range(layer, len(down.resnets))), *(down.downsamplers or ()), *unet.down_blocks[i + 1:],
            *filter(None, [unet.mid_block]), *unet.up_blocks[:-1 - i], *layers(up, range(len(up.resnets) - 1 - layer))]


class DeepCache:
    """A deep module: on a shallow pass the last one gives what it gave last, the others zeros of the same shape."""

    def __init__(self, run, is_last):
        self.run, self.keep = run, torch.clone if is_last else lambda o: o.new_zeros(()).expand(o.shape)

    def __call__(self, forward, *args, **kwargs):
        if self.run.shallow:
            return tree_map(torch.clone, self.out)  # FreeU writes into what it gets
        out = forward(*args, **kwargs)
        self.out = tree_map(self.keep, out)
        return out


class CrossCache:
    """A cross-attention, its output (B, N, C): when frozen, the last one, resized once to the present tokens (D7)."""

    def __init__(self, run):
        self.run = run

    def __call__(self, forward, hidden_states, *args, **kwargs):
        if not self.run.frozen:
            self.out, self.size = forward(hidden_states, *args, **kwargs), self.run.size
            return self.out
        n, tokens = self.out.shape[1], hidden_states.shape[1]
        if n != tokens:
            image = self.out.transpose(1, 2).unflatten(2, token_grid(n, *self.size))
            size = token_grid(tokens, *self.run.size)
            self.out = F.interpolate(image, size=size, mode="bilinear").flatten(2).transpose(1, 2)
        return self.out


class Hook:
    """In place of a module's forward: asks `cache`, if a call has put one there. It stays on the module, idle, since
    compiled code would be compiled anew for another; copies of the module have copies of it."""

    def __init__(self, forward):
        self.forward, self.cache = forward, None

    def __call__(self, *args, **kwargs):
        return self.cache(self.forward, *args, **kwargs) if self.cache else self.forward(*args, **kwargs)


def hook_of(module):
    if not isinstance(module.forward, Hook):
        module.forward = Hook(module.forward)
    return module.forward


@contextlib.contextmanager
def replaced(owner, name, value):
    """owner.name is value on this instance, then what it was."""
    before = {key: old for key, old in vars(owner).items() if key == name}
    setattr(owner, name, value)
    try:
        yield
    finally:
        del vars(owner)[name]
        vars(owner).update(before)


def denoiser_of(pipe):
    """The network as it is called, and the one inside of torch.compile's."""
    denoiser = pipe.transformer if SETTINGS[type(pipe).__name__][4] is None else pipe.unet
    return denoiser, getattr(denoiser, "_orig_mod", denoiser)


def check_scheduler(pipe, s, mu):
    """ValueError with the line that mends it, if s > 0 and the scheduler gives no x0_hat in every step."""
    name, config, kind = type(pipe.scheduler).__name__, pipe.scheduler.config, type(pipe).__name__
    fits = name.removesuffix("Scheduler") in SCHEDULERS.split() and (
        "++" in config.algorithm_type if name[:3] == "DPM" else "UniPC" not in name or config.predict_x0)
    mend = ("LCM", "") if kind.startswith("Latent") else ("DDIM", ", clip_sample=False")
    if kind.startswith("StableDiffusion3"):  # a shift by size would be the low size's (D20)
        mend = "FlowMatchEulerDiscrete", ", use_dynamic_shifting=False"
        fits = name.startswith(mend[0]) and (mu is not None or not config.use_dynamic_shifting)
    need(fits or not s, "s > 0 needs x0_hat, which {} as set does not give: pipe.scheduler = "
         "{}Scheduler.from_config(pipe.scheduler.config{})".format(name, *mend))


class PostDiff:
    """What apply_postdiff gives. log: a Pass for each one of the last call; table(); remove()."""

    def __init__(self, pipe):
        self.pipe, self.run, self.log = pipe, None, []

    def table(self):
        return "\n".join("\t".join(map(str, row)) for row in [Pass._fields, *self.log])

    def remove(self, *error):
        """The pipeline is what it was, but for idle hooks."""
        if getattr(self.pipe, "postdiff", None) is self:
            self.pipe.__class__ = type(self.pipe).__base__

    def __enter__(self):
        return self

    __exit__ = remove


class Run:
    """One call of the pipeline: its counters and caches."""

    def __init__(self, pipe, plan, w, guidance_scale, mu=None, **more):
        vars(self).update(plan)
        check_scheduler(pipe, self.s, mu)
        self.i, self.n_low, self.age, self.n_guided, self.input, self.log = 0, 0, 0, None, None, []
        self.shallow, self.frozen, self.w = False, False, guidance_scale if w is None else w
        (denoiser, self.network), self.scheduler = denoiser_of(pipe), pipe.scheduler
        self.forward, self.real_step = denoiser._compiled_call_impl or denoiser._call_impl, self.scheduler.step
        step = functools.wraps(self.real_step)(functools.partial(self.step))
        deep = deep_modules(self.network, self.depth) if self.k > 1 else []
        cross = [m for name, m in self.network.named_modules()
                 if name.endswith(".attn2") and self.m < 1 and self.choice != "none"]
        self.deep = [DeepCache(self, m is deep[-1]) for m in deep]
        self.cross = [CrossCache(self) for _ in cross]
        self.changes = [(denoiser, "_compiled_call_impl", self.denoise), (self.scheduler, "step", step), *(
            (hook_of(m), "cache", cache) for m, cache in zip(deep + cross, self.deep + self.cross))]

    def prepare(self, factor, batch, channels, height, width, dtype, device, generator, latents=None):
        """The arguments of prepare_latents, of the low size if there is one (Sec. 2.4)."""
        self.batch, self.generator, size = batch, generator, (height, width)
        if self.s == 0:
            return batch, channels, height, width, dtype, device, generator, latents
        need(latents is None, "latents= are not of the low size: pass generator=, or s=0")
        beta = Fraction(self.beta).limit_denominator(99)
        grid = factor * self.network.config.get("patch_size", 1) * beta.denominator
        near = tuple(max(round(n / grid), 1) * grid for n in size)
        need(near == size, f"beta {beta} of {size} needs multiples of {grid}: the nearest (height, width) is {near}")
        self.full_size, self.n_low = tuple(n // factor for n in size), 1
        return batch, channels, int(beta * height), int(beta * width), dtype, device, generator

    def denoise(self, *args, **kwargs):
        """The network's call, whatever its arguments (Sec. 2.5): full or shallow, of B images or B pairs."""
        x = args[0] if args else kwargs["hidden_states"]  # (B or 2B, C, h, w)
        n, pairs = len(x), len(x) == 2 * self.batch
        if self.n_guided is None:  # the first pass: shares of the steps become numbers of steps (D1)
            K = len(self.scheduler.timesteps)
            self.n_low, self.n_guided = int(self.s * K + 0.5), int(self.m * K + 0.5)
            need(not self.s or 0 < self.n_low < K, f"s {self.s} of {K} steps is {self.n_low}: take more steps, or s=0")
            need(pairs or not self.cross or self.choice == "cond",
                 f"choice '{self.choice}' of no pair [null, text]: pass guidance_scale > 1, or choice='cond'")
        late = self.i >= self.n_guided
        if late and self.n_guided and self.cross and not self.frozen:
            self.frozen = True
            for cache in self.cross:
                if len(cache.out) == 2 * self.batch:  # else there is no pair (D8)
                    null, text = cache.out.chunk(2)
                    cache.out = dict(cond=text, uncond=null, ave=(null + text) / 2, cfg=null + self.w * (text - null))[
                        self.choice].clone()
        if late and pairs:  # the text's half of all that comes in pairs, also in lists and dicts
            x, args, kwargs = tree_map(lambda v: v[n // 2:] if torch.is_tensor(v) and v.shape[:1] == (n,) else v,
                                       (x, args, kwargs))
        self.size = tuple(x.shape[-2:])
        self.shallow = self.input == x.shape and self.age < self.k  # D4, D6
        self.age, self.input = self.age + 1 if self.shallow else 1, x.shape
        self.log.append(Pass(self.i, len(x), *self.size, not self.shallow, pairs and not late, self.frozen))
        out = self.forward(*args, **kwargs)
        return tree_map(lambda o: torch.cat([o, o]), out) if late and pairs else out  # u + w (c - u) = c

    def step(self, model_output, timestep, sample, return_dict=True, **kwargs):
        """The scheduler's step; the last low one goes from (B, C, beta H, beta W) to (B, C, H, W): Eq. 4, then Eq. 5
        at the next step (D2), in the scheduler's type."""
        self.i, scheduler, device = self.i + 1, self.scheduler, model_output.device
        if self.i != self.n_low:
            return self.real_step(model_output, timestep, sample, return_dict=return_dict, **kwargs)
        from diffusers.utils.torch_utils import randn_tensor
        if "generator" in kwargs:  # what it draws is not used (D21)
            kwargs["generator"] = torch.Generator(device)
        out = self.real_step(model_output, timestep, sample, **kwargs)
        x0_hat, is_flow = out[-1], hasattr(scheduler, "scale_noise")
        if is_flow:
            x0_hat = sample.float() - scheduler.sigmas[self.i - 1].to(device) * model_output
        elif hasattr(scheduler, "model_outputs"):  # multistep: begins anew (D3)
            x0_hat, n = scheduler.model_outputs[-1], len(scheduler.model_outputs)
            scheduler.model_outputs, scheduler.lower_order_nums, scheduler.last_sample = [None] * n, 0, None
        up = F.interpolate(x0_hat.float(), size=self.full_size, mode="bilinear")
        dtype, t = out["prev_sample"].dtype, scheduler.timesteps[self.i][None].to(device)
        eps = randn_tensor(up.shape, generator=self.generator, device=device, dtype=dtype).float()
        with replaced(scheduler, "_begin_index", 0):  # or equal timesteps are mixed up
            xt = scheduler.scale_noise(up, t, eps) if is_flow else scheduler.add_noise(up, eps, t)
        out["prev_sample"] = xt.to(dtype)
        return out if return_dict else out.to_tuple()


def apply_postdiff(pipe, s=None, m=None, k=None, beta=None, depth=None, choice=None, w=None, log=None):
    """PostDiff on `pipe` until .remove() of what this gives. None: the paper's setting for this class of pipeline.

    s, m: shares of the steps, low and guided; beta: low / full side; k, depth: DeepCache's interval and branch; choice
    of what is frozen of [null, text]: cond, uncond, ave, cfg (w: its weight, or the call's), none; log: gets the
    table of a call. ValueError: what does not fit, now or in a call."""
    given, plain = dict(locals()), type(pipe)
    need(not hasattr(pipe, "postdiff"), "PostDiff is on already: call pipe.postdiff.remove() first")
    need(plain.__name__ in SETTINGS, f"PostDiff knows {', '.join(SETTINGS)}, not {plain.__name__}")
    plan = {key: v if given[key] is None else given[key] for key, v in zip(NAMES, SETTINGS[plain.__name__])}
    s, beta, k, m, depth, choice = plan.values()
    depths = sum(len(block.resnets) for block in getattr(denoiser_of(pipe)[1], "up_blocks", ()))
    need(0 <= s < 1 and 0 <= m <= 1 and 0 < beta <= 1 and k >= 1 and k == int(k) and choice in CHOICES,
         f"0 <= s < 1, 0 <= m <= 1, 0 < beta <= 1, a whole k >= 1, a choice of {CHOICES}, not {plan}")
    need(w is None or choice == "cfg", "w is the weight of choice='cfg': leave it out")
    need(depth in range(depths) if depths else k == 1 and depth is None,
         f"depth below {depths}, not {depth}" if depths else "DeepCache needs a U-Net: leave k and depth out")
    need(choice == "none" or SETTINGS[plain.__name__][5] != "none", "SD3 has no cross-attentions: leave choice out")
    check_scheduler(pipe, s, mu=0)
    handle = PostDiff(pipe)

    class PostDiffPipeline(plain):
        postdiff = handle

        @functools.wraps(plain.__call__)
        def __call__(self, *args, **kwargs):
            given = inspect.signature(super().__call__).bind(*args, **kwargs)
            given.apply_defaults()
            run = Run(self, plan, w, **given.arguments)
            handle.log = run.log
            with contextlib.ExitStack() as stack:
                stack.callback(vars(run).clear)  # its tensors, now
                for change in [(handle, "run", run), *run.changes]:
                    stack.enter_context(replaced(*change))
                result = super().__call__(*args, **kwargs)
                need(run.i >= run.n_low, f"the call ended after {run.i} of {run.n_low} low steps: let it go on, or s=0")
            if log:
                log(handle.table())
            return result

        def prepare_latents(self, *args):
            return super().prepare_latents(*handle.run.prepare(self.vae_scale_factor, *args))

    pipe.__class__ = functools.update_wrapper(PostDiffPipeline, plain, updated=())  # its name is saved
    return handle


postdiff = apply_postdiff


def main():
    p = argparse.ArgumentParser(description="Images of a pipeline, plain and PostDiff's, side by side, and their MACs")
    p.add_argument("path")
    p.add_argument("--prompt", nargs="+", required=True)
    for name, kind in dict(out=Path, n=int, steps=int, s=float, m=float, k=int, beta=float).items():
        p.add_argument(f"--{name}", type=kind, default=dict(out="postdiff", n=1).get(name))
    args = p.parse_args()
    need(args.s != 0 or not args.beta, "--beta has no effect with --s 0: leave it out")
    import diffusers
    from torch.utils.flop_counter import FlopCounterMode
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = diffusers.DiffusionPipeline.from_pretrained(args.path, dtype=dtype).to(device)
    if "PNDM" in type(pipe.scheduler).__name__:
        print("PNDM gives no x0_hat: DDIM makes both")
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    steps, more = (8, dict(guidance_scale=7.5)) if type(pipe).__name__.startswith("Latent") else (20, {})

    def image(prompt, seed):
        with FlopCounterMode(display=False) as counter:  # as in the paper: convolutions, linear layers
            made = pipe(prompt, num_inference_steps=args.steps or steps, **more,
                        generator=torch.Generator().manual_seed(seed)).images[0]
        flops = counter.get_flop_counts()[type(denoiser_of(pipe)[1]).__name__]
        return made, sum(n for op, n in flops.items() if "attention" not in str(op)) / 2e12

    args.out.mkdir(parents=True, exist_ok=True)
    for prompt, seed in product(args.prompt, range(args.n)):
        with postdiff(pipe, args.s, args.m, args.k, args.beta):
            right, macs = image(prompt, seed)
        left, plain = image(prompt, seed)
        path = args.out / f"{len(list(args.out.iterdir())):04}.png"
        diffusers.utils.make_image_grid([left, right], 1, 2).save(path)
        print(f"{path}: {prompt}; T MACs: plain {plain:.3f}, PostDiff {macs:.3f} ({macs / plain:.1%})")


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from None
