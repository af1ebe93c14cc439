"""Multistage with a whole network for each stage instead of one encoder for all (Table 3, Fig. 1(d)): what sharing the
encoder, early stopping (ES) and decoders of tailored widths (TP) are worth, each by itself.

    python variants/multistage_separate.py --train --sample  # three networks, decoders of 48, 32, 12: separate + TP
    python variants/multistage_separate.py --train --widths 32 32 32 --out runs/separate   # separate
    python variants/multistage_separate.py --train --early-stopping 1 --out runs/es         # + ES + TP
    python variants/multistage_separate.py --train --widths 32 --out runs/off              # off switch: one network
    python results/evaluate.py multistage_separate           # FD, MACs

The encoders are alike, so an evaluation costs what multistage.py's costs. Other numbers of stages (Table 7): the edges
and widths that variants/multistage_clusterings.py prints. Early stopping (D10, results/multistage/README.md): every
tenth image, at most 1000, is not trained on; of each network the average is kept that did best on them at a save.
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from changed import copy_of  # noqa: E402
from common import noise_for, run_main, to_float  # noqa: E402
from multistage import T_TRAIN, UNet, by_stage, training_loss  # noqa: E402

HELD_OUT = 1000                # images at most, of which early stopping knows how well a network does

script = copy_of("multistage")
load_all, save_all, load_last = script.load_data, script.save_run, script.load_net
held_out = []                  # images (n, C, R, R), float, of the training in progress


def vector_of(net):
    """All weights of a network, in one vector."""
    return torch.cat([p.detach().flatten() for p in net.parameters()])


class Separate(nn.Module):
    """v_hat (B, C, H, W) from xt, t (B,) and stage, an int or int64 (B,), as multistage.py's UNet gives it: by that of
    the networks whose stage it is. keep: for early stopping, room for the best weights of each network; they are
    buffers, so that a checkpoint has them, and neither the optimizer nor the average touches them."""

    def __init__(self, nets, keep=False):
        super().__init__()
        self.nets = nn.ModuleList(nets)
        if keep:
            self.register_buffer("best_loss", torch.full((len(nets),), math.inf))
            self.register_buffer("best_step", torch.zeros(len(nets), dtype=torch.int64))
            for s, net in enumerate(nets):
                self.register_buffer(f"best_{s}", vector_of(net))

    def forward(self, xt, t, stage=0):
        return by_stage(stage, len(self.nets), lambda s, xt, t: self.nets[s](xt, t), xt, t)

    @torch.no_grad()
    def keep(self, losses, step):
        """Keeps the weights of the networks whose loss is lower than at any save before."""
        for s, loss in enumerate(losses):
            if loss < self.best_loss[s]:
                self.best_loss[s], self.best_step[s] = loss, step
                getattr(self, f"best_{s}").copy_(vector_of(self.nets[s]))

    @torch.no_grad()
    def take_best(self):
        """Puts the kept weights into the networks."""
        for s, net in enumerate(self.nets):
            kept = getattr(self, f"best_{s}").split([p.numel() for p in net.parameters()])
            for p, values in zip(net.parameters(), kept):
                p.copy_(values.view_as(p))


def build_net(config):
    """The networks of a configuration, on the CPU: their encoders are alike, their decoders of the base widths."""
    shape = [config[k] for k in ("channels", "ch", "mult", "blocks", "attention", "patch")]
    net = Separate([UNet(*shape, widths=[width]) for width in config["widths"]], bool(config["early_stopping"]))
    return net.to(memory_format=torch.channels_last)


def load_data(config):
    """multistage.py's, less the images held out."""
    x, y = load_all(config)
    if config["early_stopping"]:
        every = min(len(x), max(10, -(-len(x) // HELD_OUT)))
        rest = torch.arange(len(x)) % every < every - 1
        held_out[:], x, y = [to_float(x[~rest])], x[rest], y[rest]
        if not len(x):
            raise ValueError(f"--early-stopping: --data {config['data']} has no image to hold out")
    return x, y


def reference_images(config):
    """All images, for results/evaluate.py."""
    return load_all(config)


@torch.no_grad()
def held_out_losses(net, config, x0):
    """The loss of each network on the images x0 (n, C, R, R), at noise levels even in its stage, with fixed noise."""
    u, eps = (torch.arange(len(x0)) + 0.5) / len(x0), noise_for(range(len(x0)), tuple(x0.shape[1:]))
    bounds, device, losses = torch.tensor([T_TRAIN, *config["edges"], 1.0]), next(net.parameters()).device, []
    for low, high in zip(bounds, bounds[1:]):
        t = low.lerp(high, u)
        losses.append(sum(float(training_loss(net, config, *(v.to(device) for v in part))) * len(part[0])
                          for part in zip(x0.split(250), t.split(250), eps.split(250))) / len(x0))
    return losses


def save_run(name, config, step, net, ema, optimizer, losses, begun, rank):
    """common.py's; before it, early stopping."""
    if config["early_stopping"] and rank == 0:
        if step <= config["save_every"] and not config["resume"]:              # not the best of --init's other run
            ema.best_loss.fill_(math.inf)
        ema.keep(held_out_losses(ema, config, held_out[0]), step)
    save_all(name, config, step, net, ema, optimizer, losses, begun, rank)


def load_net(config, device):
    """multistage.py's; with early stopping the networks are the best ones."""
    net, config = load_last(config, device)
    if config["early_stopping"]:
        net.take_best()
        print(f"early stopping: weights of the steps {net.best_step.tolist()}")
    return net, config


script.__doc__, script.SCRIPT = __doc__, "multistage_separate"
script.CONFIG["run"]["out"] = ("runs/multistage_separate", *script.CONFIG["run"]["out"][1:])
script.CONFIG["network"]["early_stopping"] = (0, (0, 1), "1: keep of each network what does best on held-out images")
script.reference_images = reference_images
for function in (build_net, load_data, save_run, load_net):
    setattr(script, function.__name__, function)

if __name__ == "__main__":
    run_main(script.main, script.SCRIPT)
