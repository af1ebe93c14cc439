"""PostDiff on a latent consistency model, in small: Table 2's LCM (arXiv 2508.06160, 3.1; LCM: Luo et al., 2310.04378).

A model of postdiff.py is distilled: the student, told the guidance weight w, shall give in one pass what the guided
teacher gives in two, and the same x0_hat at all steps of a trajectory. Its samples need 4 or 8 passes: x0_hat,
re-noised. On top of that PostDiff as in the paper's LCM rows: half of the steps at low resolution (s = .5), the
cross-attentions frozen for the second half (m = .5), no DeepCache (k = 1).

    python variants/postdiff_lcm.py --train --init weights/postdiff/weights.pt     # 2,000 steps
    python variants/postdiff_lcm.py --sample                                       # PostDiff, 8 steps
    python variants/postdiff_lcm.py --sample --method base --steps 4               # off switch: LCM's own sampler

Everything else is postdiff.py's. (D8), (D15): results/postdiff/README.md.
"""
import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from changed import copy_of  # noqa: E402
import common  # noqa: E402
import postdiff  # noqa: E402
from common import (LossModule, add_noise, linear_alpha_bar, load_checkpoint, load_weights,  # noqa: E402
                    noise_for, run_main, sha256_of, to_float)

script = copy_of("postdiff")
T, EMPTY = script.T, script.EMPTY
W_WIDTH = 256                  # of the embedding of the guidance weight
W_RANGE = 1, 5                 # guidance weights in training: around postdiff.py's 3 (D15)


# ---------------------------------------------------------------------------------------------
# Network: told the guidance weight
# ---------------------------------------------------------------------------------------------
class UNet(script.UNet):
    """x0_hat as of guidance w (B,), which is added to the embedding of the time; not at first: the teacher's."""

    def __init__(self, channels, ch, mult, blocks, attention, patch, words):
        super().__init__(channels, ch, mult, blocks, attention, patch, words)
        self.guidance = nn.Linear(W_WIDTH, ch, bias=False)
        nn.init.zeros_(self.guidance.weight)

    def forward(self, xt, t, text, deep=None, cross=None, depth=1, w=None):
        emb = script.timestep_embedding(t, self.ch) + self.guidance(script.timestep_embedding(1000 * w, W_WIDTH))
        emb = F.silu(self.emb(emb)), self.text(text), cross or {}, (used := {})
        return *self.decoder(*self.encoder(xt, emb, deep, depth), emb, depth), used


# ---------------------------------------------------------------------------------------------
# Distillation
# ---------------------------------------------------------------------------------------------
def consistency_loss(net, target, teacher, x0, t, t_next, eps, alpha_bar, text, null, w):
    """Latent consistency distillation: at xt the net's x0_hat shall be the target's (its average) after a DDIM step of
    the teacher, guided by w (B,), to t_next (B,); at t_next = -1, clean data, the teacher's own x0_hat (D15).

    net, target: (xt, t, text, w=) -> x0_hat, ...; teacher: (xt, t, text) -> x0_hat, ... Pseudo-Huber, as LCM's."""
    xt = add_noise(x0, eps, t, alpha_bar)
    with torch.no_grad():
        x0_null, x0_text = teacher(xt, t, null)[0].float(), teacher(xt, t, text)[0].float()
        x0_teacher = x0_null + w.view(-1, 1, 1, 1) * (x0_text - x0_null)       # that of the guided eps_hat
        x_next = add_noise(x0_teacher, postdiff.eps_of_x0(x0_teacher, xt, t, alpha_bar), t_next, alpha_bar)   # DDIM
        goal = target(x_next, t_next.clamp(min=0), text, w=w)[0].float()
        goal = torch.where((t_next < 0).view(-1, 1, 1, 1), x0_teacher, goal)
    x0_hat = net(xt, t, text, w=w)[0].float()
    return ((x0_hat - goal).square() + 1e-6).sqrt().mean()


def remembered_copy(net):
    """copy.deepcopy for the script's train, whose copy of the network is its average: here also the target, which the
    network remembers, in a list: not as a part of itself."""
    net.average = [copy.deepcopy(net)]
    return net.average[0]


class Distillation(LossModule):
    """A step's loss as a module. The teacher, the network of --init, is no part of it either: it is not trained."""

    def __init__(self, net, config, training_loss):
        super().__init__(net, config, training_loss)
        saved = load_checkpoint(config["init"], "postdiff")
        teacher = postdiff.build_net(saved["config"])
        load_weights(teacher, saved["ema"], config["init"])
        self.teacher = [teacher.to(next(net.parameters()).device).eval().requires_grad_(False)]

    def forward(self, x0, t, eps, text, w):
        t_next = (t - self.config["skip"]).clamp(min=-1)
        return consistency_loss(self.net, self.net.average[0], self.teacher[0], x0, t, t_next, eps,
                                linear_alpha_bar(T), text, torch.zeros_like(text), w)


def begin_run(name, config, groups, device, world):
    """common's; --init is a checkpoint of postdiff.py, the teacher, which a resumed run needs, too."""
    if config["resume"]:
        config, saved = common.begin_run(name, config, groups, device, world)
        if sha256_of(config["init"]) != config["teacher"]:
            raise ValueError(f"--resume: {config['init']} is no more the teacher that this run began with")
        return config, saved
    if not config["init"]:
        raise ValueError("an LCM is distilled from a model: give a checkpoint of postdiff.py as --init")
    config, saved = common.begin_run("postdiff", config, groups, device, world)
    return dict(config, teacher=sha256_of(config["init"]), words=saved["config"]["words"], low_share=0.0), saved


def draw_batch(config, x, y, step):
    """Every random input of a training step, on the CPU, for the whole batch. No caption is dropped: nothing guides
    the student."""
    B = config["batch"]
    i, t, (low, high) = torch.randint(0, len(x), (B,)), torch.randint(0, T, (B,)), W_RANGE
    text, _ = script.encode([config["captions"][c] for c in y[i].tolist()], config["words"])
    return to_float(x[i]), t, torch.randn(B, *x.shape[1:]), text, low + (high - low) * torch.rand(B)


def preview(net, config, device):
    """32 images of a network in training: four plain steps."""
    config = dict(config, method="base", steps=4, prompt=[""])
    return generate(net, config, script.plan_of(config), range(32), device)


# ---------------------------------------------------------------------------------------------
# Sampler
# ---------------------------------------------------------------------------------------------
@torch.no_grad()
def lcm_sample(net, noise, taus, alpha_bar, text, fresh, n_low=0, low_noise=None, k=1, depth=1, n_guided=None,
               choice="cond"):
    """LCM's multistep sampling, with PostDiff: mixed_resolution_sample of postdiff.py, but a step is x0_hat, re-noised
    with fresh[i], noise of step i's size, and one pass: the net knows w. After n_guided steps (None: all)
    cross-attentions are frozen, the single output as it is (D8), unless choice is "none".
    Raises ValueError if a number does not fit."""
    K, n_guided, taus = len(taus), len(taus) if n_guided is None else n_guided, [int(t) for t in taus]
    if any(a <= b for a, b in zip(taus, taus[1:])) or not (0 <= n_low < K and 0 <= n_guided <= K):
        raise ValueError(f"n_low {n_low} or n_guided {n_guided} does not fit the falling steps {taus}")
    xt, cache = low_noise if n_low else noise, EMPTY
    for i in range(K):
        t, t_next = (torch.as_tensor(s).expand(len(xt)) for s in (taus[i], [*taus, -1][i + 1]))
        if i == n_guided and choice != "none":
            cache = script.freeze_cross(cache, choice, None)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        eps_hat, cache = script.cached_eps(net, xt, t.to(xt.device), text, None, None, cache, k, depth)
        x0_hat = (1 / a).sqrt().to(xt) * xt - (1 / a - 1).sqrt().to(xt) * eps_hat
        xt = (script.switch_resolution(x0_hat, noise, t_next, alpha_bar) if i == n_low - 1
              else add_noise(x0_hat, fresh[i], t_next, alpha_bar))
    return xt


def generate(net, config, plan, seeds, device):
    """Images (n, C, R, R) of a plan, one for each seed."""
    text, left_out = script.encode(script.captions_of(config, seeds), config["words"])
    if left_out:
        print(f"left out, unknown or beyond {script.WORDS} words: {', '.join(left_out[:5])}", file=sys.stderr)
    if any(config["prompt"]) and not text.any(1).all():
        raise ValueError("a --prompt has no word that this network knows")
    sizes = [plan["low"] if i < plan["n_low"] else config["res"] for i in range(len(plan["taus"]))]
    noise, low_noise, *fresh = (z.to(device) for z in noise_for(
        seeds, *((config["channels"], r, r) for r in (config["res"], plan["low"], *sizes))))
    model = script.model_of(net, config)

    def told(xt, t, text, **caches):
        return model(xt, t, text, w=torch.full((len(xt),), float(plan["w"]), device=xt.device), **caches)

    return lcm_sample(told, noise, plan["taus"], linear_alpha_bar(T), text.to(device), fresh, plan["n_low"], low_noise,
                      plan["k"], plan["depth"], plan["n_guided"], plan["choice"])


def describe(plan):
    """A plan in words, as --sample prints it."""
    frozen = "" if plan["choice"] == "none" else f"; frozen after {plan['n_guided']}"
    return (f"{plan['method']}, lcm: {plan['taus']}, {plan['n_low']} at size {plan['low']}; k {plan['k']}; "
            f"told w {plan['w']}{frozen}")


script.SCRIPT, script.__doc__ = "postdiff_lcm", __doc__
CONFIG = script.CONFIG
CONFIG["run"]["out"] = ("runs/postdiff_lcm", *CONFIG["run"]["out"][1:])
del CONFIG["training"]["low_share"]
CONFIG["training"].update(
    init=("", None, "the teacher: a checkpoint of postdiff.py"), lr=(2e-4, (1e-9, 1), "Adam's learning rate"),
    iters=(2000, (1, 10 ** 8), "steps"), skip=(20, (1, T), "training steps that the teacher's step spans"))
CONFIG["method"].update(
    solver=("lcm", ("lcm",), "x0_hat, re-noised"), steps=(8, (0, T), "steps, K; 0: as --search found them"),
    k=(1, (1, T), "every k-th pass is a full one"), w=(3.0, (0, 100), "guidance weight that the network is told"),
    m=(0.5, (0, 1), "share of the steps before cross-attentions are frozen"),
    choice=("cond", ("cond", "none"), "none: they are not frozen (D8)"))
script.STEPS, script.REFERENCE_STEPS = (2, 3, 4, 6, 8), 8      # what --search tries, and its budget is a share of
script.UNet, script.LossModule, script.copy = UNet, Distillation, SimpleNamespace(deepcopy=remembered_copy)
script.begin_run, script.draw_batch, script.preview = begin_run, draw_batch, preview
script.generate, script.describe = generate, describe

if __name__ == "__main__":
    run_main(script.main, script.SCRIPT)
