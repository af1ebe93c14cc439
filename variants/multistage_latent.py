"""Multistage on latents (Table 1, LDM): multistage.py's stages and networks in the latent space of a small autoencoder,
sampled by DPM-Solver++ 2M, as the paper's LDM is.

    python variants/multistage_latent.py --train --sample    # an autoencoder, the stages of its latents, the network
    python variants/multistage_latent.py --train --widths 32 --autoencoder runs/multistage_latent/autoencoder.pt \\
        --out runs/latent                                    # off switch, on the same latents
    python variants/multistage_latent.py --search --stages 4 # edges of four stages of the latents
    python results/evaluate.py multistage_latent             # FD of the decoded images, MACs with the decoding

A checkpoint has the autoencoder in it. D16 (autoencoder, clustering, schedule) and D17 (the last step of the solver):
results/multistage/README.md.
"""
import itertools
import math
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from autoencoder import Autoencoder, encode_all, get_autoencoder, load  # noqa: E402
from changed import copy_of  # noqa: E402
from common import (load_checkpoint, load_images, load_weights, noise_for, run_main,               # noqa: E402
                    start_device)
from multistage import T_END, model_of, scale_of, sigma_of, stage_of  # noqa: E402

script = copy_of("multistage")
plain_net, plain_data, plain_search = script.build_net, script.load_data, script.search


def build_net(config):
    """The network of a configuration, on the CPU, with the frozen autoencoder as net.autoencoder: in a new training
    that of its file, else to be loaded with the checkpoint."""
    net = plain_net(config)
    net.autoencoder = load(autoencoder_path(config)) if config["train"] and not checkpoint_of(config) else Autoencoder(
        config["image_channels"], config["latent"], config["factor"])
    net.autoencoder.eval().requires_grad_(False)
    return net


def autoencoder_path(config):
    """The file of the autoencoder that a new training makes or takes."""
    return Path(config["autoencoder"] or Path(config["out"]) / "autoencoder.pt")


def checkpoint_of(config):
    """The checkpoint that a training goes on from (--resume, --init) or None; its autoencoder is the one to use."""
    return Path(config["out"]) / "checkpoint.pt" if config["resume"] else config["init"] or None


def autoencoder_for(config, images, device):
    """The autoencoder of a training, which is trained on the uint8 images if there is none yet."""
    shape, path = [images.shape[1], config["latent"], config["factor"]], checkpoint_of(config)
    if not path:
        return get_autoencoder(autoencoder_path(config), *shape, images, config["ae_iters"], device, config["seed"])
    if config["init"] and config["autoencoder"]:
        raise ValueError("--autoencoder: the checkpoint of --init brings its own")
    autoencoder, ema = Autoencoder(*shape), load_checkpoint(path, script.SCRIPT)["ema"]
    load_weights(autoencoder, {k.removeprefix("autoencoder."): v for k, v in ema.items() if k[:12] == "autoencoder."},
                 path)
    return autoencoder.to(device).eval().requires_grad_(False)


def load_data(config):
    """The images' latents, float (N, latent, R / factor, R / factor), and classes (N,). The autoencoder is trained
    first if there is none yet; the edges are those of the latents, if none are given."""
    images, y, captions = load_images(config["data"], config["res"])
    R, factor = images.shape[-1], config["factor"]
    if R % factor:
        raise ValueError(f"--factor {factor} does not divide the resolution {R}")
    if len(images) < 2:
        raise ValueError(f"--data {config['data']} has {len(images)} image: nothing to cluster or to learn from")
    device = start_device(config["device"])[0]
    z = encode_all(autoencoder_for(config, images, device), images, device)
    script.load_images = lambda *_: (z, y, captions)           # instead of the images
    config["flip"] = 0                                         # a latent that is flipped is no flipped image's
    plain_data(config)
    config.update(res=R, image_channels=images.shape[1])       # channels are those of the latents
    return z, y


def reference_images(config):
    """The images themselves, for results/evaluate.py."""
    return load_images(config["data"], config["res"])


def search(net, config, device):
    """multistage.py's, of the latents that the network's own autoencoder makes of --images."""
    images, *rest = load_images(config["images"] or config["data"], config["res"])
    if images.shape[1] != config["image_channels"] or images.shape[-1] % config["factor"]:
        raise ValueError(f"--images: images of {list(images.shape[1:])} are none for this autoencoder")
    z = encode_all(net.autoencoder, images, device)
    script.load_images = lambda *_: (z, *rest)
    return plain_search(net, config, device)


@torch.no_grad()
def dpm_solver_pp_sample(eps_model, xt, steps=20, t_end=T_END):
    """DPM-Solver++ 2M in continuous time: `steps` steps even in t from 1 to t_end, an evaluation each, the first and
    the last of first order (D17). eps_model(xt, t) -> eps_hat, t a float; xt (B, C, H, W): N(0, 1) at t = 1. The result
    is at t_end."""
    ts = [1 + (t_end - 1) * k / steps for k in range(steps + 1)]
    x, before = xt / scale_of(float(sigma_of(1.0))), None      # in x = xt / s_t
    for t, t_next in itertools.pairwise(ts):
        sigma, sigma_next = float(sigma_of(t)), float(sigma_of(t_next))
        h = math.log(sigma / sigma_next)
        x0_hat = x - sigma * eps_model(x * scale_of(sigma), t)
        x0_mid = x0_hat
        if before is not None and t_next != ts[-1]:
            x0_mid = x0_hat + (x0_hat - before[0]) * h / (2 * before[1])
        x, before = sigma_next / sigma * x - math.expm1(-h) * x0_mid, (x0_hat, h)
    return x * scale_of(float(sigma_of(t_end)))


def generate(net, config, plan, seeds, device):
    """Images (n, C, R, R) of a plan, one for each seed, decoded."""
    side = config["res"] // config["factor"]
    noise = noise_for(seeds, (config["channels"], side, side)).to(device)
    return net.autoencoder.decode(dpm_solver_pp_sample(model_of(net, config), noise, plan["nfe"]))


def preview(net, config, device):
    """32 images of a network in training: ten evaluations."""
    return generate(net, config, dict(nfe=10), range(32), device)


def make_plan(net, config, device):
    """What is run: evaluations of DPM-Solver++ 2M; the t of each and their number in each stage, from a run of it."""
    taus, edges = [], config["edges"]
    dpm_solver_pp_sample(lambda xt, t: (taus.append(t), xt)[1], torch.zeros(1, 1, 1, 1), config["nfe"])
    stages = [stage_of(t, edges) for t in taus]
    return dict(solver="dpm2m", nfe=config["nfe"], edges=edges, taus=[round(t, 6) for t in taus],
                by_stage=[stages.count(s) for s in range(len(edges) + 1)])


def describe(plan):
    """A plan in words, as --sample prints it."""
    return (f"DPM-Solver++ 2M, {plan['nfe']} evaluations, {' + '.join(map(str, plan['by_stage']))} from the data's "
            f"stage on, edges {plan['edges']}, t {plan['taus']}")


script.__doc__, script.SCRIPT = __doc__, "multistage_latent"
script.CONFIG["run"]["out"] = ("runs/multistage_latent", *script.CONFIG["run"]["out"][1:])
for option, default in (("mult", [1, 2]), ("attention", [0, 1])):
    script.CONFIG["network"][option] = (default, *script.CONFIG["network"][option][1:])
script.CONFIG["network"].update(
    latent=(4, (1, 64), "channels of the latents"), factor=(4, (2, 32), "pixels per side of a latent's pixel"))
script.CONFIG["training"].update(
    autoencoder=("", None, "file of the autoencoder; default: OUT/autoencoder.pt, trained first if it is missing"),
    ae_iters=(1500, (1, 10 ** 7), "steps of the autoencoder, batches of 64"))
del script.CONFIG["method"]["order"], script.CONFIG["training"]["flip"]
script.reference_images = reference_images
script.to_float = lambda z: z                                  # what is trained on and clustered is no uint8
for function in (build_net, load_data, search, generate, preview, make_plan, describe):
    setattr(script, function.__name__, function)

if __name__ == "__main__":
    run_main(script.main, script.SCRIPT)
