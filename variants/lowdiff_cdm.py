"""CDM beside LowDiff (arXiv 2509.15342, Tables 8 and 9): for each resolution a network of its own, trained together,
sampled by the same cascade: more parameters for the same work. Options, loss, sampler and search are lowdiff.py's.

    python variants/lowdiff_cdm.py --train --sample --out runs/lowdiff_cdm       # 16 -> 32, from scratch
    python variants/lowdiff_cdm.py --search --sample         # Appendix C: where to stop the first stage, by FD
    python lowdiff.py --train --stages 16 32 --out runs/two  # the same with one network, LowDiff, for the same MACs
    python results/evaluate.py lowdiff_cdm                   # FD, MACs, seconds of the run in runs/lowdiff_cdm

Each network is what LowDiff's activates at that resolution, with weights of its own (D11): the same shape, the same
MACs, without the resolution embedding, which one resolution does not need.
"""
import sys
from pathlib import Path

import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from changed import copy_of  # noqa: E402
from common import run_main                                           # noqa: E402

script = copy_of("lowdiff")
lowdiff_net = script.build_net                                                 # one network for all resolutions


def sub_network(net, r):
    """LowDiff's network reduced to what it activates at r x r: its entry, the levels from there down, its exit."""
    encoder, decoder = net.encoder, net.decoder
    encoder.down, encoder.first = encoder.down[encoder.first[r]:], {r: 0}
    decoder.up = decoder.up[:len(encoder.down) + 1]            # a step up for each skip
    if isinstance(decoder.up[-1][-1], nn.Sequential):          # the way up to the next resolution
        decoder.up[-1] = decoder.up[-1][:-1]
    for part in (encoder.conv_in, decoder.norm_out, decoder.conv_out):
        for other in set(part) - {str(r)}:
            del part[other]
    if len(net.stages) > 1:
        del net.resolution
    net.stages = [r]
    return net


class Cascade(nn.Module):
    """A network for each resolution, {str(r): network}, called like LowDiff's one: the size of xt selects it."""

    def __init__(self, nets):
        super().__init__()
        self.nets = nn.ModuleDict(nets)

    def forward(self, xt, t, y=None):
        if str(xt.shape[-1]) not in self.nets:
            raise ValueError(f"no network for {[*xt.shape[-2:]]}, only for {', '.join(self.nets)}")
        return self.nets[str(xt.shape[-1])](xt, t, y)


def build_net(config):
    """The networks of a configuration, on the CPU."""
    return Cascade({str(r): sub_network(lowdiff_net(config), r) for r in config["stages"]})


script.SCRIPT, script.__doc__ = "lowdiff_cdm", __doc__
script.CONFIG["run"]["out"] = ("runs/lowdiff_cdm", *script.CONFIG["run"]["out"][1:])
script.CONFIG["network"]["stages"] = ([16, 32], (1, 1024), "resolutions, low to high, a network for each")
script.build_net = build_net

if __name__ == "__main__":
    run_main(script.main, script.SCRIPT)
