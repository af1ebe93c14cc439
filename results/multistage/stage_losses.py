"""Where the error is: the loss of trained networks (multistage.py's) in each of the three stages.

    python results/multistage/stage_losses.py CHECKPOINT ...      # writes results/multistage/stage_losses.json

Mean squared error of v_hat on the first 1,000 images, one noise level and one noise each, the same for all networks;
the levels are evenly spread over each stage of .5169, .7062, whatever the stages of the network itself.
"""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from common import load_images, noise_for, save_json, to_float  # noqa: E402
from multistage import diffusion_loss, get_args, load_net, method_name, stage_levels, stage_of  # noqa: E402

EDGES, N = [0.5169, 0.7062], 1000
device, found = torch.device("cuda" if torch.cuda.is_available() else "cpu"), []
order = torch.randperm(N, generator=torch.Generator().manual_seed(0))     # any level for any image
for path in sys.argv[1:]:
    args = get_args(["--sample", "--checkpoint", path])
    net, losses = load_net(args, device), []
    x0, eps = to_float(load_images(args.data)[0][:N]).to(device), noise_for(range(N), (1, 32, 32)).to(device)
    for s in range(3):
        level = stage_levels((order.double() + 0.5) / N, s, EDGES, "vp").to(device)
        with torch.no_grad():
            parts = [float(diffusion_loss(net, x, t, e, "vp", stage_of(t, args.config["edges"]), "v")) * len(x)
                     for x, t, e in zip(x0.split(250), level.split(250), eps.split(250))]
        losses.append(round(sum(parts) / N, 5))
    found.append(dict(method=method_name(args.config), widths=args.config["widths"], edges=args.config["edges"],
                      losses=losses, **args.seen))
    print(found[-1])
save_json(ROOT / "results" / "multistage" / "stage_losses.json", found)
