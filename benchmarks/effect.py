"""Does LPL make better pictures? The experiment, stage by stage; each stage can be interrupted and started again.

    python benchmarks/effect.py --work WORK data                                   # the pictures, split by concept
    python benchmarks/effect.py --work WORK pipelines --base epsilon               # of the averages of a base model
    python benchmarks/effect.py --work WORK judge-base --base epsilon
    python benchmarks/effect.py --work WORK profile --base epsilon                 # once the base is chosen
    python benchmarks/effect.py --work WORK train --base epsilon --arm none decoder-full --seed 0
    python benchmarks/effect.py --work WORK judge --base epsilon --arm none decoder-full --seed 0
    python benchmarks/effect.py --work WORK state                                  # what is done

WORK holds pictures, models and reports. `benchmarks/results/` gets one JSON file per stage with the command, the
commit, the device and the date. Base models come from `pretrain/` with --hold_out (see `docs/effect-progress.md`);
their folders are WORK/epsilon, WORK/v_prediction and WORK/flow.

An arm is a fine-tuning of 1,000 steps through the training scripts. All arms of a base and a seed see the same
pictures, noise and timesteps in the same order.
"""

import argparse
import csv
import datetime
import json
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benchmarks" / "results"
SAMPLES, STEPS = 1536, 1000  # pictures and training steps of an arm
BASES = {"epsilon": "sdxl", "v_prediction": "sdxl", "flow": "sd3"}
SCRIPTS = {"sdxl": "train_sdxl_lpl.py", "sd3": "train_sd3_lpl_flow.py"}
AUTOENCODERS = {"sdxl": ROOT / "examples" / "tiny-sdxl" / "vae", "sd3": ROOT / "examples" / "tiny-sd3" / "vae"}

COMMON = "--resolution 64 --center_crop --train_batch_size 32 --learning_rate 2e-4 " \
    "--lr_scheduler constant_with_warmup --lr_warmup_steps 20 --use_ema --ema_decay 0.999 --adam_weight_decay 0.01 " \
    "--proportion_empty_prompts 0.1 --mixed_precision no --report_to none --checkpointing_steps 250 " \
    "--checkpoints_total_limit 1"  # fmt: skip
FAMILY_FLAGS = {"sdxl": "--snr_gamma 5", "sd3": ""}
GATE = "--use_lpl --lpl_share 0.2 --lpl_sigma_threshold 3"
DEFAULTS = {
    "sdxl": "--use_lpl",
    "sd3": "--use_lpl --lpl_t_threshold 200",
}  # flow's own gate is 3, as in the other arms


@dataclass(frozen=True)
class Arm:
    """A way to fine-tune.

    Attributes:
        flags: of the training script.
        profile: whether each sample is weighted so that its mean at each noise level is that of decoder features.
    """

    flags: str
    profile: bool = False


ARMS = {
    "none": Arm(""),
    "default": Arm(""),  # flags by the family
    "latent": Arm(f"{GATE} --lpl_features latent", profile=True),
    "latent-full": Arm(f"{GATE} --lpl_features latent --lpl_norm_gradient full", profile=True),
    "decoder": Arm(GATE),
    "decoder-half": Arm(f"{GATE} --lpl_norm_gradient half"),
    "decoder-full": Arm(f"{GATE} --lpl_norm_gradient full"),
    "target": Arm(f"{GATE} --lpl_norm_type target"),
    "gate-1": Arm("--use_lpl --lpl_share 0.2 --lpl_sigma_threshold 1"),
    "rgb": Arm(f"{GATE} --lpl_features rgb"),
}


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


def keep_result(name, seconds, content):
    """Write benchmarks/results/NAME.json; seconds: the stage's time, beside whatever else ran."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40"]  # "-dirty" after changes that are not committed
    commit = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    facts = {
        "command": shlex.join(["python", "benchmarks/effect.py", *sys.argv[1:]]),
        "commit": commit,
        "device": f"{platform.machine()} CPU",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": round(seconds),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(facts | content, indent=1) + "\n")
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


def make_data(work):
    """WORK/train (3,202) and WORK/held_out (189): pictures of 64 px, named by number, with captions."""
    from PIL import Image

    from pretrain.emoji_images import held_out, load_emoji

    images, captions = load_emoji(work / "pictures", 64)
    mask, counts = held_out(captions), {}
    for name in ("train", "held_out"):
        folder, part = work / name, [index for index, held in enumerate(mask) if held == (name == "held_out")]
        counts[name] = len(part)
        if (folder / "metadata.csv").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for index in part:
            Image.fromarray(images[index]).save(folder / f"{index:04}.png")
        with open(folder / "metadata.csv", "w", newline="") as file:  # last: a started stage has none
            csv.writer(file).writerows([("file_name", "text"), *((f"{i:04}.png", captions[i]) for i in part)])
    print(", ".join(f"{count:,} pictures in {work / name}" for name, count in counts.items()))


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


def judge(work, name, models, guidance, samples):
    """Compare models with `evaluate_models.py`; a report page and a result. models: folders, the baseline first."""
    began, output = time.time(), work / "reports" / name
    words = ["evaluate_models.py", "--real", work / "train", "--held_out", work / "held_out", "--output", output,
             "--guidance", *guidance, "--max_captions", samples, "--size", 64, "--batch_size", 64,
             "--cache_dir", work / "cache"]  # fmt: skip
    for model in models:
        words += ["--model", model]
    run(words, work / "logs" / f"judge-{name}.log")
    found = json.loads((output / "metrics.json").read_text())
    kept = ("settings", "models", "networks", "distances", "differences", "one_step", "spectrum", "verdict")
    keep_result(
        f"effect-{name}", time.time() - began, {"report": found["command"]} | {key: found[key] for key in kept}
    )
    print("\n".join(found["verdict"]))


# ---------------------------------------------------------------------------------------------------------------------
# Arms


def train_arm(work, base, name, seed, steps):
    """Fine-tune; a run that was stopped goes on at its last checkpoint."""
    began, family, folder = time.time(), BASES[base], arm_folder(work, base, name, seed, steps)
    if (folder / "model_index.json").is_file():
        print(f"{folder} is done")
        return
    arm = ARMS[name]
    flags = DEFAULTS[family] if name == "default" else arm.flags
    words = ["benchmarks/effect_arm.py", SCRIPTS[family]]
    if arm.profile:
        words += ["--profile", RESULTS / f"effect-profile-{base}.json"]
    words += ["--", *COMMON.split(), *FAMILY_FLAGS[family].split(), *flags.split(),
              "--seed", seed, "--max_train_steps", steps,
              "--pretrained_model_name_or_path", chosen_base(work, base), "--train_data_dir", work / "train",
              "--caption_column", "text", "--cache_dir", work / "cache", "--output_dir", folder]  # fmt: skip
    if any(folder.glob("checkpoint-*")):
        words += ["--resume_from_checkpoint", "latest"]
    run(words, work / "logs" / f"arm-{base}-{arm_name(name, seed, steps)}.log")
    rows = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["diffusion_loss"] for row in rows if "diffusion_loss" in row]
    result = {"base": base, "arm": name, "flags": flags, "seed": seed, "steps": steps,
              "last_diffusion_losses": losses[-5:],
              "gradient_norms": {str(row["step"]): {key: row[key] for key in row if key.startswith("gradient/")}
                                 for row in rows if any(key.startswith("gradient/") for key in row)}}  # fmt: skip
    keep_result(f"effect-arm-{base}-{arm_name(name, seed, steps)}", time.time() - began, result)


def show_state(work):
    """Print what is done."""
    for base in BASES:
        progress = work / base / "progress.csv"
        steps = progress.read_text().split("\n")[-2].split(",")[0] if progress.is_file() else 0
        pipelines = ", ".join(sorted(path.name for path in (work / base / "pipelines").glob("[0-9]*"))) or "none"
        arms = [
            path.name for path in sorted((work / "arms" / base).glob("*")) if (path / "model_index.json").is_file()
        ]
        print(f"{base}: base at step {steps}; pipelines: {pipelines}; arms: {', '.join(arms) or 'none'}")


def main(argv=None):
    """Run a stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ("data", "pipelines", "judge-base", "profile", "train", "judge", "state")
    parser.add_argument("stage", choices=stages)
    parser.add_argument(
        "--work", type=lambda text: Path(text).resolve(), required=True, help="folder of everything large"
    )
    parser.add_argument("--base", choices=BASES, help="kind of base model")
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=["none"])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="of an arm (default: %(default)s)")
    parser.add_argument("--guidance", nargs="+", default=["1"])
    parser.add_argument("--samples", type=int, default=SAMPLES, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.base is None and args.stage not in ("data", "state"):
        parser.error(f"{args.stage} needs --base")
    if args.stage == "data":
        make_data(args.work)
    elif args.stage == "pipelines":
        make_pipelines(args.work, args.base)
    elif args.stage == "judge-base":
        judge(args.work, f"base-{args.base}", sorted((args.work / args.base / "pipelines").glob("[0-9]*")),
              args.guidance, args.samples)  # fmt: skip
    elif args.stage == "profile":
        from benchmarks.effect_arm import measure_profile

        began = time.time()
        profile = measure_profile(chosen_base(args.work, args.base), args.work / "train")
        keep_result(f"effect-profile-{args.base}", time.time() - began, profile)
    elif args.stage == "train":
        for seed in args.seed:
            for arm in args.arm:
                train_arm(args.work, args.base, arm, seed, args.steps)
    elif args.stage == "judge":
        folders = [arm_folder(args.work, args.base, arm, seed, args.steps) for seed in args.seed for arm in args.arm]
        name = arm_name(args.base, "-".join(map(str, args.seed)), args.steps)
        judge(args.work, name, folders, args.guidance, args.samples)
    else:
        show_state(args.work)


if __name__ == "__main__":
    main()
