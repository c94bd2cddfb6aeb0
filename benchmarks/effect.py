"""Does LPL make better pictures? The experiment, stage by stage; each stage can be interrupted and started again.

    python benchmarks/effect.py --work WORK data                                   # the pictures, split by concept
    python benchmarks/effect.py --work WORK pipelines --base epsilon               # of the averages of a base model
    python benchmarks/effect.py --work WORK judge-base --base epsilon
    python benchmarks/effect.py --work WORK profile --base epsilon                 # of the loss over noise levels
    python benchmarks/effect.py --work WORK train --base epsilon --arm none decoder-full --seed 0
    python benchmarks/effect.py --work WORK judge --base epsilon --arm none decoder-full --seed 0
    python benchmarks/effect.py --work WORK gain --base epsilon --seed 0           # *none*, estimates scaled
    python benchmarks/effect.py --work WORK judge --base epsilon --arm none gain --seed 0
    python benchmarks/effect.py --work WORK copies --base epsilon --arm none decoder-full --seed 1    # new pictures?
    python benchmarks/effect.py --work WORK report --base epsilon --arm none decoder-full --seed 1    # a page
    python benchmarks/effect.py --work WORK reconstructions                        # what the decoders lose
    python benchmarks/effect.py --work WORK autoencoder                            # an adversarial decoder
    python benchmarks/effect.py --work WORK train --base epsilon --arm none l1 --steps 400
    python benchmarks/effect.py --work WORK one-step --base epsilon --arm none l1 --steps 400
    python benchmarks/effect.py --work WORK cost --base epsilon --arm none decoder # alone on the machine
    python benchmarks/effect.py --work WORK state                                  # what is done

WORK holds pictures, models and reports. `benchmarks/results/` gets one JSON file per stage with the command, the
commit, the device and the date. Base models come from `pretrain/` with --hold_out (see `docs/effect-progress.md`);
their folders are WORK/epsilon, WORK/v_prediction and WORK/flow.

An arm is a fine-tuning of 1,000 steps through the training scripts; `effect_arms.py` lists them. All arms of a base
and a seed see the same pictures, noise and timesteps in the same order.
"""

import argparse
import csv
import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.effect_arms import (
    ALL,
    BASELINES,
    BASES,
    COMMON,
    FAMILY_FLAGS,
    FINALIST,
    SCRIPTS,
    STARTS,
    TWINS,
    options_of,
)
from benchmarks.effect_judge import JUDGE, SAMPLES, SAMPLING_STEPS, judge, judge_copies, make_reconstructions, sample
from benchmarks.records import facts
from pretrain.emoji_images import DOMAINS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KEPT = {"epsilon": ROOT / "examples" / "tiny-sdxl", "flow": ROOT / "examples" / "tiny-sd3"}  # bases, fully trained
KEPT_AVERAGES = ROOT / "benchmarks" / "bases"  # BASE/average-STEPS.safetensors in float16, where no pipeline is kept
STEPS, DECODER_STEPS = 1000, 3000  # training steps of an arm and of a decoder
STAGES = ("data", "pipelines", "judge-base", "profile", "train", "gain", "judge", "copies", "report", "one-step",
          "reconstructions", "autoencoder", "cost", "state")  # fmt: skip
AUTOENCODERS = {"sdxl": ROOT / "examples" / "tiny-sdxl" / "vae", "sd3": ROOT / "examples" / "tiny-sd3" / "vae"}


# ---------------------------------------------------------------------------------------------------------------------
# Bookkeeping


def run(words, log):
    """Run a command from the repository's root; its output goes to a file, which SystemExit names if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        print("$", shlex.join(map(str, words)), file=file, flush=True)
        status = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, stdout=file, stderr=file).returncode
    if status:
        raise SystemExit(f"the command ended with status {status}; its output: {log}")


def keep_result(work, name, seconds, content):
    """Write benchmarks/results/NAME.json; seconds: the stage's time, beside whatever else ran. The file says WORK for
    the work folder."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(facts(seconds) | content, indent=1).replace(str(work), "WORK")
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(f"wrote {RESULTS / name}.json")


def family_of(start):
    """ "sdxl" or "sd3". start: such as epsilon-009000."""
    return BASES[start.rpartition("-")[0]]


def pipeline_of(work, start):
    """The pipeline from which arms start: of the average of a base after so many steps."""
    base, _, steps = start.rpartition("-")
    folder = work / base / "pipelines" / steps
    if not folder.is_dir():
        raise SystemExit(f"{folder} is missing: run the stage pipelines first")
    return folder


def arm_name(arm, seed, steps):
    """Of folders and results."""
    return f"{arm}-{seed}" + (f"-{steps}-steps" if steps != STEPS else "")


def arm_folder(work, start, arm, seed, steps=STEPS):
    """The output folder of an arm."""
    return work / "arms" / start / arm_name(arm, seed, steps)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and base models


def pictures_of(work, domain):
    """Pictures of 64 px, uint8 (N, 64, 64, 3), of all kinds; their captions; masks (N,) of a domain's training and
    held-out pictures."""
    from pretrain.emoji_images import held_out, in_domain, load_emoji

    images, captions = load_emoji(work / "pictures", 64)
    inside, hidden = in_domain(work / "pictures", captions, domain), held_out(captions)
    return images, captions, (inside & ~hidden, inside & hidden)


def make_data(work, domain):
    """WORK/train and WORK/held_out: a domain's pictures of 64 px, named by number, with captions."""
    from PIL import Image

    images, captions, masks = pictures_of(work, domain)
    counts = {}
    for name, mask in zip(("train", "held_out"), masks, strict=True):
        folder, part = work / name, [index for index, chosen in enumerate(mask) if chosen]
        counts[name] = len(part)
        if (folder / "metadata.csv").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for index in part:
            Image.fromarray(images[index]).save(folder / f"{index:04}.png")
        with open(folder / "metadata.csv", "w", newline="") as file:  # last: a started stage has none
            csv.writer(file).writerows([("file_name", "text"), *((f"{i:04}.png", captions[i]) for i in part)])
    print(", ".join(f"{count:,} pictures in {work / name}" for name, count in counts.items()))


def averages_of(work, base):
    """{steps: file} of the averages of a base: those that its training has kept in the work folder, else ours."""
    folders = KEPT_AVERAGES / base, work / base
    return {path.stem.rpartition("-")[2]: path for folder in folders
            for path in sorted(folder.glob("average-*.safetensors"))}  # fmt: skip


def make_pipelines(work, base):
    """WORK/BASE/pipelines/STEP in float32, for every average of a base; where the last is missing, from examples/."""
    import torch
    from diffusers import DiffusionPipeline

    averages = averages_of(work, base)
    steps = dict.fromkeys([*averages, *([STARTS[base]] if base in KEPT else [])])
    if not steps:
        raise SystemExit(f"{work / base} has no average-*.safetensors: train the base, see docs/effect-progress.md")
    for step in steps:
        folder = work / base / "pipelines" / step
        if (folder / "model_index.json").is_file():
            continue
        if step in averages:
            pipeline = pipeline_with(work, base, averages[step])
        else:
            pipeline = DiffusionPipeline.from_pretrained(KEPT[base], dtype=torch.float32)
            if BASES[base] == "sd3":  # computed, not learnt: not the rounded one of the file
                made = type(pipeline.transformer).from_config(pipeline.transformer.config)
                pipeline.transformer.pos_embed.pos_embed.copy_(made.pos_embed.pos_embed)
        with torch.no_grad():
            pipeline.save_pretrained(folder)
        print(f"wrote {folder}")


def pipeline_with(work, base, average):
    """The pipeline of a base, with the weights of an average."""
    from safetensors.torch import load_file

    from pretrain import train_tiny_sd3, train_tiny_sdxl
    from pretrain.tiny_training import load_training_pictures

    family = BASES[base]
    script = {"sdxl": train_tiny_sdxl, "sd3": train_tiny_sd3}[family]
    words = ["--vae", str(AUTOENCODERS[family]), "--hold_out", "--work_dir", str(work / "pictures"),
             "--output_dir", str(work / base)]  # fmt: skip
    args = script.parse_args(words + (["--prediction_type", base] if family == "sdxl" else []))
    _, captions = load_training_pictures(args, 64)
    pipeline, parts = script.build_pipeline(args, captions), {}
    for name, value in load_file(average).items():
        net, parameter = name.split(".", 1)
        parts.setdefault(net, {})[parameter] = value.float()
    for net, state in parts.items():
        missing = set(dict(getattr(pipeline, net).named_parameters())) ^ set(state)
        if missing:
            raise SystemExit(f"{average} does not fit {net}: {sorted(missing)[:3]}")
        getattr(pipeline, net).load_state_dict(state, strict=False)
    return pipeline


def references_of(work, family):
    """{name: folder} of what samples are compared with; the reconstructions are made if need be."""
    shown = work / "reconstructions" / family
    make_reconstructions(work / "train", shown, AUTOENCODERS[family])
    return {"pictures": work / "train", "reconstructions": shown}


def sampled(work, models, samples, guidance, sampling_steps=SAMPLING_STEPS):
    """{name: {guidance: folder of samples}}. models: {name: folder of a pipeline}, relative to the work folder."""
    from lpl_finetuning.data.scan import scan_folder

    images = scan_folder(work / "train", cache_dir=work / "cache").images
    kept = work / ("samples" if sampling_steps == SAMPLING_STEPS else f"samples-{sampling_steps}-steps")
    return {name: sample(work / folder, images, samples, guidance, kept / folder, steps=sampling_steps)
            for name, folder in models.items()}  # fmt: skip


def keep_judgement(work, name, family, folders, about):
    """Compare folders of samples, {model: folder}, with the references; the first model is the baseline."""
    began = time.time()
    rows, floors = judge(folders, references_of(work, family), work / "features", TWINS, FINALIST)
    keep_result(work, f"effect-judged-{name}", time.time() - began, about | {"rows": rows, "floors": floors})
    for row in rows:
        print(row["model"], *(f"{row[name][JUDGE]['frechet']:.3f} to the {name}" for name in floors))


def judge_base(work, base, samples):
    """Samples of all averages of a base, compared with the references."""
    models = {path.name: path.relative_to(work) for path in sorted((work / base / "pipelines").glob("[0-9]*"))}
    folders = {name: found[1.0] for name, found in sampled(work, models, samples, [1.0]).items()}
    keep_judgement(work, f"base-{base}", BASES[base], folders, {"base": base, "samples": samples})


def judge_arms(work, start, arms, seed, steps, samples, guidance, sampling_steps):
    """Samples of the arms of a seed, compared with the references; a result for each scale of guidance."""
    from lpl_finetuning.evaluation.generation import guidance_folder

    trained = {arm: arm_folder(work, start, arm, seed, steps).relative_to(work) for arm in arms if not ALL[arm].gain}
    made = sampled(work, trained, samples, guidance, sampling_steps)
    made |= {arm: {scale: guidance_folder(samples_with_gain(work, start, seed), scale) for scale in guidance}
             for arm in arms if ALL[arm].gain}  # fmt: skip
    for scale in guidance:
        name = arm_name(start, seed, steps) + (f"-guidance-{scale:g}" if scale != 1 else "")
        name += f"-{sampling_steps}-sampling-steps" if sampling_steps != SAMPLING_STEPS else ""
        name += f"-{samples}-samples" if samples != SAMPLES else ""
        about = {"start": start, "seed": seed, "steps": steps, "guidance": scale, "sampling_steps": sampling_steps,
                 "samples": samples}  # fmt: skip
        folders = {arm: made[arm][scale] for arm in arms}
        keep_judgement(work, name, family_of(start), folders, about)


def find_copies(work, start, arms, seed, steps, samples):
    """How near samples of arms are to the pictures that the base was trained on, and to the held-out ones, all of them
    as the base's autoencoder shows them."""
    began, family = time.time(), family_of(start)
    hidden = work / "reconstructions" / f"{family}-held-out"
    make_reconstructions(work / "held_out", hidden, AUTOENCODERS[family])
    trained = {arm: arm_folder(work, start, arm, seed, steps).relative_to(work) for arm in arms}
    folders = {arm: found[1.0] for arm, found in sampled(work, trained, samples, [1.0]).items()}
    rows = judge_copies(folders, references_of(work, family)["reconstructions"], hidden, work / "features")
    keep_result(work, f"effect-copies-{arm_name(start, seed, steps)}", time.time() - began,
                {"start": start, "seed": seed, "steps": steps, "samples": samples, "rows": rows})  # fmt: skip


def samples_with_gain(work, start, seed):
    """The folder of the samples of *none*, its estimates scaled."""
    return work / "samples" / "arms" / start / arm_name("gain", seed, STEPS)


def write_report(work, start, arms, seed, steps, samples, guidance):
    """A page that compares the arms with the training pictures: `evaluate_models.py`."""
    output = work / "reports" / arm_name(start, seed, steps)
    words = ["evaluate_models.py", "--real", work / "train", "--held_out", work / "held_out", "--output", output,
             "--guidance", *guidance, "--max_captions", samples, "--size", 64, "--batch_size", 64,
             "--cache_dir", work / "cache"]  # fmt: skip
    for arm in arms:
        words += ["--model", arm_folder(work, start, arm, seed, steps)]
    run(words, work / "logs" / f"report-{output.name}.log")
    print(f"wrote {output / 'report.html'}")


# ---------------------------------------------------------------------------------------------------------------------
# Arms


def train_arm(work, start, name, seed, steps, folder=None, logging_steps=None):
    """Fine-tune; a run that was stopped goes on at its last checkpoint. Returns the output folder.

    Args:
        folder: of the output; by default the arm's own, and then a result is written too.
        logging_steps: steps between rows of the log; by default the script's.
    """
    began, family = time.time(), family_of(start)
    own = folder or arm_folder(work, start, name, seed, steps)
    if is_done(own):
        print(f"{own} is done")
        return own
    arm = ALL[name]
    words = ["benchmarks/effect_arm.py", SCRIPTS[family]]
    if arm.profile:
        words += ["--profile", RESULTS / f"effect-profile-{start}.json"]
    words += ["--", *COMMON.split(), *FAMILY_FLAGS[family].split(), *arm.words(family, steps),
              "--seed", seed, "--max_train_steps", steps,
              "--pretrained_model_name_or_path", pipeline_of(work, start), "--train_data_dir", work / "train",
              "--caption_column", "text", "--cache_dir", work / "cache", "--output_dir", own]  # fmt: skip
    if folder is None and not arm.start:
        take_shorter_run(work, start, name, seed, steps)
    if arm.autoencoder:
        words += ["--pretrained_vae_model_name_or_path", work / arm.autoencoder]
    if logging_steps:
        words += ["--logging_steps", logging_steps]
    if any(own.glob("checkpoint-*")):
        words += ["--resume_from_checkpoint", "latest"]
    run(words, work / "logs" / f"arm-{start}-{arm_name(name, seed, steps)}.log")
    if folder is None:
        keep_arm(work, own, start, name, seed, steps, time.time() - began)
    return own


def take_shorter_run(work, start, name, seed, steps):
    """Let an arm begin with the last checkpoint of its runs of fewer steps, where it has none of its own.

    The learning rate is constant, so all runs of an arm and a seed are at the same place after as many steps. The
    result then has seconds, losses and gradients of the rest. A shorter run with other flags is refused.
    """
    own, found = arm_folder(work, start, name, seed, steps), {}
    runs = re.compile(re.escape(arm_name(name, seed, STEPS)) + r"(-\d+-steps)?")
    for checkpoint in own.parent.glob(f"{name}-{seed}*/checkpoint-*"):
        number = checkpoint.name.partition("-")[2]
        if runs.fullmatch(checkpoint.parent.name) and number.isdigit() and int(number) < steps:
            found[int(number)] = checkpoint
    if found and not any(own.glob("checkpoint-*")):
        shorter = found[max(found)].parent
        result = RESULTS / f"effect-arm-{start}-{shorter.name}.json"
        before = json.loads(result.read_text())["flags"] if result.is_file() else None
        if before is not None and meant(before) != meant(flags_of(name, start, steps)):
            raise SystemExit(f"{shorter} was trained with other flags: {before}")
        shutil.rmtree(own / "copy", ignore_errors=True)  # one that was begun
        shutil.copytree(found[max(found)], own / "copy")
        (own / "copy").rename(own / found[max(found)].name)


def flags_of(name, start, steps):
    """The flags of an arm's own, in a line."""
    return " ".join(ALL[name].words(family_of(start), steps))


ONCE_DEFAULT = {"--lpl_norm_gradient": ["none"], "--lpl_share": ["0.2"], "--lpl_t_threshold": ["200"]}


def meant(flags):
    """{flag: values} of a line of flags: the last of each, without those that were the defaults of the first arms.

    Results of those arms do not name them.
    """
    return {flag: values for flag, values in options_of(flags.split()).items() if ONCE_DEFAULT.get(flag) != values}


def is_done(folder):
    """Whether an arm's result is there: a whole pipeline, or a LoRA."""
    return any((folder / name).is_file() for name in ("model_index.json", "pytorch_lora_weights.safetensors"))


def keep_arm(work, folder, start, name, seed, steps, seconds):
    """Write the result of an arm's training: last losses, and the gradient norms of its terms."""
    rows = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["diffusion_loss"] for row in rows if "diffusion_loss" in row]
    result = {"start": start, "arm": name, "flags": flags_of(name, start, steps), "seed": seed, "steps": steps,
              "last_diffusion_losses": losses[-5:],
              "gradient_norms": {str(row["step"]): {key: row[key] for key in row if key.startswith("gradient/")}
                                 for row in rows if any(key.startswith("gradient/") for key in row)}}  # fmt: skip
    keep_result(work, f"effect-arm-{start}-{arm_name(name, seed, steps)}", seconds, result)


def sample_gain(work, start, seed, samples, guidance):
    """Samples of the arm *none*, its estimates scaled by gains that are fitted on training pictures."""
    import torch

    from benchmarks.effect_gain import fit_gains, sample_with_gains
    from evaluate_models import evenly_spaced
    from lpl_finetuning.data.scan import scan_folder
    from lpl_finetuning.data.tables import select
    from lpl_finetuning.evaluation.models import find_source, load_pipeline

    began, model = time.time(), arm_folder(work, start, "none", seed)
    pipeline = load_pipeline(find_source(str(model)), torch.float32, "cpu")
    images = scan_folder(work / "train", cache_dir=work / "cache").images
    gains = fit_gains(pipeline, select(images, evenly_spaced(len(images), 320)), 25)
    make = functools.partial(sample_with_gains, gains=gains)
    sample(model, images, samples, guidance, samples_with_gain(work, start, seed), make)
    result = {"start": start, "seed": seed, "gains": gains}
    keep_result(work, f"effect-gain-{start}-{seed}", time.time() - began, result)


# ---------------------------------------------------------------------------------------------------------------------
# Measurements without samples


def judge_one_step(work, start, arms, seed, steps):
    """The one-step test of arms on the held-out pictures through the base's decoder.

    A LoRA with LPL is compared with the same without, every other arm with the first one; but for the finalist, all
    are compared with that too.
    """
    from benchmarks.effect_measures import one_step_numbers, one_step_table
    from lpl_finetuning.data.scan import scan_folder

    began, images = time.time(), scan_folder(work / "held_out", cache_dir=work / "cache").images
    results = {}
    for arm in arms:
        folder = arm_folder(work, start, arm, seed, steps)
        cache = work / "one_step" / start / f"{folder.name}.npz"
        results[arm] = one_step_numbers(f"{pipeline_of(work, start)}+{folder}", images, cache)
        print(f"measured {arm}")
    rows = one_step_table(results, BASELINES, FINALIST)
    keep_result(work, f"effect-one-step-{arm_name(start, seed, steps)}", time.time() - began,
                {"start": start, "seed": seed, "steps": steps, "pictures": len(images), "rows": rows})  # fmt: skip


def measure_decoders(work, domain, decoders):
    """Reconstructions of a domain's pictures by decoders, {name: folder}, beside the pictures."""
    from benchmarks.effect_measures import compare_decoders

    images, _, (train, hidden) = pictures_of(work, domain)
    found = compare_decoders(decoders, images[train], images[hidden])
    return {"domain": domain, "pictures": [int(train.sum()), int(hidden.sum())], "decoders": found}


def make_autoencoder(work, steps, domain):
    """WORK/vae-adversarial: the base's decoder, trained further with the patch-adversarial term; and WORK/vae-plain,
    trained as long without it, both on all kinds of pictures. Then both are compared with the decoder that they began
    with."""
    began, decoders = time.time(), {"base": AUTOENCODERS["sdxl"]}
    for name, weight in (("vae-plain", 0), ("vae-adversarial", 0.5)):
        decoders[name] = work / name
        if not (work / name / "quality.json").is_file():
            words = ["pretrain/train_autoencoder.py", "--init_from", AUTOENCODERS["sdxl"], "--decoder_steps", steps,
                     "--adversarial_weight", weight, "--work_dir", work / "pictures", "--save_every", 250,
                     "--output_dir", work / name]  # fmt: skip
            run(words, work / "logs" / f"{name}.log")
    found = {"steps": steps} | measure_decoders(work, domain, decoders)
    keep_result(work, "effect-autoencoder", time.time() - began, found)


def measure_cost(work, start, arms):
    """Time of a step of each arm, in turns; start it on an idle machine."""
    from benchmarks.effect_measures import step_seconds

    began = time.time()

    def train(arm, steps, number):
        folder = work / "cost" / start / f"{arm}-{number}-{time.time():.0f}"
        train_arm(work, start, arm, 0, steps, folder, logging_steps=5)
        return folder / "logs" / "metrics.jsonl"

    seconds = step_seconds(train, arms)
    ratios = {arm: value / seconds[arms[0]] for arm, value in seconds.items()}
    keep_result(work, f"effect-cost-{start}", time.time() - began,
                {"start": start, "seconds_a_sample": seconds, "ratio_to_the_first": ratios})  # fmt: skip


def show_state(work):
    """Print what is done."""
    for base in BASES:
        arms = work / "arms"
        arms = [path.relative_to(arms) for path in sorted(arms.glob(f"{base}-*/*")) if is_done(path)]
        progress = work / base / "progress.csv"
        steps = progress.read_text().split("\n")[-2].split(",")[0] if progress.is_file() else 0
        pipelines = ", ".join(sorted(path.name for path in (work / base / "pipelines").glob("[0-9]*"))) or "none"
        print(f"{base}: base at step {steps}; pipelines: {pipelines}; arms: {', '.join(map(str, arms)) or 'none'}")


def parse_args(argv=None):
    """The stage and what it works on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument(
        "--work", type=lambda text: Path(text).resolve(), required=True, help="folder of everything large"
    )
    parser.add_argument("--domain", choices=DOMAINS, default="people", help="kinds of pictures (default: %(default)s)")
    parser.add_argument("--base", choices=BASES, help="kind of base model")
    parser.add_argument("--start", metavar="STEP", help="average of the base that arms start from, such as 015000 "
                        f"(default: {STARTS})")  # fmt: skip
    parser.add_argument("--arm", nargs="+", choices=ALL, default=["none"], help="the baseline first")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--steps", type=int, help=f"of an arm (default: {STEPS}) or of a decoder (default: {DECODER_STEPS})"
    )
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0])
    parser.add_argument(
        "--sampling_steps",
        type=int,
        default=SAMPLING_STEPS,
        help="of the samples that judge compares (default: %(default)s)",
    )
    parser.add_argument("--samples", type=int, default=SAMPLES, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.base is None and args.stage not in ("data", "reconstructions", "autoencoder", "state"):
        parser.error(f"{args.stage} needs --base")
    if args.sampling_steps != SAMPLING_STEPS and any(ALL[arm].gain for arm in args.arm):
        parser.error(f"gains are fitted and sampled with {SAMPLING_STEPS} steps")
    return args


def main(argv=None):
    """Run a stage."""
    args = parse_args(argv)
    work, base, steps = args.work, args.base, args.steps or STEPS
    start = f"{base}-{args.start or STARTS.get(base)}"
    if args.stage == "data":
        make_data(work, args.domain)
    elif args.stage == "pipelines":
        make_pipelines(work, base)
    elif args.stage == "judge-base":
        judge_base(work, base, args.samples)
    elif args.stage == "profile":
        from benchmarks.effect_arm import measure_profile

        began = time.time()
        profile = measure_profile(pipeline_of(work, start), work / "train")
        keep_result(work, f"effect-profile-{start}", time.time() - began, profile)
    elif args.stage == "train":
        for seed in args.seed:
            for arm in args.arm:
                train_arm(work, start, arm, seed, steps)
    elif args.stage == "gain":
        for seed in args.seed:
            sample_gain(work, start, seed, args.samples, tuple(args.guidance))
    elif args.stage == "judge":
        for seed in args.seed:
            judge_arms(work, start, args.arm, seed, steps, args.samples, args.guidance, args.sampling_steps)
    elif args.stage == "copies":
        for seed in args.seed:
            find_copies(work, start, args.arm, seed, steps, args.samples)
    elif args.stage == "report":
        for seed in args.seed:
            write_report(work, start, args.arm, seed, steps, args.samples, args.guidance)
    elif args.stage == "one-step":
        for seed in args.seed:
            judge_one_step(work, start, args.arm, seed, steps)
    elif args.stage == "reconstructions":
        began = time.time()
        found = measure_decoders(work, args.domain, AUTOENCODERS)
        keep_result(work, "effect-reconstructions", time.time() - began, found)
    elif args.stage == "autoencoder":
        make_autoencoder(work, args.steps or DECODER_STEPS, args.domain)
    elif args.stage == "cost":
        measure_cost(work, start, args.arm)
    else:
        show_state(work)


if __name__ == "__main__":
    main()
