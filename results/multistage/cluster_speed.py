"""Speed of the optimal denoiser: batched (multistage.optimal_denoiser) against one sample after the other in
a loop over batches of the data set, as the official code goes; then all of fashion10k.

    OMP_NUM_THREADS=1 python results/multistage/cluster_speed.py     # writes cluster_speed.json beside it
"""
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import load_images, save_json, to_float  # noqa: E402
from multistage import optimal_denoiser, scale_of, sigma_of, similarity_to_ends  # noqa: E402


def loop_denoiser(xt, scale, sigma, data, batch=1024):
    """eps* of each sample by two passes over the data: the largest exponent, then the weighted sum."""
    out = []
    for x, s, g in zip(xt, scale.tolist(), sigma.tolist()):
        largest = max(float((-(x - s * y).square().flatten(1).sum(1) / (2 * s * s * g * g)).max())
                      for y in data.split(batch))
        total, weighted = 0.0, torch.zeros_like(x, dtype=torch.float64)
        for y in data.split(batch):
            exponent = -(x - s * y).square().flatten(1).sum(1).double() / (2 * s * s * g * g)
            w = (exponent - largest).exp()
            total += float(w.sum())
            weighted += (w.view(-1, 1, 1, 1) * y).sum(0)
        out.append(((x - s * weighted / total) / (s * g)).float())
    return torch.stack(out)


def main():
    K, N = 500, 2000
    data = F.avg_pool2d(to_float(load_images("emoji")[0][:N]), 2)              # (N, 3, 32, 32): d = 3072
    g = torch.Generator().manual_seed(0)
    t = 1e-3 + (1 - 1e-3) * torch.rand(K, generator=g, dtype=torch.float64)
    sigma = sigma_of(t)
    scale = scale_of(sigma)
    x0, eps = data[torch.randint(0, N, (K,), generator=g)], torch.randn(K, 3, 32, 32, generator=g)
    xt = (scale.view(-1, 1, 1, 1) * (x0 + sigma.view(-1, 1, 1, 1) * eps)).float()
    seconds = []
    for _ in range(3):
        begun = time.process_time()
        fast = optimal_denoiser(xt, scale, sigma, data)
        seconds.append(time.process_time() - begun)
    begun = time.process_time()
    slow = loop_denoiser(xt, scale, sigma, data)
    loop = time.process_time() - begun
    found = dict(N=N, K=K, d=3072, threads=torch.get_num_threads(), torch=torch.__version__, loop_cpu_s=round(loop, 3),
                 batched_cpu_s=round(min(seconds), 4), times=round(loop / min(seconds), 1),
                 largest_difference=float((fast - slow).abs().max()))
    print(found, flush=True)
    data = to_float(load_images("fashion10k")[0])
    begun, cpu = time.time(), time.process_time()
    similarity_to_ends(data, len(data))
    found.update(fashion10k_cpu_s=round(time.process_time() - cpu, 1), fashion10k_wall_s=round(time.time() - begun, 1))
    print(found)
    save_json(Path(__file__).with_suffix(".json"), found)


if __name__ == "__main__":
    main()
