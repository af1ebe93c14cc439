"""Images/s of LowDiff and CDM beside EDM (LightningDiT) in the form of Table 5: run it alone on the machine.

    python results/lowdiff/speed.py               # 10 minutes on one CPU core; writes results/lowdiff/speed.json

Untrained networks (time does not depend on weights), the paper's schedules, batch 64 (64x64: 16), medians
of 9 runs (latents, 64x64: 3) in which the method and EDM take turns. Presets small (fashion10k, 32x32), small-64
(emoji, 64x64: Tables 3, 7, 9); small in latents.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import lowdiff  # noqa: E402
from common import save_json, sha256_of, start_device  # noqa: E402

CASES = (("pixel", "small", 1, ("lowdiff", [8, 16, 32]), ("lowdiff", [16, 32]), ("cdm", [16, 32])),
         ("pixel", "small-64", 3, ("lowdiff", [8, 16, 32, 64]), ("lowdiff", [32, 64]), ("cdm", [32, 64])),
         ("latent", "small", 1, ("lowdiff", [4, 8])))


def main():
    torch.set_num_threads(1)
    device, rows = start_device()[0], []
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, 1 thread"
    for space, preset, colours, *methods in CASES:
        lowdiff.SPEED_BATCH = 16 if preset == "small-64" else 64
        lowdiff.SPEED_RUNS = 9 if (space, preset) == ("pixel", "small") else 3
        for arch, stages in methods:
            config = dict(lowdiff.preset_of(preset, space), space=space, arch=arch, stages=stages, classes=0,
                          told=False, up="nearest", cond_scale="own")
            channels = config["latent"] if space == "latent" else colours
            net = lowdiff.build_net(config, channels).to(device).eval().requires_grad_(False)
            autoencoder = None
            if space == "latent":
                autoencoder = lowdiff.Autoencoder(colours, channels, config["factor"]).to(device).requires_grad_(False)
            args = SimpleNamespace(config=config, channels=channels, precision="auto", autoencoder=autoencoder,
                                   compile=False)
            plan = lowdiff.make_plan(stages, space=space)
            edm = lowdiff.edm_of(config)
            macs, nfe = lowdiff.plan_macs(config, channels, plan)
            base = lowdiff.plan_macs(edm, channels, lowdiff.make_plan(edm["stages"], space=space))[0]
            row = dict(space=space, preset=preset, method=arch, stages=stages, batch=lowdiff.SPEED_BATCH, nfe=nfe,
                       macs_per_image=macs, edm_macs_per_image=base, parameters=lowdiff.parameters(config, channels),
                       edm_parameters=lowdiff.parameters(edm, channels),
                       train_macs_per_image=lowdiff.training_macs(config, channels),
                       **lowdiff.speed(args, lowdiff.model_of(net, config, device, "auto"), plan, device),
                       device=name, torch=torch.__version__, source_sha256=sha256_of(lowdiff.__file__))
            rows.append(row)
            print(f"{preset} {arch} {stages}: {row['images_per_s']:.2f} images/s, EDM {row['edm_images_per_s']:.2f}: "
                  f"{row['speedup']:.2f} times; by MACs {base / macs:.2f}; effective NFE {row['effective_nfe']}",
                  flush=True)
    save_json(Path(__file__).with_name("speed.json"), rows)


if __name__ == "__main__":
    main()
