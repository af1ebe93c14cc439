"""LowDiff on latents (arXiv 2509.15342, Table 4): an autoencoder, then LightningDiT (arXiv 2501.01423) in two stages:
make the 4x4 latents, stop while they are still noisy, make the 8x8 latents with them as a condition, decode.

    python variants/lowdiff_latent.py --train --sample       # 4 -> 8; the autoencoder is trained first
    python variants/lowdiff_latent.py --train --stages 8 --out runs/dit --autoencoder runs/lowdiff_latent/autoencoder.pt
                                                             # off switch: plain LightningDiT, same latents
    python variants/lowdiff_latent.py --sample --guidance 2 --steps 60 50 --truncate 40
    python variants/lowdiff_latent.py --search --sample      # where to stop stage 1, by FD
    python results/evaluate.py lowdiff_latent                # FD, MACs, seconds

Own are the transformer, whose blocks all resolutions share, rectified flow, whose times t = 0 .. 1 (noise .. data) take
sigma's place, Euler's method, and labels left out now and then, for guidance; the cascade, the search and the training
loop are lowdiff.py's. Symbols: t, t' -> t, t_z; v -> v_hat = x0 - eps; the sequence of t -> ts.
(D17) to (D20), which the paper leaves open: results/lowdiff/README.md.
"""
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 0)]
from autoencoder import Autoencoder, encode_all, get_autoencoder, load  # noqa: E402
from changed import copy_of  # noqa: E402
from common import (autocast, load_checkpoint, load_images, load_weights, noise_for, run_main,  # noqa: E402
                    start_device)

script = copy_of("lowdiff")
SHIFTS = script.SHIFTS
SHIFT = 0.3                    # of the Euler sampler's times (LightningDiT)
LABEL_DROP = 0.1               # labels left out in training, for guidance (LightningDiT)
STEPS = {False: 100, True: 50}  # of the last stage: alone, conditioned (Table 4)
FIRST_STEPS, FIRST_EVALUATIONS = 60, 45  # of the others (D19)

script.SCRIPT, script.__doc__ = "lowdiff_latent", __doc__
for group, names in dict(network="mult attention patch", training="flip s_mean s_std", method="sigma_min").items():
    for name in names.split():
        del script.CONFIG[group][name]
script.CONFIG["run"]["out"] = ("runs/lowdiff_latent", *script.CONFIG["run"]["out"][1:])
script.CONFIG["network"].update({
    "ch":          (128, (4, 4096), "width; heads have 64 channels"),
    "blocks":      (4, (1, 64), "transformer blocks"),
    "stages":      ([4, 8], (1, 1024), "sides of the latents, low to high; 8: one stage, LightningDiT (off switch)"),
    "latent":      (4, (1, 256), "channels of the latents"),
    "factor":      (4, (2, 64), "pixels per side of a latent pixel, a power of 2"),
})
script.CONFIG["training"].update({
    "iters":       (3000, (1, 10 ** 8), "steps"),
    "autoencoder": ("", None, "file of the autoencoder, made if it is not there; default: OUT/autoencoder.pt"),
    "ae_iters":    (1500, (1, 10 ** 8), "steps of the autoencoder"),
})
script.CONFIG["method"]["guidance"] = (1.0, (-100, 100), "classifier-free guidance; 1: none (D19)")


# ---- Network: LightningDiT -------------------------------
def axis_angles(side, n):
    """(side * side, 2n): row and column of each token times n frequencies, 1 down to nearly 1 / 10000."""
    frequency = 1e4 ** (-torch.arange(n) / n)
    at = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    return (at[:, :, None] * frequency).flatten(1)


def rotate(x, angle):
    """Rotary position embedding: x (B, heads, N, d), each pair of channels turned by angle (N, d / 2)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


class DiTBlock(nn.Module):
    """Attention with rotary positions, SwiGLU; RMS norms, scaled, shifted and gated by the embedding."""

    def __init__(self, ch, heads):
        super().__init__()
        self.heads, hidden = heads, int(8 * ch / 3)
        self.norm1, self.norm2 = nn.RMSNorm(ch, eps=1e-6), nn.RMSNorm(ch, eps=1e-6)
        self.qkv, self.out = nn.Linear(ch, 3 * ch), nn.Linear(ch, ch)
        self.w12, self.w3 = nn.Linear(ch, 2 * hidden), nn.Linear(hidden, ch)
        self.modulation = nn.Linear(ch, 6 * ch)

    def forward(self, h, emb, angle):
        """h (B, N, ch), emb (B, ch), angle (N, ch / heads / 2)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb)[:, None].chunk(6, dim=-1)
        x = self.qkv(self.norm1(h) * (1 + scale1) + shift1)
        q, k, v = x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        x = F.scaled_dot_product_attention(rotate(q, angle), rotate(k, angle), v)
        h = h + gate1 * self.out(x.transpose(1, 2).flatten(2))
        gate, x = self.w12(self.norm2(h) * (1 + scale2) + shift2).chunk(2, dim=-1)
        return h + gate2 * self.w3(F.silu(gate) * x)


class Exit(nn.Module):
    """DiT's final layer: norm, scaled and shifted by the embedding, linear."""

    def __init__(self, ch, channels):
        super().__init__()
        self.norm, self.modulation = nn.RMSNorm(ch, eps=1e-6), nn.Linear(ch, 2 * ch)
        self.linear = nn.Linear(ch, channels)

    def forward(self, h, emb):
        shift, scale = self.modulation(emb)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm(h) * (1 + scale) + shift)


class DiT(nn.Module):
    """v_hat (B, C, r, r) for each r in `stages` (low to high) from t (B,) in 0 .. 1 and xt: latents (B, C, r, r), above
    the lowest stage latents and condition (B, 2C, r, r). A token is a latent pixel. labels: number of classes, told by
    y (B,); class number `labels` (or None) is no label.
    METHOD: own entry, positions and exit for each resolution, shared blocks (D17)."""

    def __init__(self, channels, ch, blocks, labels=0, stages=(8,)):
        super().__init__()
        heads = max(1, ch // 64)
        if ch % (4 * heads):
            raise ValueError(f"--ch {ch}: not a multiple of 4 in each of {heads} heads")
        self.stages, self.labels = list(stages), labels
        self.emb = nn.Sequential(nn.Linear(256, ch), nn.SiLU(), nn.Linear(ch, ch))
        self.label = nn.Embedding(labels + 1, ch) if labels else None
        self.resolution = nn.Embedding(len(stages), ch) if len(stages) > 1 else None   # METHOD: (D2)
        self.entry, self.exit = nn.ModuleDict(), nn.ModuleDict()
        for r in stages:                                       # METHOD
            self.entry[str(r)] = nn.Linear(channels * (1 if r == stages[0] else 2), ch)
            self.exit[str(r)] = Exit(ch, channels)
            angle = axis_angles(r, ch // 4)
            self.register_buffer(f"position{r}", torch.cat([angle.sin(), angle.cos()], dim=1), persistent=False)
            self.register_buffer(f"angle{r}", axis_angles(r, ch // heads // 4), persistent=False)
        self.blocks = nn.ModuleList(DiTBlock(ch, heads) for _ in range(blocks))

        for module in self.modules():                          # DiT: blocks start as the identity, v_hat as 0
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for part in (self.emb[0], self.emb[2], *([self.label] if labels else [])):
            nn.init.normal_(part.weight, std=0.02)
        for part in (*(block.modulation for block in self.blocks), *(out.modulation for out in self.exit.values()),
                     *(out.linear for out in self.exit.values()), *([self.resolution] if self.resolution else [])):
            nn.init.zeros_(part.weight)

    def forward(self, xt, t, y=None):
        r = xt.shape[-1]
        if r not in self.stages or xt.shape[-2] != r:
            raise ValueError(f"no entry for {[*xt.shape[-2:]]}, only for {self.stages}")
        emb = self.emb(script.timestep_embedding(t, 256))
        if self.labels:
            emb = emb + self.label(torch.full_like(t, self.labels, dtype=torch.long) if y is None else y)
        if self.resolution:                                    # METHOD: added to the other embeddings
            emb = emb + self.resolution.weight[self.stages.index(r)]
        emb = F.silu(emb)
        h = self.entry[str(r)](xt.flatten(2).transpose(1, 2)) + self.get_buffer(f"position{r}")
        for block in self.blocks:
            h = block(h, emb, self.get_buffer(f"angle{r}"))
        return self.exit[str(r)](h, emb).transpose(1, 2).unflatten(2, (r, r))


def build_net(config):
    """The network of a configuration, on the CPU, with its frozen autoencoder, which a checkpoint brings along. A
    training begins with that of load_data."""
    net = DiT(*(config[k] for k in ("latent", "ch", "blocks")), stages=config["stages"],
              labels=len(config["captions"]) if config["labels"] else 0)
    net.autoencoder = Autoencoder(config["channels"], config["latent"], config["factor"]).eval().requires_grad_(False)
    if config.get("train") and Path(config["autoencoder"]).is_file():
        net.autoencoder.load_state_dict(load(config["autoencoder"]).state_dict())
    return net


# ---- Data, loss ------------------------------------------
def check_config(config):
    R, stages, factor = map(config.get, ("res", "stages", "factor"))
    if stages != [stages[-1] >> i for i in reversed(range(len(stages)))] or stages[-1] * factor != R:
        raise ValueError(f"--stages {' '.join(map(str, stages))}: each twice the one before, the last times --factor "
                         f"{factor}, the images' {R}")


def load_data(config):
    """Latents float (N, latent, r, r) and classes (N,) of --data; notes the images' shape, the classes' names and the
    autoencoder's file in config. The autoencoder is that of the run to go on with, or of --init, else of a file."""
    x, y, captions = load_images(config["data"], config["res"])
    config.update(channels=x.shape[1], res=x.shape[-1], captions=captions)
    check_config(config)
    shape = [config[k] for k in ("channels", "latent", "factor")]
    device, path = start_device(config["device"])[0], Path(config["out"]) / "checkpoint.pt"
    if config["init"] and not config["resume"]:
        if {"autoencoder", "ae_iters"} & config["given"]:
            raise ValueError("--init brings its autoencoder: leave --autoencoder and --ae-iters out")
        config["autoencoder"], path = "", config["init"]
    if config["init"] or config["resume"]:
        state, autoencoder = load_checkpoint(path, script.SCRIPT)["ema"], Autoencoder(*shape).to(device).eval()
        load_weights(autoencoder, {k[12:]: v for k, v in state.items() if k.startswith("autoencoder.")}, path)
    else:
        config["autoencoder"] = config["autoencoder"] or str(Path(config["out"]) / "autoencoder.pt")
        autoencoder = get_autoencoder(config["autoencoder"], *shape, x, config["ae_iters"], device, config["seed"])
    return encode_all(autoencoder, x, device), y


def reference_images(config):
    """The images of load_data's latents, uint8 (N, C, R, R): what results/evaluate.py compares with."""
    return load_images(config["data"], config["res"])


def draw_batch(config, x, y, step):
    """Every random input of a training step, on the CPU: x0, y (class number `labels`: left out), t (B, n) and t_z
    (B, n - 1) of the n stages, sigmoids of normal numbers (LightningDiT), eps of each, eps_z."""
    B, C, stages = config["batch"], config["latent"], config["stages"]
    index = torch.randint(0, len(x), (B,))
    labels = torch.where(torch.rand(B) < LABEL_DROP, len(config["captions"]), y[index])
    t, t_z = torch.randn(B, len(stages)).sigmoid(), torch.randn(B, len(stages) - 1).sigmoid()
    eps = [torch.randn(B, C, r, r) for r in stages]
    return x[index], labels, t, t_z, *eps, *(torch.randn(B, C, r, r) for r in stages[:-1])


def velocity(net, xt, t, z=None, y=None):
    """v_hat, the network's estimate of x0 - eps (B, C, r, r), for xt = t x0 + (1 - t) eps, t (B,).
    METHOD: z, the up-sampled image of the stage below with noise, enters beside xt as it is (D18)."""
    return net(xt if z is None else torch.cat([xt, z], dim=1), t, y).to(xt.dtype)


def training_loss(net, config, x0, y, t, t_z, *noise):
    """LightningDiT's losses of all resolutions, added together: the squared error of v, a mean over its elements, plus
    1 - cosine of v_hat and v, a mean over positions. METHOD: above the lowest, with the latents of the one below as a
    condition, with noise and a time of their own (D18)."""
    n, y = len(config["stages"]), y if config["labels"] else None
    images, eps, eps_z, loss = script.pyramid_of(x0, n), noise[:n], noise[n:], 0

    def at(t, x, eps):                                         # on the straight way from noise to data
        return t.view(-1, 1, 1, 1) * x + (1 - t.view(-1, 1, 1, 1)) * eps

    for i in range(n):
        z = script.upsample(at(t_z[:, i - 1], images[i - 1], eps_z[i - 1])) if i else None
        v_hat, v = velocity(net, at(t[:, i], images[i], eps[i]), t[:, i], z, y), images[i] - eps[i]
        loss = loss + F.mse_loss(v_hat, v) + (1 - F.cosine_similarity(v_hat, v, dim=1)).mean()
    return loss


# ---- Sampler, plans --------------------------------------
def flow_times(steps, shift=SHIFT):
    """LightningDiT's times: `steps` + 1 floats from 0 (noise) to 1 (data), closer together near 0 if shift < 1."""
    return [shift * i / (steps + (shift - 1) * i) for i in range(steps + 1)]


@torch.no_grad()
def euler_sample(model, noise, ts, evaluations=None):
    """Euler's method from ts[0] = 0 to ts[-1] = 1; model(xt, t float) -> v_hat, called in the noise's own type. noise
    (B, C, r, r). The state is float64, but on MPS, which has none.
    METHOD: truncation after `evaluations` K of len(ts) - 1. Raises ValueError if there are not so many."""
    K = len(ts) - 1 if evaluations is None else evaluations
    if not 1 <= K <= len(ts) - 1:
        raise ValueError(f"{K} evaluations: a schedule of {len(ts) - 1} steps has 1 .. {len(ts) - 1}")
    xt = noise if noise.device.type == "mps" else noise.double()
    for t, t_next in zip(ts[:K], ts[1:]):
        xt = xt + (t_next - t) * model(xt.to(noise.dtype), t)
    return xt


def paper_plan(stages, steps=(0,), truncate=(0,), _=()):
    """What is sampled: steps N, evaluations K of each stage, low to high. steps, truncate: of each stage, of each but
    the last; 0: the paper's (Table 4, D19). Raises ValueError if their number is wrong."""
    n = len(stages)
    steps = steps if any(steps) else [FIRST_STEPS] * (n - 1) + [STEPS[n > 1]]
    truncate = truncate if any(truncate) else [FIRST_EVALUATIONS] * (n - 1)
    if len(steps) != n or len(truncate) != n - 1:
        raise ValueError(f"--steps, --truncate: the stages {list(stages)} need {n} and {n - 1} numbers")
    plan = dict(stages=list(stages), steps=list(steps), evaluations=[*truncate, steps[-1]], guidance=1.0)
    for r, N, K in zip(stages, steps, plan["evaluations"]):
        if not 1 <= K <= N:
            raise ValueError(f"--truncate: {K} evaluations at {r}x{r}, but its {N} steps have 1 .. {N}")
    return plan


def plan_of(config):
    """The paper's plan, with what --steps, --truncate, --guidance say."""
    if config["guidance"] != 1 and not config["labels"]:
        raise ValueError("--guidance: the checkpoint has no classes (train with --labels 1)")
    return dict(paper_plan(*(config[k] for k in ("stages", "steps", "truncate"))), guidance=config["guidance"])


def plan_name(config):
    """The file of a searched plan."""
    return f"plan_{'-'.join(map(str, config['stages']))}_guidance{config['guidance']:g}.json"


def levels_of(plan):
    """The times of each stage of a plan."""
    return [flow_times(N) for N in plan["steps"]]


def stops_of(plan):
    """The time at which each stage of a plan stops; the last one's is 1."""
    return [ts[K] for ts, K in zip(levels_of(plan), plan["evaluations"])]


def describe(plan):
    """A plan in words."""
    parts = zip(*(plan[k] for k in ("stages", "evaluations", "steps")), stops_of(plan))
    text = ", then ".join(f"{r}x{r}: {K} of {N} evaluations, t 0 to {stop:.4g}" for r, K, N, stop in parts)
    return text + (f"; guidance {plan['guidance']:g}" if plan["guidance"] != 1 else "")


def search(net, config, device, search=script.search):
    """lowdiff.py's; N steps have N evaluations."""
    plan = plan_of(config)
    script.SHIFTS = [shift for shift in SHIFTS if all(
        K + shift <= N for N, K in zip(plan["steps"], plan["evaluations"][:-1]))]
    return search(net, config, device)


def generate(net, config, plan, seeds, device):
    """Decoded images (n, C, R, R), one a seed."""
    noise = noise_for(seeds, *((config["latent"], r, r) for r in reversed(plan["stages"])))
    noise, guidance = [noise] if torch.is_tensor(noise) else noise[::-1], plan["guidance"]
    y = script.classes_of(config, seeds).to(device) if config["labels"] else None

    def model(xt, t, z, _):                                    # z's time is not told
        t = torch.full((len(xt),), t, device=xt.device)
        with autocast(xt.device, config["precision"]):
            v_hat = velocity(net, xt, t, z, y)
            if guidance != 1:
                v_null = velocity(net, xt, t, z)
                v_hat = v_null + guidance * (v_hat - v_null)
        return v_hat

    z = script.cascade_sample([(model, eps.to(device), ts, K) for eps, ts, K in zip(
        noise, levels_of(plan), plan["evaluations"])], euler_sample, 1)[-1]
    with torch.no_grad():
        return net.autoencoder.decode(z.float())


for hook in (build_net, check_config, load_data, reference_images, draw_batch, training_loss, paper_plan, plan_of,
             plan_name, levels_of, stops_of, describe, search, generate):
    setattr(script, hook.__name__, hook)

if __name__ == "__main__":
    run_main(script.main, script.SCRIPT)
