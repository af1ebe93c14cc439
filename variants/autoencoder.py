"""A small variational autoencoder, for the variants that work on latents (lowdiff_latent.py, multistage_latent.py).
It is trained first, for minutes, on the images themselves (the papers take large ones of other data sets), then frozen.

    autoencoder = get_autoencoder("runs/x/autoencoder.pt", 1, 4, 4, x, 1500, device, 0)    # loaded, or trained now
    z = encode_all(autoencoder, x, device)                     # uint8 (N, 1, 32, 32) -> float (N, 4, 8, 8)
    images = autoencoder.decode(z)                             # float in [-1, 1]
"""
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (load_checkpoint, load_weights, progress, save_grid, to_float, to_uint8,  # noqa: E402
                    write_atomically)

KL_WEIGHT = 1e-4               # keeps the latents near a normal distribution
BATCH, LR, WARMUP = 64, 2e-3, 100


def group_norm(c):
    """GroupNorm: 32 groups, fewer where a group would have less than 4 channels."""
    return nn.GroupNorm(min(32, c // 4), c, eps=1e-6)


class Residual(nn.Module):
    """norm - SiLU - conv, twice, plus the input."""

    def __init__(self, c):
        super().__init__()
        self.norm1, self.norm2 = group_norm(c), group_norm(c)
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)

    def forward(self, h):
        return h + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(h))))))


class Autoencoder(nn.Module):
    """Images (B, channels, H, W) in [-1, 1] <-> latents (B, latent, H / factor, W / factor), which have mean 0 and
    deviation 1 in each channel by two buffers that train_autoencoder sets. factor: a power of 2; ch: base width."""

    def __init__(self, channels, latent, factor, ch=32):
        super().__init__()
        if factor < 2 or factor & (factor - 1):
            raise ValueError(f"the autoencoder's factor must be a power of 2: {factor}")
        self.channels, self.latent, self.factor = channels, latent, factor
        self.register_buffer("mean", torch.zeros(latent, 1, 1))
        self.register_buffer("std", torch.ones(latent, 1, 1))
        widths = [channels] + [ch * min(2 ** i, 4) for i in range(int(math.log2(factor)))]
        encoder, decoder = [], [nn.Conv2d(latent, widths[-1], 3, padding=1)]
        for c, c_next in zip(widths, widths[1:]):              # halve: 2x2 pixels become channels
            encoder += [nn.PixelUnshuffle(2), nn.Conv2d(4 * c, c_next, 3, padding=1), Residual(c_next)]
        for c, c_next in zip(widths[::-1], widths[-2::-1]):
            decoder += [Residual(c), group_norm(c), nn.SiLU(), nn.Conv2d(c, 4 * c_next, 3, padding=1),
                        nn.PixelShuffle(2)]
        c = widths[-1]
        encoder += [group_norm(c), nn.SiLU(), nn.Conv2d(c, 2 * latent, 3, padding=1)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)

    def encode(self, x):
        """Images -> the means of their latents."""
        return (self.encoder(x)[:, :self.latent] - self.mean) / self.std

    def decode(self, z):
        """Latents, of any size -> images."""
        return self.decoder(z * self.std + self.mean)

    def loss(self, x, eps):
        """Squared error, per pixel, of the image decoded from a random latent, plus the KL term; eps: like a latent."""
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        log_var = log_var.clamp(-20, 10)
        kl = (mean ** 2 + log_var.exp() - 1 - log_var).mean() / 2
        return F.mse_loss(self.decoder(mean + (log_var / 2).exp() * eps), x) + KL_WEIGHT * kl


@torch.no_grad()
def encode_all(autoencoder, x, device, batch=500):
    """uint8 images (N, C, H, W) -> float32 latents (N, latent, H / factor, W / factor) on the CPU, in batches."""
    return torch.cat([autoencoder.encode(to_float(part.to(device))).cpu() for part in x.split(batch)])


def train_autoencoder(autoencoder, x, iters, device, seed=0):
    """Trains it on uint8 images x (N, C, H, W) and sets the mean and deviation of its latents. Not resumed: minutes.
    Raises ValueError if the loss is not finite."""
    optimizer, loss = torch.optim.Adam(autoencoder.parameters(), lr=LR), torch.zeros(())
    side = x.shape[-1] // autoencoder.factor
    for step in progress(range(1, iters + 1), "train autoencoder", BATCH, note=lambda: f"loss {float(loss):.5f}"):
        torch.manual_seed(seed * 10_000_019 + step)
        x0 = to_float(x[torch.randint(0, len(x), (BATCH,))].to(device))
        eps = torch.randn(BATCH, autoencoder.latent, side, side).to(device)
        optimizer.param_groups[0]["lr"] = LR * min(1, step / WARMUP, 2 * (1 - (step - 1) / iters))
        loss = autoencoder.loss(x0, eps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        if (step % 100 == 0 or step == iters) and not loss.isfinite():
            raise ValueError(f"the autoencoder's loss is not finite: stopped at step {step}")
    autoencoder.mean.zero_()
    autoencoder.std.fill_(1)
    z = encode_all(autoencoder, x, device)
    autoencoder.mean.copy_(z.mean((0, 2, 3)).view(-1, 1, 1))
    autoencoder.std.copy_(z.std((0, 2, 3)).view(-1, 1, 1))


def load(path):
    """The frozen autoencoder of a file, on the CPU. Raises OSError or ValueError with one line."""
    saved = load_checkpoint(path, "autoencoder")
    autoencoder = Autoencoder(*saved["config"]["shape"])
    load_weights(autoencoder, saved["ema"], path)
    return autoencoder.eval().requires_grad_(False)


def get_autoencoder(path, channels, latent, factor, x, iters, device, seed=0):
    """The frozen autoencoder of the file `path`; is there none, it is trained on the uint8 images x (N, C, H, W) by the
    first process and written there, with a picture beside it: a row of images, a row of what comes back.
    Raises ValueError if the one of the file has other channels or another factor."""
    path, shape = Path(path), [channels, latent, factor]
    if not (dist.is_initialized() and dist.get_rank()) and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)         # an unwritable folder fails here
        torch.manual_seed(seed)
        autoencoder = Autoencoder(*shape).to(device)
        train_autoencoder(autoencoder, x, iters, device, seed)
        with torch.no_grad():
            back = autoencoder.decode(autoencoder.encode(to_float(x[:16].to(device))))
        save_grid(path.with_suffix(".png"), torch.cat([x[:16], to_uint8(back).cpu()]), len(x[:16]))
        content = dict(script="autoencoder", step=iters, config=dict(shape=shape, seed=seed),
                       ema=autoencoder.state_dict())
        write_atomically(path, lambda part: torch.save(content, part))
    dist.barrier() if dist.is_initialized() else None          # until it is written
    autoencoder = load(path).to(device)
    if (found := [autoencoder.channels, autoencoder.latent, autoencoder.factor]) != shape:
        raise ValueError(f"{path}: its autoencoder has channels, latent channels, factor {found}, wanted {shape}: "
                         "choose another file, or delete it")
    print(f"autoencoder: {path}")
    return autoencoder
