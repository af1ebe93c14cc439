"""Measure a network of any of the scripts: Frechet distance, inception or caption score, MACs of the executed sampler,
seconds an image.

    python results/evaluate.py c2f_trd                              # the weights, and the plan, that --sample takes
    python results/evaluate.py c2f_trd --checkpoint runs/base/checkpoint.pt --method base --solver ddim --steps 100
    python results/evaluate.py c2f_trd --inception download --n 50000 --seeds 1                   # FID
    python results/evaluate.py c2f_trd --speed --against "weights/c2f_trd/base.pt --method base --steps 100"

SCRIPT, or a file of variants/, comes first. Beside the options below it takes the script's own of the groups run and
method (python SCRIPT.py --help). Image i of seed s comes from seed s n + i. Every seed's line is printed, then appended
to runs/SCRIPT/results.jsonl. Sampling is in fp32 (on CUDA without TF32) unless --precision bf16 is given.
"""
import argparse
import contextlib
import importlib
import json
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "results")) if p not in sys.path]
from common import (ACTIONS, HERE, caption_score, count_macs, feature_stats, frechet_distance, load_images,  # noqa: E402
                    parse_config, run_main, sha256_of, start_device)
from inception import class_distances, class_logits, features_of, get_extractor, inception_score             # noqa: E402

SPEED_BATCH, SPEED_RUNS = 64, 9        # images at a time, timed runs of either sampler
SHORT = 64                             # longer lists of a configuration (words) stay out of results.jsonl
COUNTED, REFERENCES = {}, {}           # what cost_of and get_reference keep


@contextlib.contextmanager
def full_fp32():
    """fp32 that is fp32: convolutions on CUDA without TF32."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def get_reference(module, config, data, shape, extractor, label):
    """What a network's images, of this shape (C, R, R), are compared with: dict of the features of `data`, their
    statistics, classes y, captions. The images are those that the script trains on: of its load_data, or, where that
    gives other things than images, of its hook reference_images(config)."""
    words = [config[k] for k in sorted(module.CONFIG["training"]) if isinstance(config.get(k), str) and k != "init"]
    key = (module.__name__, *words, data, *shape, label)
    if key not in REFERENCES:
        x = getattr(module, "reference_images", module.load_data)(dict(config, data=data))[0]
        if tuple(x.shape[1:]) != shape:
            raise ValueError(f"--data {data} has images of {list(x.shape[1:])}, the checkpoint was trained on "
                             f"'{config['data']}' and makes {list(shape)}")
        if len(x) <= extractor.width:
            raise ValueError(f"--data {data} has {len(x)} images: FD in {extractor.width} features needs more")
        _, y, captions = load_images(data, shape[-1])
        features, _ = features_of(extractor, x)
        REFERENCES[key] = dict(features=features, stats=feature_stats(features), y=y, captions=captions)
    return REFERENCES[key]


def cost_of(module, config, plan):
    """The script's sampler run for one image on the meta device, with the network built anew there: dict of
    macs_per_image, nfe (evaluations of the network for that image: two in a guided step), nfe_by_res {side:
    evaluations} and the image's shape (C, R, R)."""
    key = json.dumps([module.__name__, {k: v for k, v in config.items() if k != "given"}, plan])
    if key not in COUNTED:
        with torch.device("meta"):
            net = module.build_net(config).eval().requires_grad_(False)
        by_res, images = {}, []

        def count(_, inputs):
            xt = next(v for v in inputs if torch.is_tensor(v) and v.dim() == 4)
            by_res[xt.shape[-1]] = by_res.get(xt.shape[-1], 0) + len(xt)

        net.register_forward_pre_hook(count)
        macs = count_macs(lambda: images.append(
            module.generate(net, dict(config, precision="fp32"), plan, [0], torch.device("meta"))))
        COUNTED[key] = dict(macs_per_image=macs, nfe=sum(by_res.values()), nfe_by_res=by_res,
                            shape=tuple(images[0].shape[1:]))
    return COUNTED[key]


@full_fp32()
def measure_speed(module, ours, against, device):
    """images/s of two samplers that take turns, each (net, config, plan), SPEED_BATCH images at a time: medians, and
    speedup: the median of the ratios of neighbouring runs."""
    def seconds(net, config, plan):
        begun = time.perf_counter()
        module.generate(net, config, plan, range(SPEED_BATCH), device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    times = [[seconds(*ours), seconds(*against)] for _ in range(SPEED_RUNS + 1)][1:]         # the first warms up
    mine, other = map(statistics.median, zip(*times))
    ratios = [b / a for a, b in times]
    return dict(images_per_s=SPEED_BATCH / mine, against_images_per_s=SPEED_BATCH / other,
                speedup=statistics.median(ratios), speedup_range=[min(ratios), max(ratios)], against=dict(
                    checkpoint=short(against[1])["checkpoint"], plan=against[2],
                    macs_per_image=cost_of(module, *against[1:])["macs_per_image"]))


def short(config):
    """A configuration as results.jsonl has it: no actions, no long lists, paths from the repository's folder on."""
    return {k: v.replace(f"{HERE}/", "") if isinstance(v, str) else v for k, v in config.items()
            if k not in (*ACTIONS, "given") and not (isinstance(v, (list, dict)) and len(v) > SHORT)}


def compared_with(config, data=None):
    """What FD compares with: by default fashion10k, held out, for networks of Fashion-MNIST, else their own data."""
    return data or ("fashion10k" if config["data"] in ("fashion", "fashion10k") else config["data"])


@full_fp32()
def measure(module, net, config, plan, n=2000, seed=0, data=None, extractor="small", pool=None, **fields):
    """One line of results.jsonl, a dict: n images of a plan, from the seeds seed n .. seed n + n - 1.

    module: an imported script; net, config: of its load_net (net on any device: features are extracted there, too);
    data: see compared_with.
    extractor: see get_extractor. pool: a list that gets (extractor, reference, features, second outputs). fields: more
    of the line (experiment, arm, ...). Raises ValueError, before sampling, if n or the data do not suit."""
    device, data = next(net.parameters()).device, compared_with(config, data)
    network, label = get_extractor(extractor, data, device)
    least = 2000 if label == "efficientnet-lite0" else network.width + 1
    if n < least:
        raise ValueError(f"--n {n} is too small for FD with the {network.width} features of {label}: at least {least}")
    cost = dict(cost_of(module, config, plan))
    shape, seeds, score = cost.pop("shape"), range(seed * n, seed * n + n), {}
    if extractor == "small" and shape[-1] < 32 * network.patch:
        label = f"{label} of {shape[-1]}x{shape[-1]}"
    reference = get_reference(module, config, data, shape, network, label)
    if device.type == "cuda":                                  # a kernel's first call is no measure of it
        module.generate(net, config, plan, seeds[:250], device)
    begun = time.perf_counter()
    images = module.sample(net, config, plan, seeds, device)
    seconds = time.perf_counter() - begun
    features, second = features_of(network, images)
    if pool is not None:
        pool.append((network, reference, features, second))
    if extractor == "small" and hasattr(module, "captions_of"):
        score["caption_score"] = caption_score(network, second, module.captions_of(config, seeds))
    elif extractor == "small":
        score["inception_score"] = inception_score(class_logits(network, second, reference["captions"]))[0]
    elif label == "inception":
        score["inception_score"] = inception_score(second)[0]
    name = f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else (
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
    return {**dict(
        experiment="evaluate", arm="", method=config.get("method", module.SCRIPT),
        solver=plan.get("solver", getattr(module, "SOLVER", "")), data=data, seed=seed, n=n, extractor=label,
        fd=frechet_distance(feature_stats(features), reference["stats"]), **score, **cost,
        seconds_per_image=seconds / n, device=name, precision=config["precision"], torch=torch.__version__,
        images_seen=config["step"] * config["batch"], weights_sha256=sha256_of(config["checkpoint"]),
        source_sha256=sha256_of(getattr(module, "SOURCE", module.__file__)), config=short(config), plan=plan), **fields}


def append_row(path, row=None):
    """Appends a whole line to results.jsonl, on the disk when this returns; without a row only tries whether it could.
    Raises OSError with one line, which holds the row."""
    line = "" if row is None else json.dumps(row, allow_nan=False) + "\n"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            if line and file.seek(0, 2) and file.seek(-1, 2) >= 0 and file.read() != b"\n":
                line = "\n" + line                             # what a full disk cut off stays alone
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"cannot write --results {path} ({error.strerror}) {line.strip()}".strip()) from None


def load_script(name):
    """The module of a script of this repository, or of a file of variants/."""
    name = Path(name).stem
    for folder in (ROOT, ROOT / "variants"):
        if (folder / f"{name}.py").is_file() and name != "common":
            sys.path[:0] = [str(folder)] * (str(folder) not in sys.path)
            module = importlib.import_module(name)
            script = getattr(module, "script", module)         # a variant's changed copy of its script
            script.SOURCE = module.__file__                    # whose hash the lines have
            return script
    raise ValueError(f"no script '{name}': c2f_trd, lowdiff, multistage, postdiff or a file of variants/ comes first")


def load_all(module, argv):
    """Network, configuration, plan and device of a command line of the script."""
    for action in ACTIONS:
        if f"--{action}" in argv:
            raise ValueError(f"--{action} is for python {module.SCRIPT}.py: here networks are measured")
    config = parse_config(module.SCRIPT, module.CONFIG, module.__doc__, [*argv, "--sample"])
    device = start_device(config["device"])[0]
    net, config = module.load_net(config, device)
    plan = module.make_plan(net, config, device)
    print(f"plan: {module.describe(plan)}")
    return net, config, plan, device


def main(argv=None):
    p = argparse.ArgumentParser("evaluate.py SCRIPT", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)

    def fail(message):
        raise ValueError(f"{message} (python results/evaluate.py --help)")

    p.error = fail
    p.add_argument("--n", type=int, default=2000, help="images of a seed [2000]")
    p.add_argument("--seeds", type=int, default=3, help="lines: seeds --seed, --seed + 1, ... [3]")
    p.add_argument("--data", help="what FD compares with [fashion10k for Fashion-MNIST, else what was trained on]")
    p.add_argument("--inception", metavar="PATH", help="FID's weights: a file, or download")
    p.add_argument("--extractor", choices=["small", "efficientnet-lite0"], help="features of FD [small]")
    p.add_argument("--per-class", action="store_true", help="one more line: FD class by class")
    p.add_argument("--speed", action="store_true", help="images/s in turn with --against")
    p.add_argument("--against", metavar="TEXT", help="the off switch: a checkpoint and options of the script")
    p.add_argument("--experiment", default="evaluate", help="name of the measurement in the line [evaluate]")
    p.add_argument("--arm", default="", help="name of the arm in the line")
    p.add_argument("--results", help="file of the lines [runs/SCRIPT/results.jsonl]")
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0].startswith("-"):
        p.parse_args(argv)                                     # --help
        fail("name the script first")
    module = load_script(argv[0])
    args, rest = p.parse_known_args(argv[1:])
    extractor = args.extractor or "small"
    if args.inception:
        extractor = "inception" + ("" if args.inception == "download" else f":{args.inception}")
    for wrong, message in (
            (args.inception and args.extractor, "--inception is an extractor itself: leave --extractor out"),
            (args.per_class and extractor != "small", "--per-class needs the small extractor, which knows the classes"),
            (args.speed != bool(args.against), "--speed and --against TEXT go together"),
            (min(args.seeds, args.n) < 1, "--seeds and --n must be at least 1"),
            ("LOCAL_RANK" in os.environ, "measuring is the work of one process: start it without torchrun")):
        if wrong:
            fail(message)
    if args.inception and args.n < 50_000:
        print(f"warning: FID is defined with 50,000 images; --n {args.n} gives a larger value", file=sys.stderr)
    results = args.results or ROOT / "runs" / module.SCRIPT / "results.jsonl"
    append_row(results)
    net, config, plan, device = load_all(module, rest)
    fields, pool = dict(experiment=args.experiment, arm=args.arm), []
    if args.speed:
        words = shlex.split(args.against)
        words[:0] = [] if words[0].startswith("-") else ["--checkpoint"]
        fields.update(measure_speed(module, (net, config, plan), load_all(module, words)[:3], device))
        print(f"{fields['images_per_s']:.1f} images/s, {fields['speedup']:.2f} times --against")
    for seed in range(config["seed"], config["seed"] + args.seeds):
        row = measure(module, net, config, plan, args.n, seed, args.data, extractor, pool, **fields)
        score = [f", {k.replace('_', ' ')} {row[k]:.4f}" for k in ("inception_score", "caption_score") if k in row]
        print(f"seed {seed}: FD[{row['extractor']}]@{args.n} {row['fd']:.3f}{''.join(score)}, {row['nfe']} passes, "
              f"{row['macs_per_image'] / 1e6:,.0f} MMACs and {row['seconds_per_image']:.4f} s an image", flush=True)
        append_row(results, row)
    if args.per_class:
        (network, reference, *_), parts = pool[0], [torch.cat(part) for part in list(zip(*pool))[2:]]
        row.update(experiment="per class", seed=config["seed"], n=len(parts[0]), fd=frechet_distance(
            feature_stats(parts[0]), reference["stats"]), classes=class_distances(network, reference, *parts))
        for c in row["classes"]:
            print(f"{c['caption']}: {c['n']} images, FD {'-' if c['fd'] is None else format(c['fd'], '.3f')}")
        append_row(results, row)
    print(f"lines in {results}")


if __name__ == "__main__":
    run_main(main, "evaluate")
