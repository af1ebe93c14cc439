"""Latency of random-weight pipelines of diffusers at the paper's sizes, plain against PostDiff (Table 2's ratios: 2.57
for SD v1.5 at 768x768, 2.09 for SDXL and 1.49 for PixArt-alpha at 1024x1024). Weights do not change latency; the text
encoders, which run once, are left out: prompts are random embeddings.

    pip install diffusers transformers
    python results/postdiff/latency.py            # writes results/postdiff/latency.json; wants a GPU with 16 GB
"""
import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from postdiff import apply_postdiff, diffusers_denoiser  # noqa: E402

STEPS = 20
#       side, paper's ratio, settings of Table 2
KINDS = {"SD": (768, 2.57, dict(beta=0.5, s=0.5, k=2, m=0.75)),
         "SDXL": (1024, 2.09, dict(beta=0.75, s=0.2, k=2, m=0.75)),
         "PixArt": (1024, 1.49, dict(beta=0.75, s=0.5, k=1, m=0.75))}


def build(kind, device, dtype):
    """A pipeline without text encoders, and the arguments of a call with one prompt."""
    import diffusers
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    parts = dict(vae=vae, text_encoder=None, tokenizer=None)
    tokens, width = {"SD": (77, 768), "SDXL": (77, 2048), "PixArt": (120, 4096)}[kind]
    call = dict(prompt_embeds=torch.randn(1, tokens, width), negative_prompt_embeds=torch.randn(1, tokens, width))
    denoiser = diffusers_denoiser(kind)
    if kind == "SD":
        pipe = diffusers.StableDiffusionPipeline(
            **parts, unet=denoiser, scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
            safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False)
    elif kind == "SDXL":
        pipe = diffusers.StableDiffusionXLPipeline(**parts, unet=denoiser, text_encoder_2=None, tokenizer_2=None,
                                                   scheduler=diffusers.EulerDiscreteScheduler())
        pipe.register_to_config(force_zeros_for_empty_prompt=False)
        call.update(pooled_prompt_embeds=torch.randn(1, 1280), negative_pooled_prompt_embeds=torch.randn(1, 1280))
    else:
        pipe = diffusers.PixArtAlphaPipeline(**parts, transformer=denoiser,
                                             scheduler=diffusers.DPMSolverMultistepScheduler())
        call.update(prompt_attention_mask=torch.ones(1, tokens), negative_prompt_attention_mask=torch.ones(1, tokens),
                    negative_prompt=None, use_resolution_binning=False)
    pipe.set_progress_bar_config(disable=True)
    call = {k: v.to(device, dtype) if torch.is_tensor(v) else v for k, v in call.items()}
    return pipe.to(device, dtype), call


def seconds(pipe, call, repeat):
    """Of `repeat` images after one that warms up, decoded."""
    found = []
    for _ in range(repeat + 1):
        begun = time.time()
        pipe(**call, num_inference_steps=STEPS, output_type="pt", generator=torch.Generator().manual_seed(0))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.time() - begun)
    return found[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS), metavar="KIND", help="SD, SDXL, PixArt")
    parser.add_argument("--res", type=int, help="side of the image instead of the paper's: nothing is written")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    if set(args.kinds) - set(KINDS):
        parser.error(f"the kinds are {', '.join(KINDS)}")
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.float16) if cuda else ("cpu", torch.float32)
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    rows = []
    for kind in args.kinds:
        side, paper, settings = KINDS[kind]
        side = args.res or side
        torch.manual_seed(0)
        pipe, call = build(kind, device, dtype)
        call.update(height=side, width=side)
        plain = seconds(pipe, call, args.repeat)
        _, remove = apply_postdiff(pipe, **settings)
        fast = seconds(pipe, call, args.repeat)
        remove()
        rows.append(dict(kind=kind, side=side, steps=STEPS, **settings, plain=plain, postdiff=fast,
                         ratio=mean(plain) / mean(fast), paper_ratio=paper, device=name, dtype=str(dtype),
                         torch=torch.__version__))
        spread = [f"{mean(v):.3f}" + (f" +- {stdev(v):.3f}" if len(v) > 1 else "") for v in (plain, fast)]
        print(f"{kind}, {side}x{side}, {STEPS} steps, {name}: plain {spread[0]} s, PostDiff {spread[1]} s, "
              f"{rows[-1]['ratio']:.2f} times (paper {paper})", flush=True)
        del pipe
    if not args.res:
        (Path(__file__).resolve().parent / "latency.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
