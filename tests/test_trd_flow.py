"""variants/trd_flow.py: on a tiny StableDiffusion3Pipeline and FluxPipeline of random weights its sampler makes what
their own scheduler makes of the same noise levels, whatever the shift; the search brings them closer to many steps."""
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")
from test_postdiff_diffusers import distance, randn, tiny  # noqa: E402, which puts variants/ into sys.path
import diffusers  # noqa: E402
import trd_flow as flow  # noqa: E402
from common import noise_for  # noqa: E402

EULER = diffusers.FlowMatchEulerDiscreteScheduler
TAUS = [9999, 9500, 7000, 4400, 900]


def flux(dtype=torch.float64):
    """A FluxPipeline without text encoders: case.pipe, case.run(**options) -> packed latents (2, 8, 16), case.call."""
    torch.manual_seed(0)
    network = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=(4, 6, 6))
    pipe = diffusers.FluxPipeline(scheduler=EULER(use_dynamic_shifting=True), vae=None, text_encoder=None,
                                  tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=network)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(dtype=dtype)
    call = dict(prompt_embeds=randn(2, 7, 12).to(dtype), pooled_prompt_embeds=randn(2, 12, seed=2).to(dtype),
                height=32, width=64, guidance_scale=3.0)
    return SimpleNamespace(pipe=pipe, call=call, run=lambda **options: pipe(
        **{**call, "output_type": "latent", **options}).images)


def prompted(kind, dtype=torch.float64):
    """The pipeline, a call of it, its two prompts one by one, the other arguments of a search."""
    case = flux(dtype) if kind == "flux" else tiny("sd3", dtype)
    if kind == "sd3, shift 1":
        case.pipe.scheduler = EULER(shift=1.0)
    split = {key: v for key, v in case.call.items() if torch.is_tensor(v)}
    prompts = [{key: v[i:i + 1] for key, v in split.items()} for i in range(2)]
    return case, prompts, {key: case.call[key] for key in ("height", "width")}


@pytest.mark.parametrize("kind, w", [("sd3", 4.0), ("sd3, shift 1", 4.0), ("sd3", 1.0), ("flux", 3.0)])
def test_equal_to_the_pipeline(kind, w):
    """A call with sigmas=; each sample has its own prompt. The first level, 1, is 1 - 1e-6 here."""
    case, prompts, rest = prompted(kind)
    eps_model_for, shape, k = flow.eps_model_of(case.pipe, prompts, w, 3, **rest)
    noise = noise_for([3, 4], shape).double()
    with torch.no_grad():
        ours = flow.script.dpm_solver_pp_sample(eps_model_for([0, 1]), noise, TAUS, flow.alpha_bar_of(k), 1)
        swapped = flow.script.dpm_solver_pp_sample(eps_model_for([1, 2]), noise.flip(0), TAUS, flow.alpha_bar_of(k), 1)
    theirs = case.run(sigmas=[(t + 1) / flow.T for t in TAUS], num_inference_steps=5, guidance_scale=w,
                      latents=noise.view(2, *shape[-2:]) if kind == "flux" else noise)
    assert distance(ours.view_as(theirs), theirs) < 2e-5 and float((theirs - noise.view_as(theirs)).std()) > 0.01
    assert torch.allclose(swapped.flip(0), ours, atol=1e-6)
    assert k == pytest.approx({"sd3": 3.0, "sd3, shift 1": 1.0}[kind]) if kind != "flux" else k > 1


@pytest.mark.parametrize("kind", ["sd3", "sd3, shift 1", "flux"])
def test_search(kind, tmp_path):
    """Closer to many steps than the pipeline's own levels, in the pipeline's own loop, too; which it takes by default;
    it begins with sigma 1; the plan as JSON; the pipeline as it was."""
    case, prompts, rest = prompted(kind)
    own, first = case.pipe.scheduler, case.run(num_inference_steps=4, generator=torch.Generator().manual_seed(0))
    for v in case.pipe.transformer.parameters():               # or the way from noise to data would be straight
        v.data *= 1.5
    plan = flow.search_sigmas(case.pipe, 4, prompts, case.call["guidance_scale"], 4, 40, 2, out=tmp_path / "p.json",
                              **rest)
    for v in case.pipe.transformer.parameters():
        v.data /= 1.5
    assert json.loads((tmp_path / "p.json").read_text()) == plan
    assert case.pipe.scheduler is own and not case.pipe.transformer._forward_pre_hooks
    again = case.run(num_inference_steps=4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(first, again)
    sigmas, loss = plan["sigmas"], plan["loss"]
    assert sigmas[0] == 1 and all(a > b for a, b in zip(sigmas, [*sigmas[1:], 0])) and len(sigmas) == 4
    assert loss["after"] < loss["start"] <= loss["default"] and set(plan["held_out"]) == {"default", "start", "after"}
    assert plan["sweeps"][0] == loss["start"] and plan["sweeps"][-1] == loss["after"]
    case.run(num_inference_steps=4)
    taken = case.pipe.scheduler.sigmas[:-1].double()
    k = plan["shift"]
    assert torch.allclose(flow.shifted(torch.tensor(plan["default"], dtype=torch.float64), k), taken, atol=2e-4)


def test_dtype():
    case, prompts, rest = prompted("sd3", torch.bfloat16)
    eps_model_for, shape, _ = flow.eps_model_of(case.pipe, prompts, 4.0, **rest)
    types = []
    with case.pipe.transformer.register_forward_pre_hook(
            lambda m, args, kw: types.append(kw["hidden_states"].dtype), with_kwargs=True):
        eps_hat = eps_model_for([0, 1])(noise_for([0, 1], shape).double(), torch.tensor([9999, 20]))
    assert types == [torch.bfloat16] and eps_hat.dtype == torch.float64 and eps_hat.isfinite().all()


def test_refusals():
    case, prompts, rest = prompted("sd3")
    karras = prompted("sd3")[0].pipe
    karras.scheduler = EULER(use_karras_sigmas=True)
    for pipe, arguments, words in (
            (case.pipe, dict(steps=1), "steps 1: a whole number, at least 2"),
            (case.pipe, dict(steps=3, reference_steps=3), "reference_steps 3: more than 3"),
            (case.pipe, dict(steps=3, batch=0), "batch 0: at least 1"),
            (case.pipe, dict(steps=3, prompts=None), 'give prompts=\\["a fox"'),
            (case.pipe, dict(steps=3, prompts="a fox"), "give prompts="),
            (case.pipe, dict(steps=3, sigmas=[1.0]), "sigmas: not in a search"),
            (karras, dict(steps=3), "use_karras_sigmas=None"),
            (tiny("sd").pipe, dict(steps=3), "trd_diffusers.py others: not StableDiffusionPipeline")):
        with pytest.raises(ValueError, match=words) as error:
            flow.search_sigmas(pipe, **{"prompts": prompts, **arguments}, **rest)
        assert "\n" not in str(error.value)
    two = {key: torch.cat([p[key] for p in prompts]) for key in prompts[0]}
    with pytest.raises(ValueError, match="one image each"):
        flow.eps_model_of(case.pipe, [two], 1.0, **rest)


def test_command(tmp_path, monkeypatch, capsys):
    """The options of trd_diffusers.py reach the search; the sigmas are printed and written."""
    (case, prompts, rest), search = prompted("sd3", torch.float32), flow.search_sigmas
    monkeypatch.setattr(flow, "command", lambda dtype: (SimpleNamespace(
        steps=3, prompt=prompts, guidance=4.0, batch=2, out=tmp_path / "plan.json"), case.pipe))
    monkeypatch.setattr(flow, "search_sigmas", lambda pipe, steps, *args, **options: search(
        pipe, steps, *args, 1, 5, 0, **options, **rest))
    flow.main()
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert len(plan["sigmas"]) == 3 and f"sigmas={plan['sigmas']}" in capsys.readouterr().out
