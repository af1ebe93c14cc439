"""variants/postdiff_diffusers.py in real pipelines of diffusers, of random weights and a few channels: equal to the
plain pipeline with everything off, to the packages DeepCache and tgate, to a loop written apart for mixed resolution;
and unharmed by what people do with pipelines (offload, slice, compile, adapt, replace, interrupt).

Pipelines ask for transformers when they are imported, of which these tests need names only: a stand-in gives them."""
import contextlib
import copy
import gc
import importlib.machinery
import importlib.util
import inspect
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "variants"))
pytest.importorskip("diffusers")
import postdiff_diffusers as pd  # noqa: E402


class StandIn(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (torch.nn.Module,), {}))
        return getattr(self, name)


def put_stand_in():
    """In place before anything imports a pipeline: diffusers looks for transformers once."""
    import diffusers.utils.import_utils as available
    for name in ("transformers", "transformers.utils", "tokenizers"):
        stand_in = StandIn(name)
        stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        stand_in.__path__, stand_in.__version__ = [], "4.57.6"
        sys.modules[name] = stand_in
    available._transformers_available, available._transformers_version = True, "4.57.6"


if "transformers" not in sys.modules and not importlib.util.find_spec("transformers"):
    put_stand_in()
import diffusers  # noqa: E402

diffusers.utils.logging.set_verbosity_error()
KINDS = "sd", "lcm", "sdxl", "pixart", "sd3"
MODULES = {"StableDiffusionPipeline": "stable_diffusion.pipeline_stable_diffusion",     # diffusers itself gives dummies
           "LatentConsistencyModelPipeline": "latent_consistency_models.pipeline_latent_consistency_text2img",
           "StableDiffusionXLPipeline": "stable_diffusion_xl.pipeline_stable_diffusion_xl",
           "PixArtAlphaPipeline": "pixart_alpha.pipeline_pixart_alpha",
           "StableDiffusion3Pipeline": "stable_diffusion_3.pipeline_stable_diffusion_3"}
NOTHING = dict(safety_checker=None, image_encoder=None, feature_extractor=None, requires_safety_checker=False)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet(**more):
    return diffusers.UNet2DConditionModel(**{**dict(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=4, cross_attention_dim=12,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")), **more})


def make_parts(kind):
    """The class of pipeline, its network and its scheduler."""
    torch.manual_seed(0)
    if kind == "sd":
        return "StableDiffusionPipeline", unet(), diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    if kind == "lcm":
        return "LatentConsistencyModelPipeline", unet(time_cond_proj_dim=8), diffusers.LCMScheduler()
    if kind == "sdxl":
        return "StableDiffusionXLPipeline", unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), addition_embed_type="text_time",
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
            use_linear_projection=True, addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 12), diffusers.EulerDiscreteScheduler()
    if kind == "pixart":
        return "PixArtAlphaPipeline", diffusers.PixArtTransformer2DModel(
            sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
            caption_channels=12), diffusers.DPMSolverMultistepScheduler()
    return "StableDiffusion3Pipeline", diffusers.SD3Transformer2DModel(
        sample_size=24, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=12,
        pos_embed_max_size=24), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def tiny(kind, dtype=torch.float32, batch=2, seed=0):
    """A pipeline without text encoders, and run(**options) -> latents (B, 4, 8, 16) of its 8 steps, with a generator
    for each image and guidance 4."""
    name, network, scheduler = make_parts(kind)
    for key, weight in network.named_parameters():                             # or a text would hardly matter
        weight.data *= 6 if ".attn2.to" in key and weight.ndim == 2 else 1
    vae = diffusers.AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=4, latent_channels=4,
                                  down_block_types=("DownEncoderBlock2D",) * 2, shift_factor=0.0,
                                  up_block_types=("UpDecoderBlock2D",) * 2)
    transformer = kind in ("pixart", "sd3")
    more = dict(text_encoder_2=None, tokenizer_2=None) if kind in ("sdxl", "sd3") else {}
    more.update(dict(text_encoder_3=None, tokenizer_3=None) if kind == "sd3" else {})
    more.update(NOTHING if kind in ("sd", "lcm") else {})
    module = importlib.import_module(f"diffusers.pipelines.{MODULES[name]}")
    pipe = getattr(module, name)(vae=vae, text_encoder=None, tokenizer=None, scheduler=scheduler, **more,
                                 **{"transformer" if transformer else "unet": network})
    pipe.set_progress_bar_config(disable=True)
    pipe.to(dtype=dtype)
    embeds = dict(prompt_embeds=randn(2, 7, 12, seed=seed), negative_prompt_embeds=randn(2, 7, 12, seed=seed + 1))
    if kind in ("sdxl", "sd3"):
        embeds.update(pooled_prompt_embeds=randn(2, 12, seed=2), negative_pooled_prompt_embeds=randn(2, 12, seed=3))
    if kind == "pixart":
        embeds.update(prompt_attention_mask=torch.ones(2, 7), negative_prompt_attention_mask=torch.ones(2, 7))
    if kind == "lcm":
        del embeds["negative_prompt_embeds"]
    call = {key: value.to(dtype)[:batch] for key, value in embeds.items()}
    call.update(num_inference_steps=8, guidance_scale=4.0, height=16, width=32, output_type="latent")
    if kind == "pixart":
        call.update(negative_prompt=None, use_resolution_binning=False)

    def run(pipe=pipe, **options):
        generators = [torch.Generator().manual_seed(i) for i in range(batch)]
        return pipe(**{"generator": generators, **call, **options}).images

    return SimpleNamespace(kind=kind, pipe=pipe, run=run, call=call, network=network,
                           attr="transformer" if transformer else "unet")


SCHEDULERS = {"ddim": lambda: diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
              "ddpm": lambda: diffusers.DDPMScheduler(clip_sample=False),
              "euler": lambda: diffusers.EulerDiscreteScheduler(use_karras_sigmas=True),
              "ancestral": diffusers.EulerAncestralDiscreteScheduler,
              "dpm++ 2m": lambda: diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True),
              "sde": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
              "unipc": diffusers.UniPCMultistepScheduler, "lcm": diffusers.LCMScheduler}


def distance(a, b):
    return float((a - b).float().norm() / b.float().norm())


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    case = tiny(request.param)
    case.plain = case.run()
    return case


# ---------------------------------------------------------------------------------------------
# Peers
# ---------------------------------------------------------------------------------------------
def test_off_is_the_plain_pipeline(case):
    handle = pd.apply_postdiff(case.pipe, s=0, k=1, m=1)
    assert torch.equal(case.run(), case.plain) and len(handle.log) == 8
    handle.remove()
    handle.remove()
    assert torch.equal(case.run(), case.plain) and not hasattr(case.pipe, "postdiff")
    assert "step" not in vars(case.pipe.scheduler) and case.network._compiled_call_impl is None


def test_settings_of_table_2(case):
    """Sizes, batches, full and shallow passes, what is frozen; a second call; the pipeline as it was."""
    lcm, n_low, low = case.kind == "lcm", 2 if case.kind == "sdxl" else 4, (4, 8)
    low = low if case.kind in ("sd", "lcm") else (6, 12)
    with pd.postdiff(case.pipe) as handle:
        first, second = case.run(), case.run()
    assert torch.equal(first, second) and first.shape == case.plain.shape and not torch.equal(first, case.plain)
    n_guided, full = 4 if lcm else 6, "FcFcFcFc" if case.kind in ("sd", "sdxl") else "FFFFFFFF"
    assert handle.log == [
        (i, 2 if lcm or i >= n_guided else 4, *(low if i < n_low else (8, 16)), full[i] == "F",
         i < n_guided and not lcm, i >= n_guided and case.kind != "sd3") for i in range(8)]
    table = handle.table().split("\n")
    assert table[0].split() == list(pd.Pass._fields) and table[1].split()[:3] == ["0", "2" if lcm else "4", str(low[0])]
    assert torch.equal(case.run(), case.plain)


@pytest.mark.parametrize("kind, depth, k", [("sd", 1, 2), ("sd", 4, 3), ("sdxl", 1, 2), ("sdxl", 0, 3), ("lcm", 2, 2)])
def test_deepcache_is_the_package(kind, depth, k):
    package = pytest.importorskip("DeepCache")
    case = tiny(kind)
    with pd.postdiff(case.pipe, s=0, m=1, k=k, depth=depth):
        ours = case.run()
    helper = package.DeepCacheSDHelper(case.pipe)
    helper.set_params(cache_interval=k, cache_branch_id=depth)
    helper.enable()
    assert torch.equal(ours, case.run())
    helper.disable()


@pytest.mark.parametrize("kind", ["sd", "sdxl", "pixart"])
def test_guidance_dropped_is_the_package(kind):
    """T-GATE freezes the average. SDXL: one pooled text for both, as it takes the null one after the gate (D7)."""
    tgate = pytest.importorskip("tgate")
    case = tiny(kind)
    if kind == "sdxl":
        case.call["negative_pooled_prompt_embeds"] = case.call["pooled_prompt_embeds"]
    loader, gate = getattr(tgate, {"sd": "TgateSDLoader", "sdxl": "TgateSDXLLoader",
                                   "pixart": "TgatePixArtAlphaLoader"}[kind]), 5
    with pd.postdiff(case.pipe, s=0, k=1, m=gate / 8, choice="ave"):
        ours = case.run()
    theirs = loader(tiny(kind).pipe, gate_step=gate, num_inference_steps=8)
    options = {**case.call, "generator": [torch.Generator().manual_seed(i) for i in range(2)], "gate_step": gate,
               "sp_interval": 1, "fi_interval": 1, "warm_up": 0}               # no caches of self-attention
    assert torch.equal(theirs.tgate(**options).images, ours) and not torch.equal(ours, case.run())


def alpha_sigma(scheduler, i):
    """xt = alpha x0 + sigma eps at step i of this scheduler."""
    if hasattr(scheduler, "scale_noise"):
        return 1 - scheduler.sigmas[i], scheduler.sigmas[i]
    if type(scheduler).__name__.startswith("Euler"):
        return torch.tensor(1.0), scheduler.sigmas[i]
    if hasattr(scheduler, "model_outputs"):
        alpha = 1 / (1 + scheduler.sigmas[i] ** 2).sqrt()
        return alpha, alpha * scheduler.sigmas[i]
    abar = scheduler.alphas_cumprod[scheduler.timesteps[i]]
    return abar.sqrt(), (1 - abar).sqrt()


def mixed_loop(case, scheduler, n_low, w=4.0):
    """Mixed resolution written apart: two schedulers, one for each resolution, and the network by hand."""
    seen = []
    hook = case.network.register_forward_pre_hook(lambda m, a, kw: seen.append((a, kw)), with_kwargs=True)
    case.run(num_inference_steps=2)
    hook.remove()
    (args, kwargs), flow = seen[0], hasattr(scheduler, "scale_noise")
    pairs = len(args[0] if args else kwargs["hidden_states"]) == 4

    def model(x, t):
        x = torch.cat([x, x]) if pairs else x
        inputs = (x,) if len(args) == 1 else (x, t) if args else ()
        more = {"hidden_states": x} if not args else {}
        more.update({"timestep": t.expand(len(x))} if "timestep" in kwargs else {})
        out = case.network(*inputs, **{**kwargs, **more})[0]
        out = out[:, :4]                                                       # PixArt's learned variance goes
        if not pairs:
            return out
        null, text = out.chunk(2)
        return null + w * (text - null)

    def step(scheduler, x, t, eps):
        more = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        return scheduler.step(eps, t, x, **more).prev_sample

    def noise(h, w):
        return torch.cat([torch.randn(1, 4, h, w, generator=g) for g in generators])

    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    low, full = copy.deepcopy(scheduler), copy.deepcopy(scheduler)
    low.set_timesteps(8)
    full.set_timesteps(8)
    scale = (lambda s, x, t: x) if flow else (lambda s, x, t: s.scale_model_input(x, t))
    x = noise(4, 8) * (1.0 if flow else low.init_noise_sigma)
    with torch.no_grad():
        for i, t in enumerate(low.timesteps[:n_low]):
            eps = model(scale(low, x, t), t)
            if i < n_low - 1:
                x = step(low, x, t, eps)
        alpha, sigma = alpha_sigma(low, n_low - 1)
        x0 = x - sigma * eps if flow else (x - sigma * eps) / alpha
        if type(low).__name__ == "LCMScheduler":
            c_skip, c_out = low.get_scalings_for_boundary_condition_discrete(t)
            x0 = c_out * x0 + c_skip * x
        up = torch.nn.functional.interpolate(x0, size=(8, 16), mode="bilinear", align_corners=False)
        if hasattr(full, "set_begin_index"):
            full.set_begin_index(n_low)
        alpha, sigma = alpha_sigma(full, n_low)
        x = alpha * up + sigma * noise(8, 16)
        for t in full.timesteps[n_low:]:
            x = step(full, x, t, model(scale(full, x, t), t))
    return x


MIXED = [("sd", name, 4) for name in SCHEDULERS] + [
    ("sdxl", "euler", 2), ("sdxl", "unipc", 5), ("pixart", "dpm++ 2m", 3), ("lcm", "lcm", 4), ("sd3", None, 3)]


@pytest.mark.parametrize("kind, name, n_low", MIXED)
def test_mixed_resolution_is_a_loop_written_apart(kind, name, n_low):
    """The same images, so the noise that a stochastic scheduler draws at the switch is not taken from the generator."""
    case = tiny(kind)
    case.pipe.scheduler = SCHEDULERS[name]() if name else case.pipe.scheduler
    expected = mixed_loop(case, copy.deepcopy(case.pipe.scheduler), n_low)
    with pd.postdiff(case.pipe, s=n_low / 8, beta=0.5, k=1, m=1):
        assert distance(case.run(), expected) < 1e-4


def test_weight_of_the_frozen_pair():
    """cfg with w = 1 is cond, with w = 0 uncond, with 1/2 the average; without w it is the call's guidance."""
    case, images = tiny("sd"), {}
    for choice, w in (("cond", None), ("cfg", 1.0), ("uncond", None), ("cfg", 0.0), ("ave", None), ("cfg", 0.5),
                      ("cfg", 4.0), ("cfg", None)):
        with pd.postdiff(case.pipe, s=0, k=1, m=0.5, choice=choice, w=w):
            images[choice, w] = case.run(num_inference_steps=4)
    assert distance(images["cfg", 1.0], images["cond", None]) < 1e-5
    assert distance(images["cfg", 0.0], images["uncond", None]) < 1e-5
    assert distance(images["cfg", 0.5], images["ave", None]) < 1e-5
    assert min(distance(images["cond", None], images[key]) for key in (("uncond", None), ("ave", None))) > 1e-3
    assert torch.equal(images["cfg", 4.0], images["cfg", None])


def test_token_grid():
    assert pd.token_grid(60, 24, 40) == (6, 10)                               # not 7x8, as the ratio would have it
    assert pd.token_grid(5 * 8, 9, 15) == (5, 8) and pd.token_grid(135, 9, 15) == (9, 15)


# ---------------------------------------------------------------------------------------------
# Types: what goes from step to step has the network's, for every scheduler
# ---------------------------------------------------------------------------------------------
GRID = [("sd", "ddim"), ("sd", "euler"), ("sd", "ancestral"), ("sd", "dpm++ 2m"), ("sd", "unipc"), ("sd", "lcm"),
        ("sdxl", "euler"), ("sdxl", "ancestral"), ("sdxl", "sde"), ("lcm", "lcm"), ("pixart", "euler"),
        ("pixart", "dpm++ 2m"), ("sd3", None)]


@pytest.mark.parametrize("number, kind, name", [(i, *pair) for i, pair in enumerate(GRID)])
def test_types(number, kind, name):
    """bf16 or fp16, one image or two, with and without guidance: a finite latent of the type and the size asked for."""
    dtype, batch, w = (torch.bfloat16, torch.float16)[number % 2], 1 + number // 2 % 2, (7.5, 1.0)[number % 3 == 2]
    case = tiny(kind, dtype, batch)
    case.pipe.scheduler = SCHEDULERS[name]() if name else case.pipe.scheduler
    more = dict(negative_prompt_embeds=None, negative_prompt_attention_mask=None) if kind == "pixart" and w == 1 else {}
    plain = case.run(num_inference_steps=4, guidance_scale=w, **more)
    with pd.postdiff(case.pipe, s=0.5, beta=0.5, m=0.75) as handle:
        image = case.run(num_inference_steps=4, guidance_scale=w, **more)
    assert image.dtype == plain.dtype and image.shape == plain.shape == (batch, 4, 8, 16)
    assert torch.isfinite(image.float()).all() and len(handle.log) == 4
    assert [p.height for p in handle.log] == [4, 4, 8, 8]


# ---------------------------------------------------------------------------------------------
# What is replaced: a call takes what it finds
# ---------------------------------------------------------------------------------------------
def test_another_scheduler_another_network_another_prompt():
    case, other = tiny("sd"), tiny("sd", seed=5)
    torch.manual_seed(1)
    network, embeds = unet(), {key: other.call[key] for key in ("prompt_embeds", "negative_prompt_embeds")}

    def fresh():
        pipe = tiny("sd").pipe
        pipe.scheduler, pipe.unet = diffusers.UniPCMultistepScheduler(), network
        with pd.postdiff(pipe):
            return case.run(pipe, num_inference_steps=6, **embeds)

    handle = pd.apply_postdiff(case.pipe)
    case.run(num_inference_steps=4)
    case.pipe.scheduler, case.pipe.unet = diffusers.UniPCMultistepScheduler(), network
    assert torch.equal(case.run(num_inference_steps=6, **embeds), fresh()) and len(handle.log) == 6
    case.pipe.scheduler = diffusers.PNDMScheduler()
    with pytest.raises(ValueError, match=r"pipe.scheduler = DDIMScheduler.from_config\(pipe.scheduler.config, clip"):
        case.run()
    case.pipe.scheduler = diffusers.DDIMScheduler.from_config(case.pipe.scheduler.config, clip_sample=False)
    assert case.run().shape == (2, 4, 8, 16)


def test_pipelines_that_share_parts(case):
    """Another pipeline of the same parts is plain while PostDiff is on the first, and may have its own PostDiff."""
    with pd.postdiff(case.pipe, s=0, m=0.5) as handle:
        expected = case.run(num_inference_steps=4)
        second = type(case.pipe).__base__(**case.pipe.components)
        second.set_progress_bar_config(disable=True)
        assert torch.equal(case.run(second), case.plain)
        with pd.postdiff(second, s=0, m=0.5):
            assert torch.equal(case.run(second, num_inference_steps=4), expected)
            assert torch.equal(case.run(num_inference_steps=4), expected)
        assert torch.equal(case.run(num_inference_steps=4), expected)
        assert torch.equal(case.run(num_inference_steps=4), expected) and len(handle.log) == 4


def test_copies():
    """A copy, made while PostDiff is on or later, calls its own modules, whatever is done to the original."""
    case = tiny("sd")
    with pd.postdiff(case.pipe):
        expected = case.run(num_inference_steps=4)
        during = copy.deepcopy(case.pipe)
        assert torch.equal(case.run(during, num_inference_steps=4), expected)
    plain, after = case.run(num_inference_steps=4), copy.deepcopy(case.pipe)
    for weight in case.network.parameters():
        weight.data.zero_()
    assert torch.equal(case.run(during, num_inference_steps=4), expected)
    assert torch.equal(case.run(after, num_inference_steps=4), plain)


def test_a_pipeline_is_saved_under_its_own_name(tmp_path):
    case = tiny("sd")
    with pd.postdiff(case.pipe):
        case.pipe.save_pretrained(tmp_path)
        assert type(case.pipe).__name__ == "StableDiffusionPipeline"
    assert '"_class_name": "StableDiffusionPipeline"' in (tmp_path / "model_index.json").read_text()


# ---------------------------------------------------------------------------------------------
# Arguments: a shallow pass is the network's own forward
# ---------------------------------------------------------------------------------------------
ARGUMENTS = {"sample": None, "timestep": None, "encoder_hidden_states": None, "return_dict": False,
             "class_labels": torch.tensor([1, 2]), "timestep_cond": randn(2, 8, seed=3),
             "attention_mask": None, "cross_attention_kwargs": {}, "added_cond_kwargs": {},
             "encoder_attention_mask": torch.tensor([[1.0, 1, 1, 1, 0, 0, 0]] * 2),
             "down_block_additional_residuals": tuple(randn(2, c, 8 // f, 8 // f, seed=c + f) for c, f in
                                                      ((8, 1), (8, 1), (8, 1), (8, 2), (16, 2), (16, 2))),
             "mid_block_additional_residual": randn(2, 16, 4, 4, seed=4),
             "down_intrablock_additional_residuals": (randn(2, 8, 8, 8, seed=5), randn(2, 16, 4, 4, seed=6))}


def make_run(network, **plan):
    """A Run on a bare network, of two images."""
    pipe = type("StableDiffusionPipeline", (), {})()
    pipe.unet, pipe.scheduler = network, SCHEDULERS["ddim"]()
    pipe.scheduler.set_timesteps(8)
    run = pd.Run(pipe, dict(zip(pd.NAMES, (0, 0.5, 2, 1.0, 1, "none"))) | plan, None, 4.0)
    run.batch = 2
    return run


@pytest.mark.parametrize("depth, freeu", [(0, False), (1, False), (1, True), (4, True)])
def test_a_shallow_pass_honours_every_argument(depth, freeu):
    """With features of the same inputs a shallow pass is the full one, whichever arguments it gets."""
    assert set(inspect.signature(diffusers.UNet2DConditionModel.forward).parameters) == {"self", *ARGUMENTS}
    torch.manual_seed(0)
    network = unet(time_cond_proj_dim=8, num_class_embeds=3).eval()
    if freeu:
        network.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    x, text, run = randn(2, 4, 8, 8), randn(2, 7, 12), make_run(network, depth=depth)

    def arguments(*left_out):
        kept = {key: list(v) if key == "down_intrablock_additional_residuals" else v for key, v in ARGUMENTS.items()
                if v is not None and key not in left_out}
        return {**kept, "encoder_hidden_states": text}

    with torch.no_grad(), contextlib.ExitStack() as stack:
        plain = network(x, 500, **arguments("down_intrablock_additional_residuals"))[0]
        adapted = network(x, 500, **arguments("down_block_additional_residuals", "mid_block_additional_residual"))[0]
        for change in run.changes:
            stack.enter_context(pd.replaced(*change))
        for expected, left_out in ((plain, ("down_intrablock_additional_residuals",)),
                                   (adapted, ("down_block_additional_residuals", "mid_block_additional_residual"))):
            run.age = run.k                                                    # the next pass is full
            full, shallow, = (network(x, 500, **arguments(*left_out))[0] for _ in range(2))
            assert torch.equal(full, expected) and torch.equal(shallow, expected)
            assert [p.full for p in run.log[-2:]] == [True, False]
        again = network(x, 500, **{**arguments("down_intrablock_additional_residuals"), "class_labels": torch.zeros(
            2, dtype=torch.long)})[0]
        assert not torch.equal(again, plain)                                   # it is no memory of the whole


def test_what_comes_in_pairs_is_halved_everywhere():
    case, seen = tiny("sd"), []
    case.network.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["cross_attention_kwargs"]), with_kwargs=True)
    pair = torch.arange(4.0).view(4, 1)
    given = {"masks": [pair, pair[:1]], "gligen_like": {"boxes": pair, "text": "x"}, "size": 0.5}
    with pd.postdiff(case.pipe, s=0, m=0.5):
        case.run(num_inference_steps=2, cross_attention_kwargs=given)
    early, late = seen
    assert torch.equal(early["masks"][0], pair) and torch.equal(late["masks"][0], pair[2:])
    assert torch.equal(late["gligen_like"]["boxes"], pair[2:]) and len(late["masks"][1]) == 1 and late["size"] == 0.5


def test_images_of_a_batch_do_not_see_each_other(case):
    alone = {key: v[1:] if torch.is_tensor(v) else v for key, v in case.call.items()}
    with pd.postdiff(case.pipe, beta=0.5):
        both = case.run()
        one = case.pipe(**alone, generator=[torch.Generator().manual_seed(1)]).images
    assert distance(one, both[1:]) < 1e-4


# ---------------------------------------------------------------------------------------------
# What people do with pipelines
# ---------------------------------------------------------------------------------------------
def test_slicing_before_and_after():
    """Other processors of the attentions change nothing; those that are set after apply_postdiff stay."""
    case, plan = tiny("sd"), dict(s=0, m=0.25)
    with pd.postdiff(case.pipe, **plan, choice="none"):
        thawed = case.run()
    with pd.postdiff(case.pipe, **plan):
        expected = case.run()
    assert distance(thawed, expected) > 1e-3
    case.pipe.enable_attention_slicing(1)
    with pd.postdiff(case.pipe, **plan) as handle:
        assert distance(case.run(), expected) < 1e-4 and handle.log[-1].frozen
        case.pipe.disable_attention_slicing()
        assert distance(case.run(), expected) < 1e-4
        calls = []

        class Processor(diffusers.models.attention_processor.AttnProcessor2_0):
            def __call__(self, attn, *args, **kwargs):
                calls.append(attn)
                return super().__call__(attn, *args, **kwargs)

        case.network.set_attn_processor(Processor())
        assert torch.equal(case.run(), expected)
        frozen = [m for name, m in case.network.named_modules() if name.endswith(".attn2")]
        assert len(frozen) < sum(attn in frozen for attn in calls) < 8 * len(frozen)
    assert all(isinstance(p, Processor) for p in case.network.attn_processors.values())


def test_adapters_and_their_scales():
    peft, case = pytest.importorskip("peft"), tiny("sd")
    handle = pd.apply_postdiff(case.pipe)
    before = case.run()
    case.network.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    strong = case.run()
    case.network.set_adapters(["default"], weights=[0.0])
    weak = case.run()
    assert distance(weak, before) < 1e-4 and distance(strong, before) > 1e-2   # in shallow passes, too
    case.network.set_adapters(["default"], weights=[1.0])
    handle.remove()
    with pd.postdiff(case.pipe):
        assert torch.equal(case.run(), strong)


def test_offloading_before_and_after():
    pytest.importorskip("accelerate")
    case = tiny("sd")
    with pd.postdiff(case.pipe):
        expected = case.run(num_inference_steps=4)
    case.pipe.enable_model_cpu_offload(device="cpu")
    plain = case.run(num_inference_steps=4)
    handle = pd.apply_postdiff(case.pipe)
    for _ in range(2):
        assert torch.equal(case.run(num_inference_steps=4), expected)
    case.pipe.remove_all_hooks()
    assert torch.equal(case.run(num_inference_steps=4), expected)
    case.pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(case.run(num_inference_steps=4), expected)
    handle.remove()
    assert torch.equal(case.run(num_inference_steps=4), plain) and hasattr(case.network, "_hf_hook")


@pytest.mark.parametrize("before", [True, False])
def test_group_offloading(before):
    """diffusers' own offloading puts hooks into the same registry."""
    pytest.importorskip("accelerate")
    case, cpu = tiny("sd"), torch.device("cpu")
    with pd.postdiff(case.pipe):
        expected = case.run(num_inference_steps=4)
    handle = None if before else pd.apply_postdiff(case.pipe)
    case.network.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    handle = handle or pd.apply_postdiff(case.pipe)
    assert torch.equal(case.run(num_inference_steps=4), expected) and not handle.log[1].full


COMPILED = [("sd", way, before) for way in ("torch.compile", "module.compile", "blocks") for before in (True, False)]
COMPILED += [("pixart", "torch.compile", True), ("sd3", "module.compile", False)]


@pytest.mark.parametrize("kind, way, before", COMPILED)
def test_compiling_before_and_after(kind, way, before):
    """As compiled, but with nothing traced, which takes long; the next test traces."""
    case = tiny(kind)
    plain = case.run(num_inference_steps=4)
    with pd.postdiff(case.pipe):
        expected = case.run(num_inference_steps=4)
    handle = None if before else pd.apply_postdiff(case.pipe)
    if way == "torch.compile":
        setattr(case.pipe, case.attr, torch.compile(case.network, backend="eager"))
    else:
        (case.network.compile if way == "module.compile" else case.network.compile_repeated_blocks)(backend="eager")
    handle = handle or pd.apply_postdiff(case.pipe)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(case.run(num_inference_steps=4), expected) and len(handle.log) == 4
        handle.remove()
        assert torch.equal(case.run(num_inference_steps=4), plain)


@pytest.mark.parametrize("kind", ["sd", "pixart"])
def test_compiled_code_keeps_the_caches(kind):
    """Traced for real: a graph without a break for each kind of pass (full and shallow; full and frozen), none again in
    the second `with`."""
    case, plan = tiny(kind, batch=1), dict(s=0, m=1 if kind == "sd" else 0.5)
    if kind == "sd":
        case.pipe.unet = unet(layers_per_block=1, down_block_types=("DownBlock2D",) * 2, mid_block_type=None,
                              up_block_types=("UpBlock2D",) * 2)
    else:
        del case.network.transformer_blocks[1:]
    with pd.postdiff(case.pipe, **plan):
        expected = case.run(num_inference_steps=2)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    setattr(case.pipe, case.attr, torch.compile(getattr(case.pipe, case.attr), backend="eager", fullgraph=True))
    for _ in range(2):
        with pd.postdiff(case.pipe, **plan) as handle:
            assert torch.equal(case.run(num_inference_steps=2), expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert handle.log[1].full == (kind != "sd") and handle.log[1].frozen == (kind != "sd")


# ---------------------------------------------------------------------------------------------
# Calls that end early, and what is left of a call
# ---------------------------------------------------------------------------------------------
def test_a_call_that_ends_early():
    case = tiny("sdxl")
    plain = case.run(denoising_end=0.6, num_inference_steps=4)

    def stop(at):
        def callback(pipe, i, t, kwargs):
            pipe._interrupt = i == at
            return kwargs
        return callback

    def fail(pipe, i, t, kwargs):
        raise KeyError("of the user")

    with pd.postdiff(case.pipe, s=0.5, beta=0.5) as handle:
        expected = case.run(num_inference_steps=4)
        for early in (dict(callback_on_step_end=stop(0)), dict(denoising_end=0.3)):
            with pytest.raises(ValueError, match="after 1 of 2 low steps: let it go on, or s=0"):
                case.run(num_inference_steps=4, **early)
        with pytest.raises(KeyError, match="of the user"):
            case.run(num_inference_steps=4, callback_on_step_end=fail)
        for late in (dict(callback_on_step_end=stop(2)), dict(denoising_end=0.6)):
            assert case.run(num_inference_steps=4, **late).shape == plain.shape
        assert "step" not in vars(case.pipe.scheduler) and case.network._compiled_call_impl is None
        assert torch.equal(case.run(num_inference_steps=4), expected) and handle.run is None
    assert torch.equal(case.run(num_inference_steps=4, denoising_end=0.6), plain)


def test_a_call_keeps_nothing():
    case = tiny("sd")
    with pd.postdiff(case.pipe):
        case.run(num_inference_steps=2)
        gc.collect()
        gc.disable()
        case.run(num_inference_steps=4)
        left = [o for o in gc.get_objects() if isinstance(o, (pd.DeepCache, pd.CrossCache, pd.Run)) and vars(o)]
        gc.enable()
    assert left == []


def test_a_callback_that_ends_guidance_itself():
    """diffusers' own cut-off halves the prompts before m: the batch is B from then on, and so is what is cached."""
    case = tiny("sd", batch=1)
    cut = diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=3)
    with pd.postdiff(case.pipe, s=0) as handle:
        image = case.run(callback_on_step_end=cut)
    assert [p.batch for p in handle.log] == [2] * 4 + [1] * 4 and handle.log[4].full and handle.log[-1].frozen
    assert torch.isfinite(image).all()


def test_equal_timesteps_at_the_switch():
    """Karras' steps are rounded: two neighbours can be equal, whose noise is not."""
    case = tiny("sd")
    scheduler = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(100)
    times = scheduler.timesteps.tolist()
    n_low = next(i for i in range(1, 99) if times[i] == times[i + 1])
    case.pipe.scheduler, seen = scheduler, []
    real = scheduler.add_noise

    def add_noise(x, eps, t):
        seen.append((real(x, eps, t), x, eps))
        return seen[-1][0]

    scheduler.add_noise = add_noise
    case.network.forward = lambda x, t, **more: (torch.zeros_like(x),)
    with pd.postdiff(case.pipe, s=n_low / 100, k=1, m=1, beta=0.5):
        case.run(num_inference_steps=100, callback_on_step_end=lambda pipe, i, t, kw: (
            setattr(pipe, "_interrupt", i >= n_low), kw)[1])
    (xt, x, eps), = seen
    alpha, sigma = alpha_sigma(scheduler, n_low)
    assert torch.allclose(xt, alpha * x + sigma * eps, atol=1e-6)


# ---------------------------------------------------------------------------------------------
# What does not fit
# ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, bad, words", [
    ("sd", dict(s=1), "0 <= s < 1"), ("sd", dict(s=-0.1), "0 <= s < 1"), ("sd", dict(m=1.1), "0 <= m <= 1"),
    ("sd", dict(k=0), "whole k >= 1"), ("sd", dict(k=1.5), "whole k >= 1"), ("sd", dict(beta=0), "0 < beta <= 1"),
    ("sd", dict(choice="x"), "'cond'"), ("sd", dict(w=2.0), "choice='cfg'"), ("sd", dict(depth=6), "depth below 6"),
    ("pixart", dict(k=2), "leave k and depth out"), ("pixart", dict(depth=1), "leave k and depth out"),
    ("sd3", dict(k=2), "leave k and depth out"), ("sd3", dict(choice="cond"), "leave choice out")])
def test_bad_settings(kind, bad, words):
    case = tiny(kind)
    with pytest.raises(ValueError, match=words) as error:
        pd.apply_postdiff(case.pipe, **bad)
    assert "\n" not in str(error.value) and not hasattr(case.pipe, "postdiff")


def test_bad_pipelines_and_calls():
    with pytest.raises(ValueError, match="PostDiff knows StableDiffusionPipeline"):
        pd.apply_postdiff(SimpleNamespace())
    case = tiny("sd")
    with pd.postdiff(case.pipe), pytest.raises(ValueError, match="remove"):
        pd.apply_postdiff(case.pipe)
    for bad, call, words in (
            (dict(beta=0.3), {}, r"needs multiples of 20: the nearest \(height, width\) is \(20, 40\)"),
            (dict(s=0.01), {}, "s 0.01 of 8 steps is 0: take more steps, or s=0"),
            (dict(), dict(num_inference_steps=1), "take more steps"),
            (dict(), dict(latents=torch.zeros(2, 4, 8, 16)), "pass generator=, or s=0"),
            (dict(choice="ave"), dict(guidance_scale=1.0), "choice 'ave' of no pair")):
        with pd.postdiff(case.pipe, **bad):
            with pytest.raises(ValueError, match=words) as error:
                case.run(**call)
            assert "\n" not in str(error.value)
    with pd.postdiff(case.pipe, s=0):                                          # latents= have their use without s
        assert case.run(latents=torch.zeros(2, 4, 8, 16)).shape == (2, 4, 8, 16)


@pytest.mark.parametrize("kind, scheduler, mend", [
    ("sd", diffusers.PNDMScheduler, "DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)"),
    ("sdxl", diffusers.HeunDiscreteScheduler, "DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)"),
    ("sd", lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
     "DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)"),
    ("sd", lambda: diffusers.UniPCMultistepScheduler(predict_x0=False),
     "DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)"),
    ("lcm", diffusers.PNDMScheduler, "LCMScheduler.from_config(pipe.scheduler.config)"),
    ("sd3", lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
     "FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, use_dynamic_shifting=False)")])
def test_schedulers_that_give_no_x0(kind, scheduler, mend):
    """The line that the error gives mends it; without mixed resolution they are as good as any."""
    case = tiny(kind)
    case.pipe.scheduler = scheduler()
    with pd.postdiff(case.pipe, s=0.0, m=1) as handle:
        if kind in ("sd", "sdxl"):
            case.run(num_inference_steps=4)
            assert len(handle.log) == len(case.pipe.scheduler.timesteps)
    with pytest.raises(ValueError) as error:
        with pd.postdiff(case.pipe, beta=0.5):                                 # SD3: in the call, which may have mu=
            case.run()
    assert str(error.value).endswith(f"pipe.scheduler = {mend}")
    exec(f"pipe.scheduler = diffusers.{mend}", dict(pipe=case.pipe, diffusers=diffusers))
    with pd.postdiff(case.pipe, beta=0.5):
        assert case.run(num_inference_steps=5).shape == (2, 4, 8, 16)


# ---------------------------------------------------------------------------------------------
# MACs, and the command
# ---------------------------------------------------------------------------------------------
def test_command(tmp_path, monkeypatch, capsys):
    """Plain image left, PostDiff right, none overwritten; their MACs; what does not fit in one line."""
    case = tiny("sd")
    monkeypatch.setattr(case.pipe, "encode_prompt", lambda prompt, device, n, guided, *args, **kw: (
        randn(1, 7, 12, seed=len(prompt)), randn(1, 7, 12)), raising=False)
    case.pipe.register_to_config(requires_safety_checker=False)
    case.pipe.scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *a, **kw: case.pipe)

    def command(*argv):
        monkeypatch.setattr(sys, "argv", ["postdiff_diffusers.py", "x", *map(str, argv)])
        pd.main()
        return capsys.readouterr().out

    argv = ("--prompt", "cat", "red heart", "--steps", 2, "--out", tmp_path / "out")
    out = command(*argv)
    assert "DDIM makes both" in out and out.count("T MACs: plain 0.000, PostDiff") == 2
    from PIL import Image
    images = [Image.open(path) for path in sorted((tmp_path / "out").iterdir())]
    assert len(images) == 2 and all(image.size == (32, 16) for image in images)
    assert all(image.crop((0, 0, 16, 16)).tobytes() != image.crop((16, 0, 32, 16)).tobytes() for image in images)
    assert "(100.0%)" in command(*argv[:2], "--steps", 2, "--s", 0, "--m", 1, "--k", 1, "--out", tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 3
    last = Image.open(tmp_path / "out/0002.png")
    assert last.crop((0, 0, 16, 16)).tobytes() == last.crop((16, 0, 32, 16)).tobytes() == images[0].crop(
        (0, 0, 16, 16)).tobytes()
    for bad, words in (("--s 0 --beta 0.5", "no effect"), ("--s 2", "0 <= s < 1"), ("--steps 1", "take more steps")):
        with pytest.raises(ValueError, match=words):
            command(*argv[:2], *bad.split())
