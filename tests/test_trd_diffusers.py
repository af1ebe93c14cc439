"""variants/trd_diffusers.py: on pipelines of diffusers, of random weights and a few channels, its sampler makes what
their own schedulers make of the same steps; on a small UNet2DModel that is trained here, in seconds, the search beats
the default spacing."""
import copy
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
from test_postdiff_diffusers import distance, randn, tiny  # noqa: E402, which puts variants/ into sys.path
import diffusers  # noqa: E402
import c2f_trd as c2f  # noqa: E402
import trd_diffusers as trd  # noqa: E402
from common import load_images, noise_for, to_float  # noqa: E402

TAUS = [999, 700, 640, 333, 120, 20]
DDIM = dict(clip_sample=False, thresholding=False, set_alpha_to_one=True)
SCHEDULERS = {"2M": diffusers.DPMSolverMultistepScheduler,
              "2M, flags": lambda: diffusers.DPMSolverMultistepScheduler(
                  euler_at_final=True, lower_order_final=False, timestep_spacing="trailing"),
              "2M, zero SNR": lambda: diffusers.DPMSolverMultistepScheduler(rescale_betas_zero_snr=True),
              "order 1": lambda: diffusers.DPMSolverMultistepScheduler(solver_order=1),
              "Euler": lambda: diffusers.EulerDiscreteScheduler(timestep_spacing="leading"),
              "DDIM": lambda: diffusers.DDIMScheduler(**DDIM)}


def prompted(kind, scheduler="2M", dtype=torch.float32):
    """A pipeline of test_postdiff_diffusers, its two prompts one by one, and the other arguments of its call."""
    case = tiny(kind, dtype)
    case.pipe.scheduler = SCHEDULERS[scheduler]()
    split = {key: v for key, v in case.call.items() if torch.is_tensor(v)}
    prompts = [{key: v[i:i + 1] for key, v in split.items()} for i in range(2)]
    rest = {key: v for key, v in case.call.items() if key not in {
        *split, "num_inference_steps", "output_type", "guidance_scale"}}
    return case, prompts, rest


def unet(**more):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**{**dict(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16,), layers_per_block=1,
        norm_num_groups=4, add_attention=False, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",)), **more})


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def trained():
    """A UNet2DModel of Fashion-MNIST at 8x8 that predicts v, trained for seconds."""
    x, _, _ = load_images("fashion10k")
    x, net = F.avg_pool2d(to_float(x[:2000]), 4), unet()
    alpha_bar = c2f.linear_alpha_bar(c2f.T)
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
    for _ in range(100):
        t, eps, x0 = torch.randint(0, c2f.T, (32,)), torch.randn(32, 1, 8, 8), x[torch.randint(0, len(x), (32,))]
        scale, sigma = (v.float()[t].view(-1, 1, 1, 1) for v in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
        loss = (net(scale * x0 + sigma * eps, t).sample - (scale * eps - sigma * x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


# ---- The sampler ------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, scheduler, w", [
    *(("sd", scheduler, 4.0) for scheduler in SCHEDULERS), ("sdxl", "2M", 4.0), ("sdxl", "Euler", 4.0),
    ("pixart", "2M", 4.0), ("pixart", "DDIM", 4.0), ("sd", "2M", 1.0), ("pixart", "Euler", 1.0)])
def test_equal_to_the_pipeline(kind, scheduler, w):
    """The samples of a call with these steps. In float64, since random networks blow up Euler's rounding."""
    case, prompts, rest = prompted(kind, scheduler, torch.float64)
    order, alpha_bar = trd.order_of(case.pipe.scheduler), trd.alpha_bar_of(case.pipe.scheduler)
    assert order == (2 if "2M" in scheduler else 1) and alpha_bar.shape == (1001,) and alpha_bar[-1] == 1
    eps_model_for, shape = trd.eps_model_of(case.pipe, prompts, w, batch=1, **rest)
    noise = noise_for([3, 4], shape).double()
    assert shape == (4, 8, 16)
    with torch.no_grad():
        ours = c2f.dpm_solver_pp_sample(eps_model_for([0, 1]), noise.double(), TAUS, alpha_bar, order)
    if scheduler == "DDIM":
        case.pipe.scheduler = trd.with_timesteps(case.pipe.scheduler, TAUS)
    theirs = case.run(timesteps=TAUS, guidance_scale=w, latents=noise)
    assert distance(ours, theirs) < 1e-5 and float(theirs.std()) > 0.1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scheduler", ["2M", "2M, zero SNR", "order 1", "DDIM"])
def test_pipelines_without_text(trained, scheduler, prediction):
    """DDPMPipeline, and DDIMPipeline with its own scheduler, whose calls have no timesteps=."""
    plain = type(SCHEDULERS[scheduler]())
    sampler = plain.from_config(SCHEDULERS[scheduler]().config, prediction_type=prediction)
    pipe = (diffusers.DDIMPipeline if scheduler == "DDIM" else diffusers.DDPMPipeline)(trained, sampler)
    eps_model_for, shape = trd.eps_model_of(quiet(pipe))
    with torch.no_grad():
        ours = c2f.dpm_solver_pp_sample(eps_model_for([0, 1]), noise_for([0, 1], shape).double(), TAUS,
                                        trd.alpha_bar_of(sampler), trd.order_of(sampler))
    pipe.scheduler = trd.with_timesteps(sampler, TAUS)
    assert type(pipe.scheduler).__name__ == plain.__name__ and isinstance(pipe.scheduler, plain)
    generator = [torch.Generator().manual_seed(i) for i in range(2)]
    theirs = pipe(batch_size=2, generator=generator, num_inference_steps=50, output_type="np").images
    ours = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert distance(ours, torch.from_numpy(theirs)) < 1e-4 and theirs.std() > 0.01


def test_many_steps():
    """From 15 steps on DPMSolverMultistepScheduler treats its last ones differently, but not on the way to sigma 0."""
    case, prompts, rest = prompted("sd", "2M, flags", torch.float64)
    taus, eps_model_for = c2f.uniform_steps(990, 16), trd.eps_model_of(case.pipe, prompts, 4.0, **rest)[0]
    noise = noise_for([0, 1], (4, 8, 16)).double()
    with torch.no_grad():
        ours = c2f.dpm_solver_pp_sample(eps_model_for([0, 1]), noise, taus, trd.alpha_bar_of(case.pipe.scheduler))
    assert distance(ours, case.run(timesteps=taus, latents=noise)) < 1e-4


@pytest.mark.parametrize("kind", ["sd", "sdxl", "pixart"])
def test_guidance(kind):
    """eps_hat is what the pipeline hands to its scheduler; each sample has its own prompt, whatever the batch."""
    case, prompts, rest = prompted(kind)
    seen, step = [], case.pipe.scheduler.step
    case.pipe.scheduler.step = lambda eps, t, xt, **kwargs: (seen.append((eps, t, xt)), step(eps, t, xt, **kwargs))[1]
    case.run(num_inference_steps=2)
    del case.pipe.scheduler.step
    for batch in (3, 8):
        eps_model_for, _ = trd.eps_model_of(case.pipe, prompts, 4.0, batch, **rest)
        for eps, t, xt in seen:
            with torch.no_grad():
                two = eps_model_for([0, 1])(xt.double(), t.repeat(2))
                four = eps_model_for([3, 2])(torch.cat([xt, xt]).flip(0).double(), t.repeat(4))     # 3 has prompt 1
            assert two.dtype == torch.float64 and distance(two, eps) < 1e-4
            assert distance(four, torch.cat([eps, eps]).flip(0)) < 1e-4
    assert distance(two.flip(0), two) > 1e-2                                   # they differ
    plain = trd.eps_model_of(case.pipe, prompts, 1.0, **rest)[0]([0, 1])
    with torch.no_grad():
        assert distance(plain(xt.double(), t.repeat(2)), eps) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(dtype):
    """The network gets its own type, the search goes on in float64."""
    case, prompts, rest = prompted("sdxl", "Euler", dtype)
    eps_model_for, shape = trd.eps_model_of(case.pipe, prompts, 4.0, **rest)
    types = []
    with case.network.register_forward_pre_hook(lambda m, args, kw: types.append(args[0].dtype), with_kwargs=True):
        eps_hat = eps_model_for([0, 1])(noise_for([0, 1], shape).double(), torch.tensor([500, 20]))
    assert types == [dtype] and eps_hat.dtype == torch.float64 and eps_hat.isfinite().all()


# ---- The search -------------------------------------------------------------------------------
@pytest.mark.parametrize("scheduler", ["DDIM", "2M"])
def test_beats_the_default_spacing(trained, scheduler, tmp_path):
    """On noise that the search has not seen; and so it is in diffusers' own loop. The plan as JSON, the pipeline as it
    was, the network's evaluations as counted."""
    sampler = type(SCHEDULERS[scheduler]()).from_config(SCHEDULERS[scheduler]().config, prediction_type="v_prediction")
    pipe = diffusers.DDIMPipeline(trained, sampler) if scheduler == "DDIM" else diffusers.DDPMPipeline(trained, sampler)
    before, sampler, count = dict(vars(pipe)), pipe.scheduler, []
    config, steps = dict(sampler.config), sampler.timesteps.clone()
    with trained.register_forward_pre_hook(lambda m, args: count.append(len(args[0]))):
        plan = trd.search_timesteps(pipe, 5, batch=80, reference_steps=30, out=tmp_path / "new" / "plan.json")
    assert json.loads((tmp_path / "new" / "plan.json").read_text()) == plan
    assert vars(pipe) == before and dict(sampler.config) == config and torch.equal(sampler.timesteps, steps)
    assert not trained._forward_pre_hooks
    taus, loss, other = plan["timesteps"], plan["loss"], plan["held_out"]
    assert len(taus) == 5 and all(a > b for a, b in zip([1000, *taus], [*taus, -1]))
    assert loss["after"] <= loss["start"] <= loss["default"] and other["after"] < 0.9 * other["default"], plan
    assert plan["sweeps"][-2] == plan["sweeps"][-1] == loss["after"] and loss["start"] == plan["sweeps"][0]
    assert sum(count) == 16 * (plan["evaluations"]["all"] + 30 + 3 * 5)        # and of those that are held out
    noise = noise_for(range(c2f.CALIBRATION_SEED + 16, c2f.CALIBRATION_SEED + 32), (1, 8, 8))

    def sample(sampler, number):
        sampler.set_timesteps(number)
        xt = noise
        with torch.no_grad():
            for t in sampler.timesteps:
                xt = sampler.step(trained(xt, t).sample, t, xt).prev_sample
        return xt

    reference = sample(trd.with_timesteps(diffusers.DDIMScheduler(**DDIM, prediction_type="v_prediction"),
                                          c2f.uniform_steps(999, 30)), 30)
    errors = [float((sample(s, 5) - reference).square().mean())
              for s in (copy.deepcopy(sampler), trd.with_timesteps(sampler, taus))]
    assert errors == pytest.approx([other["default"], other["after"]], rel=1e-3)


def test_text(capsys):
    """A search with prompts and guidance; Euler, whose steps are DDIM's; what is called through the pipeline again."""
    case, prompts, rest = prompted("sd", "Euler")
    own, first = case.pipe.scheduler, case.run()
    plan = trd.search_timesteps(case.pipe, 3, prompts, 4.0, 2, 6, "default", 0, 20, **rest)
    assert plan["held_out"] == {} and plan["solver"] == "ddim" and plan["guidance_scale"] == 4.0
    assert plan["loss"]["after"] <= plan["loss"]["default"] and plan["pipeline"] == "StableDiffusionPipeline"
    assert case.pipe.scheduler is own and torch.equal(case.run(), first) and not case.network._forward_pre_hooks
    assert case.pipe._progress_bar_config == dict(disable=True)
    assert case.run(timesteps=plan["timesteps"]).isfinite().all()
    assert f"timesteps={plan['timesteps']}" in trd.describe(plan)
    listed = trd.search_timesteps(case.pipe, 3, prompts, 4.0, 2, 6, plan["timesteps"], 1, 20, **rest)
    assert listed["start"] == listed["timesteps"] == plan["timesteps"]         # nothing is left to find
    assert listed["loss"]["start"] == pytest.approx(plan["loss"]["after"])


def test_starts():
    sampler = SCHEDULERS["2M"]()
    assert trd.starting_steps("default", sampler, 5) == [[999, 799, 599, 400, 200]]
    assert trd.starting_steps("inclusive", sampler, 5) == [c2f.uniform_steps(999, 5)]
    assert trd.starting_steps("exclusive", sampler, 5) == [c2f.uniform_steps(999, 5, 1)]
    assert trd.starting_steps("best", sampler, 5) == [
        *(c2f.uniform_steps(999, 5, power) for power in c2f.BEST_OF), [999, 799, 599, 400, 200]]
    ays = diffusers.schedulers.AysSchedules["StableDiffusionTimesteps"]
    assert trd.starting_steps(ays, sampler, 10) == [ays]
    for start, words in (("x", "best, inclusive"), ([5, 4], "2 steps, not 3"), ([5, 5, 1], "must fall"),
                         ([1000, 5, 1], "999 .. 0")):
        with pytest.raises(ValueError, match=words):
            trd.starting_steps(start, sampler, 3)


# ---- What does not fit ------------------------------------------------------------------------
def test_refusals():
    case, prompts, rest = prompted("sd")
    plain = quiet(diffusers.DDPMPipeline(unet(), SCHEDULERS["2M"]()))
    flow = SimpleNamespace(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    for pipe, arguments, words in (
            (plain, dict(steps=1), "steps 1: a whole number, at least 2"),
            (plain, dict(steps=2.5), "steps 2.5: a whole number"),
            (plain, dict(steps=3, calibration=0), "calibration 0: .* at least 1"),
            (plain, dict(steps=3, held_out=-1), "held_out -1: .* at least 0"),
            (plain, dict(steps=3, batch=0), "batch 0: at least 1"),
            (plain, dict(steps=3, reference_steps=3), "reference_steps 3: more than 3, at most 1000"),
            (plain, dict(steps=3, reference_steps=1001), "at most 1000"),
            (plain, dict(steps=3, prompts=["a"]), "takes no prompts"),
            (plain, dict(steps=3, guidance_scale=2.0), "takes no prompts, guidance_scale"),
            (plain, dict(steps=3, height=8), r"\['height'\]"),
            (case.pipe, dict(steps=3), r'StableDiffusionPipeline makes images of texts: give prompts=\["a fox"'),
            (case.pipe, dict(steps=3, prompts="a fox"), "give prompts="),
            (case.pipe, dict(steps=3, prompts=prompts, guidance_rescale=0.5), "guidance_rescale: not in a search"),
            (tiny("lcm").pipe, dict(steps=3, prompts=prompts), "LCMScheduler as set is no DDIM or DPM-Solver"),
            (diffusers.DDPMPipeline(unet(), SCHEDULERS["Euler"]()), dict(steps=3), "DDPMPipeline fits no Euler"),
            (flow, dict(steps=3), "FlowMatchEulerDiscreteScheduler has no alphas_cumprod: for flows take trd_flow.py")):
        with pytest.raises(ValueError, match=words) as error:
            trd.search_timesteps(pipe, **arguments)
        assert "\n" not in str(error.value)
    two = {key: torch.cat([p[key] for p in prompts]) for key in prompts[0]}
    with pytest.raises(ValueError, match="one image each"):
        trd.eps_model_of(case.pipe, [two], 1.0, **{**rest, "height": 16})
    other = type("OtherPipeline", (), dict(scheduler=SCHEDULERS["2M"]()))()
    with pytest.raises(ValueError, match="TRD knows DDPMPipeline, .*, not OtherPipeline"):
        trd.eps_model_of(other)
    with pytest.raises(ValueError, match="must fall"):
        trd.with_timesteps(SCHEDULERS["2M"](), [5, 7])
    with pytest.raises(ValueError, match=r"takes the steps \[7, 5\]"):
        trd.with_timesteps(SCHEDULERS["2M"](), [7, 5]).set_timesteps(timesteps=[8, 5])


BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")         # Stable Diffusion's


@pytest.mark.parametrize("name, options", [
    ("PNDM", {}), ("DDIM", dict(set_alpha_to_one=False)), ("DDIM", dict(**DDIM, rescale_betas_zero_snr=True)),
    ("DDPM", {}), ("LCM", {}), ("UniPCMultistep", dict(use_karras_sigmas=True)), ("EulerAncestralDiscrete", {}),
    ("EulerDiscrete", dict(use_karras_sigmas=True, timestep_spacing="trailing")), ("HeunDiscrete", {}),
    ("DPMSolverMultistep", dict(solver_order=3, use_lu_lambdas=True, final_sigmas_type="sigma_min")),
    ("DPMSolverMultistep", dict(algorithm_type="sde-dpmsolver++", solver_type="heun", thresholding=True))])
def test_the_line_mends_it(name, options):
    """And keeps the noise schedule."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(**BETAS, **options)
    pipe = SimpleNamespace(scheduler=scheduler)
    with pytest.raises(ValueError) as error:
        trd.order_of(pipe.scheduler)
    line = str(error.value).rpartition(": pipe.scheduler = ")[2]
    exec(f"pipe.scheduler = diffusers.{line}", dict(pipe=pipe, diffusers=diffusers))
    assert trd.order_of(pipe.scheduler) in (1, 2) and trd.alpha_bar_of(pipe.scheduler)[:-1].min() > 0
    assert torch.allclose(pipe.scheduler.alphas_cumprod[:-1], scheduler.alphas_cumprod[:-1], atol=1e-6)


def test_as_it_was_after_a_failure():
    case, prompts, rest = prompted("sd")
    own = case.pipe.scheduler
    with pytest.raises(ValueError):
        trd.eps_model_of(case.pipe, prompts, 4.0, **{**rest, "height": 15})
    assert case.pipe.scheduler is own and not case.network._forward_pre_hooks
    assert case.pipe._progress_bar_config == dict(disable=True)


def test_not_finite():
    net = unet()
    net.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite: load it in another dtype"):
        trd.search_timesteps(diffusers.DDPMPipeline(net, SCHEDULERS["2M"]()), 3, reference_steps=4)


def test_command(tmp_path, monkeypatch, capsys):
    """Prompts become embeddings by the pipeline; an unfit scheduler is replaced, and the command says so."""
    case = tiny("sd")
    case.pipe.scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
    monkeypatch.setattr(case.pipe, "encode_prompt", lambda prompt, *args, **kwargs: (
        randn(1, 7, 12, seed=len(prompt)), randn(1, 7, 12)), raising=False)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: case.pipe)
    monkeypatch.setattr(trd.search_timesteps.__wrapped__, "__defaults__", (None, None, 1, 6, "default", 1, 8, 0, None))
    argv = ["trd_diffusers.py", "x", "--prompt", "cat", "red heart", "--steps", 3, "--guidance", 3.5, "--out"]
    monkeypatch.setattr(sys, "argv", list(map(str, [*argv, tmp_path / "plan.json"])))
    trd.main()
    out, plan = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert "will be used: DPMSolverMultistepScheduler, {}" in out and f"timesteps={plan['timesteps']}" in out
    assert plan["guidance_scale"] == 3.5 and len(plan["timesteps"]) == 3 and plan["solver"] == "dpm2"


@pytest.mark.parametrize("name", ["trd_ddim", "trd_dpm2"])
def test_experiment(name, tmp_path, monkeypatch, capsys):
    """Each table of the page is an experiment's; on a random network every row is there, with the search's own loss."""
    folder = Path(__file__).resolve().parent.parent / "results" / "for_diffusers"
    spec = importlib.util.spec_from_file_location("experiments_of_diffusers", folder / "experiments.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert re.findall(r"<!-- table: (\w+) -->", (folder / "README.md").read_text()) == [
        f.__name__ for f in module.FUNCTIONS]
    config = dict(channels=1, res=8, ch=8, mult=[1], blocks=1, attention=[], patch=2, low=0)
    torch.manual_seed(0)
    monkeypatch.setattr(module, "opened", lambda *args: (None, c2f.build_net(config).eval(), config, None, None))
    for key, value in dict(ROOT=tmp_path, STEPS=(10,), HELD_OUT=1).items():
        monkeypatch.setattr(module, key, value)
    for key, value in dict(CALIBRATION=1, REFERENCE_STEPS=12).items():
        monkeypatch.setattr(c2f, key, value)
    monkeypatch.setattr(c2f.trd_search.__wrapped__, "__defaults__", (1, None, 2, 1))
    monkeypatch.setattr(trd.search_timesteps.__wrapped__, "__defaults__", (
        None, None, 1, 12, "default", 0, 9, c2f.CALIBRATION_SEED, None))
    search, found = trd.search_timesteps, []
    monkeypatch.setattr(trd, "search_timesteps", lambda *args, **kw: (found.append(search(*args, **kw)), *found)[1])
    getattr(module, name)()
    rows = [json.loads(line) for line in (tmp_path / "results/for_diffusers/results.jsonl").read_text().splitlines()]
    assert [row["arm"].partition(": ")[2] for row in rows] == [
        "default", "trailing", "Karras", "AYS, SD's", "AYS, SDXL's", "where TRD starts", "TRD"]
    loss = [row["cells"]["loss on the search's 1"] for row in rows]
    assert loss[-2:] == pytest.approx([found[0]["loss"]["start"], found[0]["loss"]["after"]], rel=1e-3)
    assert rows[-1]["cells"]["time steps"] == " ".join(map(str, found[0]["timesteps"]))
    assert all(len(row["cells"]["time steps"].split()) == 10 for row in rows) and len(set(loss)) > 4
