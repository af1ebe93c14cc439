"""C2F-TRD, Table I: how one network is told which resolution it sees, or two networks (arXiv 2603.21348, IV-B).

All are fine-tuned from a base model of c2f_trd.py: label (the script's: an embedding, added to that of the time), xy
(the pixels' coordinates as two more channels: their spacing tells), 2T (the low resolution lives at the steps T + t),
2dms (two models: the base stays that of the high resolution, a copy is trained at the low one).

    base=weights/c2f_trd/base.pt
    python variants/c2f_trd_strategies.py --train --init $base --low 16 --strategy 2dms --lr 3e-4 --out runs/2dms
    python variants/c2f_trd_strategies.py --sample --method c2f --low-steps 10 --steps 10 --t-star 706 --out runs/2dms
    python variants/c2f_trd_strategies.py --search --sample --out runs/2dms       # C2F+TRD, as in the script

Everything else is c2f_trd.py's. (D4), (D5), (D13): results/c2f_trd/README.md.
"""
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from changed import copy_of  # noqa: E402
import common  # noqa: E402
from common import run_main  # noqa: E402

script = copy_of("c2f_trd")
T, draw_batch_of_all, CHOICES = script.T, script.draw_batch, ("label", "xy", "2T", "2dms")
NETWORK = ("ch", "mult", "blocks", "attention", "patch")


# ---------------------------------------------------------------------------------------------
# Networks: called as UNet; the size of xt says which resolution it is
# ---------------------------------------------------------------------------------------------
def coordinates(h, w, like):
    """(2, h, w): x, growing to the right, and y of the pixels' centres in an image that spans -1 .. 1."""
    x, y = ((2 * torch.arange(n, device=like.device) + 1) / n - 1 for n in (w, h))
    return torch.stack(torch.meshgrid(x, y, indexing="xy")).to(like.dtype)


class CoordinateUNet(script.UNet):
    """xy: two more channels."""

    def __init__(self, channels, ch, mult, blocks, attention, patch):
        super().__init__(channels, ch, mult, blocks, attention, patch)
        self.encoder.conv_in = nn.Conv2d((channels + 2) * patch ** 2, ch, 3, padding=1)

    def forward(self, xt, t, y=None):
        xy = coordinates(*xt.shape[-2:], xt).expand(len(xt), -1, -1, -1)
        return super().forward(torch.cat([xt, xy], dim=1), t)


class LateUNet(script.UNet):
    """2T: the low resolution has the steps T .. 2 T - 1."""

    def __init__(self, *args, res):
        super().__init__(*args)
        self.res = res

    def forward(self, xt, t, y=None):
        return super().forward(xt, t if xt.shape[-1] == self.res else T + t)


class TwoModels(nn.Module):
    """2dms: the base model, which stays as it is, and a network of the low resolution."""

    def __init__(self, *args, res):
        super().__init__()
        self.res, self.high, self.low = res, script.UNet(*args), script.UNet(*args)
        self.high.requires_grad_(False)

    def forward(self, xt, t, y=None):
        return (self.high if xt.shape[-1] == self.res else self.low)(xt, t)


def build_net(config):
    """The network of a configuration, on the CPU."""
    args, res = [config["channels"], *(config[k] for k in NETWORK)], config["res"]
    net = {"label": lambda: script.UNet(*args, labels=2), "xy": lambda: CoordinateUNet(*args),
           "2T": lambda: LateUNet(*args, res=res), "2dms": lambda: TwoModels(*args, res=res)}[config["strategy"]]()
    return net.to(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------
def first_weights(base, strategy, patch):
    """The weights of a strategy's network, from those of the base model, which it equals at first (D4); what they lack
    (label embedding) is zero in a new network."""
    if strategy == "2dms":
        return {f"{part}.{k}": v for part in ("high", "low") for k, v in base.items()}
    if strategy == "xy":                                       # the weights of x and y are zero
        w = base["encoder.conv_in.weight"]
        return {**base, "encoder.conv_in.weight": torch.cat([w, w.new_zeros(len(w), 2 * patch ** 2, 3, 3)], dim=1)}
    return base


def begin_run(name, config, groups, device, world):
    """common's; --init is a checkpoint of c2f_trd.py."""
    if config["resume"]:
        return common.begin_run(name, config, groups, device, world)
    if not (config["init"] and config["low"]):
        raise ValueError("Table I fine-tunes: give --low, and as --init a base model of c2f_trd.py")
    config, saved = common.begin_run("c2f_trd", config, groups, device, world)
    return config, dict(saved, ema=first_weights(saved["ema"], config["strategy"], config["patch"]))


def draw_batch(config, x, y, step):
    """The script's: in turn high and low; of two models only the low one is trained (D5)."""
    return draw_batch_of_all(config, x, y, 1 if config["strategy"] == "2dms" else step)


script.SCRIPT, script.__doc__ = "c2f_trd_strategies", __doc__
script.CONFIG["run"]["out"] = ("runs/c2f_trd_strategies", *script.CONFIG["run"]["out"][1:])
script.CONFIG["network"]["strategy"] = ("2dms", CHOICES, f"Table I: {', '.join(CHOICES)}")
script.build_net, script.begin_run, script.draw_batch = build_net, begin_run, draw_batch

if __name__ == "__main__":
    run_main(script.main, script.SCRIPT)
