"""Pipelines of diffusers at the sizes of PostDiff's Table 2, for `python results/postdiff/experiments.py latency`.
Weights are random, which changes no latency; text encoders, which run once, are left out: prompts are embeddings.
"""
import torch


def pipeline(kind, device, dtype):
    """A pipeline of diffusers at the paper's size, random weights, no text encoders; the arguments of a call."""
    import diffusers as d
    vae = d.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    parts, (tokens, width) = dict(vae=vae, text_encoder=None, tokenizer=None), dict(
        SD=(77, 768), SDXL=(77, 2048), PixArt=(120, 4096))[kind]
    call = dict(prompt_embeds=torch.randn(1, tokens, width), negative_prompt_embeds=torch.randn(1, tokens, width))
    if kind == "SD":
        pipe = d.StableDiffusionPipeline(
            **parts, unet=d.UNet2DConditionModel(cross_attention_dim=768), safety_checker=None, feature_extractor=None,
            scheduler=d.DDIMScheduler(clip_sample=False, steps_offset=1), requires_safety_checker=False)
    elif kind == "SDXL":
        unet = d.UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=2048,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(5, 10, 20),
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816)
        pipe = d.StableDiffusionXLPipeline(**parts, unet=unet, text_encoder_2=None, tokenizer_2=None,
                                           scheduler=d.EulerDiscreteScheduler())
        pipe.register_to_config(force_zeros_for_empty_prompt=False)
        call.update(pooled_prompt_embeds=torch.randn(1, 1280), negative_pooled_prompt_embeds=torch.randn(1, 1280))
    else:
        pipe = d.PixArtAlphaPipeline(
            **parts, scheduler=d.DPMSolverMultistepScheduler(),
            transformer=d.PixArtTransformer2DModel(sample_size=128, caption_channels=4096))
        call.update(prompt_attention_mask=torch.ones(1, tokens), negative_prompt_attention_mask=torch.ones(1, tokens),
                    negative_prompt=None, use_resolution_binning=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype), {k: v.to(device, dtype) if torch.is_tensor(v) else v for k, v in call.items()}
