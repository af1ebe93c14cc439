"""Speed, measured side by side in one run: our U-Net and diffusers' UNet2DModel of the same widths and
MACs, same batch, same dtype; FD against scipy's sqrtm; TRD against its naive form. Needs
diffusers (pip install diffusers). Writes results/speed.md.

    python results/speed.py
"""
import platform
import sys
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from c2f_trd import (PRESETS, build_net, c2f_sample, candidate_steps, ddim_sample, load_models,  # noqa: E402
                     trd_search, uniform_steps)
from common import (count_macs, feature_stats, frechet_distance, has_fast_bf16, linear_alpha_bar,  # noqa: E402
                    noise_for)

CONFIG = {k: v[1] for k, v in PRESETS.items()}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def theirs():
    """UNet2DModel with the small preset's widths; the 2x2 pixels of a token are its channels."""
    from diffusers import UNet2DModel
    widths = [CONFIG["ch"] * m for m in CONFIG["mult"]]
    last = len(widths) - 1
    return UNet2DModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=widths, layers_per_block=1,
        down_block_types=["DownBlock2D"] * last + ["AttnDownBlock2D"], downsample_padding=0,
        up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * last, norm_num_groups=CONFIG["ch"] // 4,
        norm_eps=1e-6, attention_head_dim=None, flip_sin_to_cos=False, freq_shift=1)


def rates(calls, images, seconds=16):
    """Images a second of each call: they take turns for `seconds`; medians, the first two rounds left out."""
    rounds = []
    while len(rounds) < 5 or sum(map(sum, rounds)) < seconds:
        rounds.append([])
        for call in calls:
            begun = time.perf_counter()
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            rounds[-1].append(time.perf_counter() - begun)
    return [images / float(np.median(column)) for column in zip(*rounds[2:])]


def unets(lines):
    lines += ["## U-Net: images a second", "", "| | dtype | compile | batch | ours | UNet2DModel | ratio |",
              "| --- | --- | --- | --- | --- | --- | --- |"]
    torch.manual_seed(0)
    a, b = build_net(CONFIG, 1).to(DEVICE), theirs().to(DEVICE)
    x, t = torch.randn(128, 1, 32, 32, device=DEVICE), torch.randint(0, 1000, (128,), device=DEVICE)
    tokens = torch.nn.functional.pixel_unshuffle(x, 2)
    mine = x.contiguous(memory_format=torch.channels_last)
    with torch.device("meta"):
        macs = [count_macs(build_net(CONFIG, 1), torch.zeros(1, 1, 32, 32), torch.zeros(1, dtype=torch.long)),
                count_macs(theirs(), torch.zeros(1, 4, 16, 16), torch.zeros(1, dtype=torch.long))]
    sizes = [sum(p.numel() for p in n.parameters()) for n in (a, b)]
    for dtype in ("fp32", "bf16"):
        n = 128 if dtype == "fp32" or has_fast_bf16(DEVICE) else 32            # emulated bf16 is slow
        for compiled in (False, True) if DEVICE.type == "cuda" else (False,):
            nets = [torch.compile(n) if compiled else n for n in (a, b)]
            calls = [lambda net=nets[0], n=n: net(mine[:n], t[:n]),
                     lambda net=nets[1], n=n: net(tokens[:n], t[:n]).sample]
            steps, forwards = [], []
            for net, call in zip((a, b), calls):
                optimizer = torch.optim.Adam(net.parameters())

                def step(call=call, optimizer=optimizer):
                    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bf16"):
                        loss = call().float().square().mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()

                def forward(call=call):
                    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bf16"):
                        call()

                steps.append(step)
                forwards.append(forward)
            speeds = {"training": rates(steps, n), "sampling": rates(forwards, n)}
            for kind, (ours, other) in speeds.items():
                lines.append(f"| {kind} | {dtype} | {'yes' if compiled else 'no'} | {n} | {ours:.0f} | "
                             f"{other:.0f} | {ours / other:.2f} |")
    lines += ["", f"Parameters {sizes[0]:,} and {sizes[1]:,}; MACs {macs[0]:,} and {macs[1]:,} per evaluation. "
              f"bf16 in hardware here: {'yes' if has_fast_bf16(DEVICE) else 'no (emulated; auto picks fp32)'}.", ""]


def distances(lines):
    g = np.random.default_rng(0)
    x, y = (torch.from_numpy(g.standard_normal((4096, 2048)) @ np.diag(g.uniform(0.1, 2, 2048))) for _ in "xy")
    a, b = feature_stats(x), feature_stats(y)
    begun = time.perf_counter()
    ours = frechet_distance(a, b)
    fast = time.perf_counter() - begun
    begun = time.perf_counter()
    root = scipy.linalg.sqrtm((a[1] @ b[1]).numpy()).real
    theirs_ = float((a[0] - b[0]).square().sum() + a[1].trace() + b[1].trace() - 2 * np.trace(root))
    slow = time.perf_counter() - begun
    lines += ["## Frechet distance, 2048 dimensions", "",
              f"ours {fast:.1f} s, scipy.linalg.sqrtm {slow:.1f} s: {slow / fast:.1f} times; values "
              f"{ours:.6f} and {theirs_:.6f}.", ""]


def naive_trd(eps_model, noise, taus, x_ref, alpha_bar):
    """TRD as one would write it first: every candidate is sampled anew, one after the other."""
    taus = list(taus)
    best = float((ddim_sample(eps_model, noise, taus, alpha_bar) - x_ref).square().mean())
    for _ in range(10):
        changed = False
        for i in reversed(range(len(taus))):
            trials = [[*taus[:i], c, *taus[i + 1:]] for c in candidate_steps(taus, i)]
            losses = [float((ddim_sample(eps_model, noise, s, alpha_bar) - x_ref).square().mean()) for s in trials]
            if losses and min(losses) < best * (1 - 1e-6):
                best, taus, changed = min(losses), trials[losses.index(min(losses))], True
        if not changed:
            break
    return taus, best


def search(lines):
    import argparse
    folder = ROOT / "weights" / "c2f_trd"
    args = argparse.Namespace(checkpoint=folder / "weights.pt", plans=folder, compile=False, precision="auto")
    model, alpha_bar = load_models(args, DEVICE)["base"], linear_alpha_bar()
    z = noise_for(range(10 ** 9, 10 ** 9 + 16), (1, 32, 32)).to(DEVICE)
    x_ref = ddim_sample(model, z, uniform_steps(999, 100), alpha_bar)
    lines += ["## TRD, shipped base model, DDIM, 16 samples", "",
              "| steps | naive, s | cached and batched, s | ratio | same sequence |", "| --- | --- | --- | --- | --- |"]
    for K in (5, 10):
        start = uniform_steps(999, K)
        begun = time.perf_counter()
        slow = naive_trd(model, z, start, x_ref, alpha_bar)
        mid = time.perf_counter()
        fast, _ = trd_search([(model, z)], [start], x_ref, alpha_bar)
        end = time.perf_counter()
        lines.append(f"| {K} | {mid - begun:.1f} | {end - mid:.1f} | {(mid - begun) / (end - mid):.1f} | "
                     f"{'yes' if fast[0] == slow[0] else 'no'} |")
    begun = time.perf_counter()
    c2f_sample([(model, z)], [uniform_steps(999, 10)], alpha_bar, 2)
    lines += ["", f"16 images, 10 steps: {time.perf_counter() - begun:.2f} s."]


def main():
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = ["# Speed", "", "Made by `python results/speed.py`: "
             f"{name}, torch {torch.__version__}, Python {platform.python_version()}.", ""]
    unets(lines)
    distances(lines)
    search(lines)
    (ROOT / "results" / "speed.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
