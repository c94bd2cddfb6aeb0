"""Does LPL make better pictures? The experiment, stage by stage; each stage can be interrupted and started again.

    python benchmarks/effect.py --work WORK data                                   # the pictures, split by concept
    python benchmarks/effect.py --work WORK pipelines --base epsilon               # of the averages of a base model
    python benchmarks/effect.py --work WORK judge-base --base epsilon
    python benchmarks/effect.py --work WORK profile --base epsilon                 # once the base is chosen
    python benchmarks/effect.py --work WORK train --base epsilon --arm none decoder-full --seed 0
    python benchmarks/effect.py --work WORK judge --base epsilon --arm none decoder-full --seed 0
    python benchmarks/effect.py --work WORK gain --base epsilon --seed 0           # *none*, estimates scaled
    python benchmarks/effect.py --work WORK judge --base epsilon --arm none gain --seed 0
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
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.effect_arms import ALL, BASES, COMMON, FAMILY_FLAGS, SCRIPTS
from benchmarks.records import facts
from pretrain.emoji_images import DOMAINS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SAMPLES, STEPS, DECODER_STEPS = 1536, 1000, 3000  # pictures and training steps of an arm; steps of a decoder
STAGES = ("data", "pipelines", "judge-base", "profile", "train", "gain", "judge", "one-step", "reconstructions",
          "autoencoder", "cost", "state")  # fmt: skip
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


def chosen_base(work, base):
    """The pipeline from which a base's arms start: that of the latest average."""
    folder = work / base / "pipelines"
    found = sorted(folder.glob("[0-9]*"))
    if not found:
        raise SystemExit(f"{folder} has no pipeline: run the stage pipelines first")
    return found[-1]


def arm_name(arm, seed, steps):
    """Of folders and results."""
    return f"{arm}-{seed}" + (f"-{steps}-steps" if steps != STEPS else "")


def arm_folder(work, base, arm, seed, steps=STEPS):
    """The output folder of an arm."""
    return work / "arms" / base / arm_name(arm, seed, steps)


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


def make_reconstructions(work, family):
    """WORK/reconstructions/FAMILY: the training pictures, encoded and decoded again. Returns the folder."""
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image

    from benchmarks.effect_measures import reconstructions
    from lpl_finetuning.evaluation.onestep import to_bytes

    source, folder = work / "train", work / "reconstructions" / family
    if (folder / "metadata.csv").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(AUTOENCODERS[family]).eval()
    names = sorted(path.name for path in source.glob("*.png"))
    pictures = np.stack([np.asarray(Image.open(source / name).convert("RGB")) for name in names])
    decoded = torch.cat([to_bytes(decoded) for _, _, decoded in reconstructions(vae, pictures)])
    for name, picture in zip(names, decoded.numpy(), strict=True):
        Image.fromarray(picture).save(folder / name)
    shutil.copy(source / "metadata.csv", folder / "metadata.csv")  # last: a started folder has none
    return folder


def make_pipelines(work, base):
    """WORK/BASE/pipelines/STEP for every average that the base's training has kept."""
    import torch
    from safetensors.torch import load_file

    from pretrain import train_tiny_sd3, train_tiny_sdxl
    from pretrain.tiny_training import load_training_pictures

    family = BASES[base]
    script = {"sdxl": train_tiny_sdxl, "sd3": train_tiny_sd3}[family]
    words = ["--vae", str(AUTOENCODERS[family]), "--hold_out", "--work_dir", str(work / "pictures"),
             "--output_dir", str(work / base)]  # fmt: skip
    args = script.parse_args(words + (["--prediction_type", base] if family == "sdxl" else []))
    _, captions = load_training_pictures(args, 64)
    for average in sorted((work / base).glob("average-*.safetensors")):
        folder = work / base / "pipelines" / average.stem.split("-")[1]
        if (folder / "model_index.json").is_file():
            continue
        pipeline = script.build_pipeline(args, captions)
        parts = {}
        for name, value in load_file(average).items():
            net, parameter = name.split(".", 1)
            parts.setdefault(net, {})[parameter] = value.float()
        for net, state in parts.items():
            missing = set(dict(getattr(pipeline, net).named_parameters())) ^ set(state)
            if missing:
                raise SystemExit(f"{average} does not fit {net}: {sorted(missing)[:3]}")
            getattr(pipeline, net).load_state_dict(state, strict=False)
        with torch.no_grad():
            pipeline.save_pretrained(folder)
        print(f"wrote {folder}")


def judge(work, base, name, models, guidance, samples):
    """Compare models with `evaluate_models.py`, against the training pictures and against their reconstructions; two
    report pages and two results.

    A model draws what the decoder can show: the reconstructions are training pictures that went through the
    autoencoder, so that a model with perfect latents is at the floor of their distance.

    Args:
        models: folders, the baseline first.
        guidance: scales; the first one's pictures are compared with the reconstructions.
        samples: pictures of each model.
    """
    shown = make_reconstructions(work, BASES[base])
    held_out = ["--held_out", work / "held_out"]
    found = evaluate(work, name, work / "train", models, samples, ["--guidance", *guidance, *held_out])
    report = work / "reports" / name
    pictures = [report / model["pictures_folder"][f"{guidance[0]:g}"] for model in found["models"]]
    evaluate(work, f"shown-{name}", shown, pictures, samples, [])


def evaluate(work, name, real, models, samples, words):
    """Run `evaluate_models.py`, keep its report page and a result. Returns the contents of `metrics.json`."""
    began, output = time.time(), work / "reports" / name
    words = ["evaluate_models.py", "--real", real, "--output", output, "--max_captions", samples, "--size", 64,
             "--batch_size", 64, "--cache_dir", work / "cache", *words]  # fmt: skip
    for model in models:
        words += ["--model", model]
    run(words, work / "logs" / f"judge-{name}.log")
    found = json.loads((output / "metrics.json").read_text())
    kept = ("settings", "models", "networks", "distances", "differences", "one_step", "spectrum", "verdict")
    content = {"report": found["command"]} | {key: found[key] for key in kept}
    if content["one_step"]:  # means over noise levels; the report has the rest
        rows = content["one_step"]["differences"]
        content["one_step"] |= {"differences": [row for row in rows if row["level"] is None]}
    keep_result(work, f"effect-{name}", time.time() - began, content)
    print("\n".join(found["verdict"]))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Arms


def train_arm(work, base, name, seed, steps, folder=None, logging_steps=None):
    """Fine-tune; a run that was stopped goes on at its last checkpoint. Returns the output folder.

    Args:
        folder: of the output; by default the arm's own, and then a result is written too.
        logging_steps: steps between rows of the log; by default the script's.
    """
    began, family = time.time(), BASES[base]
    own = folder or arm_folder(work, base, name, seed, steps)
    if is_done(own):
        print(f"{own} is done")
        return own
    arm = ALL[name]
    words = ["benchmarks/effect_arm.py", SCRIPTS[family]]
    if arm.profile:
        words += ["--profile", RESULTS / f"effect-profile-{base}.json"]
    words += ["--", *COMMON.split(), *FAMILY_FLAGS[family].split(), *arm.words(name, family, steps),
              "--seed", seed, "--max_train_steps", steps,
              "--pretrained_model_name_or_path", chosen_base(work, base), "--train_data_dir", work / "train",
              "--caption_column", "text", "--cache_dir", work / "cache", "--output_dir", own]  # fmt: skip
    if arm.autoencoder:
        words += ["--pretrained_vae_model_name_or_path", work / arm.autoencoder]
    if logging_steps:
        words += ["--logging_steps", logging_steps]
    if any(own.glob("checkpoint-*")):
        words += ["--resume_from_checkpoint", "latest"]
    run(words, work / "logs" / f"arm-{base}-{arm_name(name, seed, steps)}.log")
    if folder is None:
        keep_arm(work, own, base, name, seed, steps, time.time() - began)
    return own


def is_done(folder):
    """Whether an arm's result is there: a whole pipeline, or a LoRA."""
    return any((folder / name).is_file() for name in ("model_index.json", "pytorch_lora_weights.safetensors"))


def keep_arm(work, folder, base, name, seed, steps, seconds):
    """Write the result of an arm's training: last losses, and the gradient norms of its terms."""
    rows = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["diffusion_loss"] for row in rows if "diffusion_loss" in row]
    result = {"base": base, "arm": name, "flags": " ".join(ALL[name].words(name, BASES[base], steps)), "seed": seed,
              "steps": steps, "last_diffusion_losses": losses[-5:],
              "gradient_norms": {str(row["step"]): {key: row[key] for key in row if key.startswith("gradient/")}
                                 for row in rows if any(key.startswith("gradient/") for key in row)}}  # fmt: skip
    keep_result(work, f"effect-arm-{base}-{arm_name(name, seed, steps)}", seconds, result)


def sample_gain(work, base, seed, samples, guidance):
    """Pictures of the arm *none*, its estimates scaled by gains that are fitted on training pictures."""
    import torch

    from benchmarks.effect_gain import fit_gains, sample_with_gains
    from evaluate_models import evenly_spaced
    from lpl_finetuning.data.scan import scan_folder
    from lpl_finetuning.data.tables import select
    from lpl_finetuning.evaluation.generation import GenerationSettings
    from lpl_finetuning.evaluation.models import find_source, load_pipeline
    from lpl_finetuning.evaluation.picture_sets import stems_of

    began, model = time.time(), arm_folder(work, base, "none", seed)
    source = find_source(str(model))
    pipeline = load_pipeline(source, torch.float32, "cpu")
    images = scan_folder(work / "train", cache_dir=work / "cache").images
    gains = fit_gains(pipeline, select(images, evenly_spaced(len(images), 320)), 25)
    chosen = [int(index) for index in evenly_spaced(len(images), samples)]
    stems = stems_of(images)
    captions = {stems[index]: images[index].caption for index in chosen}
    settings = GenerationSettings(guidance=guidance, size=(64, 64), batch_size=64)
    folder = arm_folder(work, base, "gain", seed)
    sample_with_gains(pipeline, captions, gains, settings, folder, source.weights)
    keep_result(work, f"effect-gain-{base}-{seed}", time.time() - began, {"base": base, "seed": seed, "gains": gains})


# ---------------------------------------------------------------------------------------------------------------------
# Measurements without samples


def judge_one_step(work, base, arms, seed, steps):
    """The one-step test of arms on the held-out pictures, against the first of them, through the base's decoder."""
    from benchmarks.effect_measures import one_step_numbers, one_step_table
    from lpl_finetuning.data.scan import scan_folder

    began, images = time.time(), scan_folder(work / "held_out", cache_dir=work / "cache").images
    results = {}
    for arm in arms:
        folder = arm_folder(work, base, arm, seed, steps)
        cache = work / "one_step" / base / f"{folder.name}.npz"
        results[arm] = one_step_numbers(f"{chosen_base(work, base)}+{folder}", images, cache)
        print(f"measured {arm}")
    rows = one_step_table(results)
    keep_result(work, f"effect-one-step-{arm_name(base, seed, steps)}", time.time() - began,
                {"base": base, "seed": seed, "steps": steps, "pictures": len(images), "rows": rows})  # fmt: skip


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


def measure_cost(work, base, arms):
    """Time of a step of each arm, in turns; start it on an idle machine."""
    from benchmarks.effect_measures import step_seconds

    began = time.time()

    def train(arm, steps, number):
        folder = work / "cost" / base / f"{arm}-{number}-{time.time():.0f}"
        train_arm(work, base, arm, 0, steps, folder, logging_steps=5)
        return folder / "logs" / "metrics.jsonl"

    seconds = step_seconds(train, arms)
    ratios = {arm: value / seconds[arms[0]] for arm, value in seconds.items()}
    keep_result(work, f"effect-cost-{base}", time.time() - began,
                {"base": base, "seconds_a_sample": seconds, "ratio_to_the_first": ratios})  # fmt: skip


def show_state(work):
    """Print what is done."""
    for base in BASES:
        progress = work / base / "progress.csv"
        steps = progress.read_text().split("\n")[-2].split(",")[0] if progress.is_file() else 0
        pipelines = ", ".join(sorted(path.name for path in (work / base / "pipelines").glob("[0-9]*"))) or "none"
        arms = [path.name for path in sorted((work / "arms" / base).glob("*")) if is_done(path)]
        print(f"{base}: base at step {steps}; pipelines: {pipelines}; arms: {', '.join(arms) or 'none'}")


def parse_args(argv=None):
    """The stage and what it works on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument(
        "--work", type=lambda text: Path(text).resolve(), required=True, help="folder of everything large"
    )
    parser.add_argument("--domain", choices=DOMAINS, default="people", help="kinds of pictures (default: %(default)s)")
    parser.add_argument("--base", choices=BASES, help="kind of base model")
    parser.add_argument("--arm", nargs="+", choices=ALL, default=["none"], help="the baseline first")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--steps", type=int, help=f"of an arm (default: {STEPS}) or of a decoder (default: {DECODER_STEPS})"
    )
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0])
    parser.add_argument("--samples", type=int, default=SAMPLES, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.base is None and args.stage not in ("data", "reconstructions", "autoencoder", "state"):
        parser.error(f"{args.stage} needs --base")
    return args


def judge_arms(work, args, steps):
    """Samples of arms, compared with the first of them."""
    folders = []
    for seed in args.seed:
        for arm in args.arm:
            folder = arm_folder(work, args.base, arm, seed, steps)
            if ALL[arm].gain:
                folder = folder / f"guidance-{args.guidance[0]:g}"
            folders.append(folder)
    name = arm_name(args.base, "-".join(map(str, args.seed)), steps)
    name += "" if args.guidance == [1.0] else "-guidance-" + "-".join(f"{value:g}" for value in args.guidance)
    judge(work, args.base, name, folders, args.guidance, args.samples)


def main(argv=None):
    """Run a stage."""
    args = parse_args(argv)
    work, base, steps = args.work, args.base, args.steps or STEPS
    if args.stage == "data":
        make_data(work, args.domain)
    elif args.stage == "pipelines":
        make_pipelines(work, base)
    elif args.stage == "judge-base":
        pipelines = sorted((work / base / "pipelines").glob("[0-9]*"))
        judge(work, base, f"base-{base}", pipelines, args.guidance, args.samples)
    elif args.stage == "profile":
        from benchmarks.effect_arm import measure_profile

        began = time.time()
        profile = measure_profile(chosen_base(work, base), work / "train")
        keep_result(work, f"effect-profile-{base}", time.time() - began, profile)
    elif args.stage == "train":
        for seed in args.seed:
            for arm in args.arm:
                train_arm(work, base, arm, seed, steps)
    elif args.stage == "gain":
        for seed in args.seed:
            sample_gain(work, base, seed, args.samples, tuple(args.guidance))
    elif args.stage == "judge":
        judge_arms(work, args, steps)
    elif args.stage == "one-step":
        judge_one_step(work, base, args.arm, args.seed[0], steps)
    elif args.stage == "reconstructions":
        began = time.time()
        found = measure_decoders(work, args.domain, AUTOENCODERS)
        keep_result(work, "effect-reconstructions", time.time() - began, found)
    elif args.stage == "autoencoder":
        make_autoencoder(work, args.steps or DECODER_STEPS, args.domain)
    elif args.stage == "cost":
        measure_cost(work, base, args.arm)
    else:
        show_state(work)


if __name__ == "__main__":
    main()
