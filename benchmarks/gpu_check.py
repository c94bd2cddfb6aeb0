"""Does everything run on this machine, how fast, and in how much memory? One command, which goes on where it stopped.

    python benchmarks/gpu_check.py --work WORK                          # a GPU, true sizes, random weights
    python benchmarks/gpu_check.py --work WORK --sdxl FOLDER --sd3 FOLDER    # your own weights
    python benchmarks/gpu_check.py --work WORK --device cpu --sizes tiny     # all stages in small, without a GPU
    python benchmarks/gpu_check.py --work WORK --only lifecycle-sdxl speed-sdxl

`make true-sizes` runs the stages lifecycle and single-file at true sizes on the CPU, at 256 px.

A run that takes more than eight minutes is broken off (--limit). Each stage writes
`benchmarks/results/gpu-STAGE.json` (--results elsewhere) with the command, the machine, the date and what was
measured; a stage whose file is there is not run again. A stage that fails is told, and the others go on. Then the
tables of `docs/performance.md` are written from the files, unless --results names another folder; `--table` does only
that.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import yaml
from PIL import Image

from benchmarks.measured_run import WARM_UP
from benchmarks.records import facts, put_tables
from lpl_finetuning.training.machine import computes_bfloat16

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
SCRIPTS = {"sdxl": "train_sdxl_lpl.py", "sd3": "train_sd3_lpl_flow.py"}
SECONDS = 480  # limit of a run
EVERY_STEP = ["--use_lpl", "--lpl_t_threshold", 1000]  # every sample is gated, so that every step has the loss
STEPS = 5


class Skipped(Exception):
    """A stage that can't be run on this machine; the message says why."""


@dataclass(frozen=True)
class Check:
    """What all stages need.

    Attributes:
        work: folder of models, pictures and runs.
        device: "cuda" or "cpu".
        tiny: whether the tiny pipelines of `examples/` stand for the true sizes.
        models: {name of `random_pipelines` or family: folder} of the user's own weights.
        resolution: px; None for the recipes' own, or what the tiny pipelines make.
        limit: seconds that a run may take.
    """

    work: Path
    device: str
    tiny: bool
    models: dict[str, Path] = field(default_factory=dict)
    resolution: int | None = None
    limit: int = SECONDS

    def model(self, name):
        """The folder of "SDXL", "SD3.5 medium" or "SD3.5 large"; it is made if need be."""
        family = family_of(name)
        if family in self.models:
            return self.models[family]
        if self.tiny:
            return ROOT / "examples" / f"tiny-{family}"
        from benchmarks.random_pipelines import build_pipeline

        return build_pipeline(name, self.work / "models" / name.replace(" ", "-"))

    def half_vae(self, name):
        """The folder of a model's autoencoder, which says that it does not overflow in float16; it is made if need be.

        It stands for the autoencoder that the recipe for float16 takes from the Hub.
        """
        source, folder = self.model(name) / "vae", self.work / "models" / f"{name.replace(' ', '-')}-half-vae"
        config = folder / "config.json"
        if not config.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            for path in source.glob("*.safetensors"):
                if not (folder / path.name).exists():
                    (folder / path.name).symlink_to(path.resolve())
            config.write_text(json.dumps(json.loads((source / "config.json").read_text()) | {"force_upcast": False}))
        return folder

    def size(self, wanted=1024):
        """The resolution of a run, px."""
        return self.resolution or (64 if self.tiny else wanted)

    def pictures(self, resolution):
        """A folder of four captioned pictures of this size."""
        folder = self.work / f"pictures-{resolution}"
        for number in range(4):
            path = folder / f"{number}.png"
            if not path.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
                path.with_suffix(".txt").write_text(f"squares of many colours, number {number}")
                Image.fromarray(pixels).resize((resolution, resolution), Image.Resampling.BICUBIC).save(path)
        return folder

    def samples(self):
        """Flags that sample a picture; in two steps on the CPU, where a step at true sizes takes a minute."""
        path, entry = self.work / "prompts.yaml", {"prompt": "squares of many colours"}
        if self.device == "cpu":
            entry["steps"] = 2
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump([entry]))
        return ["--validation_prompts_file", path, "--num_validation_images", 1]

    def train(self, name, model, *flags, launcher=(), base=None):
        """Run a training script; returns what `measured_run` measured, "output" (folder) and "said" (text).

        base: folder or file of the base model; by default the folder of `model`.

        Raises:
            RuntimeError: the run failed or took too long; has the last lines of its output.
        """
        family, resolution = family_of(model), self.size(flag_of(flags, "--resolution") or 1024)
        output = self.work / "runs" / name
        file = self.work / "runs" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        words = [*(launcher or [sys.executable]), "benchmarks/measured_run.py", file, SCRIPTS[family], *flags,
                 "--resolution", resolution, "--pretrained_model_name_or_path", base or self.model(model),
                 "--train_data_dir", self.pictures(resolution), "--output_dir", output, "--report_to", "none",
                 "--cache_dir", self.work / "cache"]  # fmt: skip
        said = run([*map(str, words)], self.limit, self.work / "runs" / f"{name}.log", self.device)
        return json.loads(file.read_text()) | {"output": str(output), "said": said}


def family_of(model):
    """ "sdxl" or "sd3"."""
    return "sdxl" if model == "SDXL" else "sd3"


def flag_of(flags, name):
    """The number after a flag; None without the flag."""
    return int(flags[flags.index(name) + 1]) if name in flags else None


def run(words, limit, log, device):
    """The output of a command; RuntimeError with its last lines where it fails."""
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        print("$", shlex.join(words), file=file, flush=True)
        try:
            status = subprocess.run(words, cwd=ROOT, stdout=file, stderr=file, timeout=limit, env=environment)
            failed = f"ended with status {status.returncode}" if status.returncode else ""
        except subprocess.TimeoutExpired:
            failed = f"took more than {limit} s"
    said = log.read_text(errors="replace")
    if failed:
        last = [line for line in said.replace("\r", "\n").splitlines()[1:] if line.strip()][-6:]
        raise RuntimeError(f"{failed} ({log}): " + " | ".join(last))
    return said


# ---------------------------------------------------------------------------------------------------------------------
# Stages: each returns a dictionary


def machine(check):
    """The machine and its software."""
    import diffusers

    found = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    if check.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {"gpu": card.name, "gpus": torch.cuda.device_count(), "memory": card.total_memory,
                  "capability": f"{card.major}.{card.minor}", "cuda": torch.version.cuda}  # fmt: skip
    return found


def recipe(check, path):
    """The first steps of a recipe, every sample gated, its peak beside the plan's estimate."""
    content = yaml.safe_load(path.read_text())
    model = {"sd35-medium": "SD3.5 medium", "sd35-large": "SD3.5 large"}.get(
        "-".join(path.stem.split("-")[:2]), "SDXL"
    )
    if check.device == "cpu" and "bnb_quantization_config_path" in content:
        raise Skipped("diffusers quantizes on GPUs only")
    if check.device == "cpu" and not check.tiny and content["mixed_precision"] == "fp16":
        raise Skipped("float16 needs a GPU")
    flags = ["--config", path, "--max_train_steps", STEPS, "--checkpointing_steps", 1000, "--logging_steps", 1,
             "--gradient_accumulation_steps", 1, *EVERY_STEP, *check.samples()]  # fmt: skip
    if content.get("validation_split"):
        flags += ["--validation_split", 1]
    if check.device == "cpu" and content.get("use_8bit_adam"):
        flags.append("--no-use_8bit_adam")
    if "pretrained_vae_model_name_or_path" in content and family_of(model) not in check.models:
        flags += ["--pretrained_vae_model_name_or_path", check.half_vae(model)]
    if check.device == "cpu" and check.tiny:
        flags += ["--mixed_precision", "no", "--lpl_vae_dtype", "float32"]
    return summary(check.train(f"recipe-{path.stem}", model, *flags))


def summary(found):
    """Numbers of a run: seconds a step, share of the loss, peak, waits a step, and the plan's line about memory."""
    seconds = found["seconds"][WARM_UP:] or found["seconds"]
    loss = found["loss_seconds"][WARM_UP : WARM_UP + len(seconds)] or found["loss_seconds"]
    planned = [line for line in found["said"].splitlines() if line.startswith("Memory, computed")]
    waits = sum(found["waits"].values()) / max(1, found["counted_steps"])
    return {"seconds_a_step": statistics.median(seconds) if seconds else None,
            "share_of_loss": sum(loss) / sum(seconds) if seconds else None, "peak": found["peak"],
            "waits_a_step": waits, "waits": found["waits"], "plan": planned[0] if planned else None}  # fmt: skip


LORA = ["--use_lora", "--rank", 16, "--train_batch_size", 1, "--max_train_steps", 8, "--checkpointing_steps", 1000,
        "--gradient_checkpointing"]  # fmt: skip


def precision_flags(check):
    """bfloat16 on GPUs and on CPUs that compute in it; others take hundreds of times as long for a convolution."""
    slow = check.device == "cpu" and (check.tiny or not computes_bfloat16())
    return ["--mixed_precision", "no" if slow else "bf16"]


def speed(check, model):
    """A step without the loss, with it, and with it in every step."""
    found = {}
    for name, flags in (("without", []), ("with", ["--use_lpl"]), ("every step", EVERY_STEP)):
        own = [*LORA, *precision_flags(check), *flags]
        found[name] = summary(check.train(f"speed-{family_of(model)}-{name.replace(' ', '-')}", model, *own))
    return found | {"ratio": found["every step"]["seconds_a_step"] / found["without"]["seconds_a_step"]}


def variant(check, name, *flags, cuda=True):
    """SDXL's LoRA with the loss in every step, with more flags."""
    if cuda and check.device != "cuda":
        raise Skipped("needs a GPU")
    return summary(check.train(name, "SDXL", *LORA, *EVERY_STEP, *flags))


def channels_last(check):
    """The decoder's loss with weights in either memory format, side by side."""
    found = {}
    for name, more in (("channels-last", []), ("contiguous", ["--contiguous"])):
        file = check.work / "runs" / f"bench-{name}.json"
        size = ["--resolution", 64, "--width", 32] if check.tiny else ["--resolution", check.size(512)]
        dtype = "bfloat16" if check.device == "cuda" else "float32"
        words = [sys.executable, "benchmarks/bench_lpl.py", *size, "--dtypes", dtype, "--rounds", 3, "--output", file]
        run([*map(str, words), *more], check.limit, file.with_suffix(".log"), check.device)
        found[name] = json.loads(file.read_text())
    return found


def lifecycle(check, model):
    """Train, stop after the first step, resume, validate, export for other programs, and read the file back."""
    from safetensors.torch import load_file

    name, family = f"lifecycle-{family_of(model)}", family_of(model)
    flags = [*LORA, *precision_flags(check), *EVERY_STEP, "--max_train_steps", 2, "--checkpointing_steps", 1,
             "--checkpoints_total_limit", 2, *check.samples(), "--output_kohya_format"]  # fmt: skip
    whole = check.train(name, model, *flags)
    output = Path(whole["output"])
    weights = load_file(output / "pytorch_lora_weights.safetensors")
    (output / "pytorch_lora_weights.safetensors").unlink()
    resumed = check.train(name, model, *flags, "--resume_from_checkpoint", "checkpoint-1")
    again = load_file(output / "pytorch_lora_weights.safetensors")  # the files differ in the order of their metadata
    same = again.keys() == weights.keys() and all(torch.equal(again[key], weights[key]) for key in weights)
    if not same and check.device == "cpu":
        raise RuntimeError("the resumed run ended with other weights")
    [kohya] = [path for path in output.glob("*.safetensors") if path.name != "pytorch_lora_weights.safetensors"]
    ours, theirs = (read_back(check.model(model), family, output, name) for name in (
        "pytorch_lora_weights.safetensors", kohya.name))  # fmt: skip
    pictures = len(list((output / "validation").glob("*.png")))
    return {"resumed_is_equal": same, "kohya_file": kohya.name, "kohya_tensors": len(load_file(kohya)),
            "tensors_read_back": [len(ours), len(theirs)], "pictures": pictures,
            "first": summary(whole), "resumed": summary(resumed)}  # fmt: skip


FOLDED = {("text_encoder", "text_projection.weight"), ("transformer", "time_text_embed.text_embedder.linear_1.weight")}
# tensors that SD3's single file has in another form: programs take the projection of CLIP-L for the identity, so it is
# multiplied into the layer that takes its output


def single_file(check, model):
    """Pack the model into one file, train from it, and compare what was unpacked with what was packed."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    from lpl_finetuning.results.export import save_single_file

    source, name = check.model(model), f"single-file-{family_of(model)}"
    path = check.work / "models" / f"{name}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_single_file(source, path, torch.bfloat16)
    flags = [*LORA, *precision_flags(check), *EVERY_STEP, "--max_train_steps", 1]
    flags += ["--config_from", source] if check.tiny else []  # other sizes than those of the published models
    found = check.train(name, model, *flags, base=path)
    with safe_open(path, "pt") as file:
        count = len(file.keys())
    [unpacked] = [file.parent for file in (check.work / "cache").glob(f"lpl/base-models/{name}-*/model_index.json")]
    compared = 0
    for part in sorted(folder for folder in unpacked.iterdir() if any(folder.glob("*.safetensors"))):
        packed = tensors_in(source / part.name)
        for tensor, value in tensors_in(part).items():
            if family_of(model) == "sd3" and (part.name, tensor) in FOLDED:
                continue
            if not torch.equal(value.bfloat16(), packed[tensor].bfloat16()):
                raise RuntimeError(f"{part.name}: {tensor} is not what was packed")
            compared += 1
    trained = load_file(Path(found["output"]) / "pytorch_lora_weights.safetensors")
    return {"tensors_in_file": count, "equal_tensors": compared, "trained_tensors": len(trained),
            "run": summary(found)}  # fmt: skip


def tensors_in(folder):
    """{name: tensor} of a model's weight files; transformers names CLIP's tensors in two ways."""
    from safetensors.torch import load_file

    return {
        name.removeprefix("text_model."): value
        for path in folder.glob("*.safetensors")
        for name, value in load_file(path).items()
    }


def read_back(base, family, folder, name):
    """{name: tensor} of a LoRA file: as diffusers reads it; for SD3, whose kohya files diffusers can't read, as
    --init_lora does."""
    import diffusers

    if family == "sdxl":
        return diffusers.StableDiffusionXLPipeline.lora_state_dict(folder, weight_name=name)[0]
    from lpl_finetuning.families import SD3
    from lpl_finetuning.lora_files import read_lora

    with torch.device("meta"):
        config = diffusers.SD3Transformer2DModel.load_config(base, subfolder="transformer")
        transformer = diffusers.SD3Transformer2DModel.from_config(config)
    models = {"transformer": transformer}
    lora = read_lora("--init_lora", folder / name, SD3, diffusers.StableDiffusion3Pipeline, models)
    return lora["transformer"][0]


def ranks(check, config, *flags):
    """All weights of SDXL, shared by the GPUs of this machine."""
    count = torch.cuda.device_count() if check.device == "cuda" else 0
    if count < 2:
        raise Skipped(f"needs two GPUs or more; {count} here")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "configs" / config,
                "--num_processes", count]  # fmt: skip
    flags = ["--train_batch_size", 1, "--gradient_checkpointing", "--mixed_precision", "bf16", *EVERY_STEP, *flags,
             "--max_train_steps", STEPS, "--checkpointing_steps", 1000]  # fmt: skip
    return summary(check.train(f"ranks-{Path(config).stem}", "SDXL", *flags, launcher=launcher))


def all_stages():
    """{name: function of a `Check`}."""
    found = {"machine": machine}
    for path in RECIPES:
        found[f"recipe-{path.stem}"] = lambda check, path=path: recipe(check, path)
    for model in ("SDXL", "SD3.5 medium"):
        found[f"speed-{family_of(model)}"] = lambda check, model=model: speed(check, model)
    nf4 = ["--bnb_quantization_config_path", ROOT / "configs" / "nf4.json", "--mixed_precision", "bf16"]
    found |= {
        "precision-fp16": lambda check: variant(check, "precision-fp16", "--mixed_precision", "fp16"),
        "precision-nf4": lambda check: variant(check, "precision-nf4", *nf4),
        "attention-xformers": lambda check: variant(check, "attention-xformers", "--mixed_precision", "bf16",
                                                    "--enable_xformers_memory_efficient_attention"),
        "compile": lambda check: variant(check, "compile", *precision_flags(check), "--torch_compile"),
        "channels-last": channels_last,
    }  # fmt: skip
    for model in ("SDXL", "SD3.5 medium"):
        found[f"lifecycle-{family_of(model)}"] = lambda check, model=model: lifecycle(check, model)
        found[f"single-file-{family_of(model)}"] = lambda check, model=model: single_file(check, model)
    for config in ("fsdp2.yaml", "zero2.yaml", "zero3.yaml"):
        found[f"ranks-{Path(config).stem}"] = lambda check, config=config: ranks(check, config)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The command


def run_stage(name, stage, check, results):
    """Run a stage and write its file; returns whether it did not fail."""
    file = results / f"gpu-{name}.json"
    if file.is_file():
        print(f"{name}: {file} is there")
        return True
    began = time.time()
    try:
        outcome = {"found": stage(check)}
    except Skipped as reason:
        outcome = {"skipped": str(reason)}
    except Exception as error:  # whatever a GPU brings: the other stages are of use without this one
        print(f"{name}: FAILED: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    gpu = torch.cuda.get_device_name() if check.device == "cuda" else None
    known = facts(time.time() - began, gpu) | {"stage": name, "sizes": "tiny" if check.tiny else "true"}
    results.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(known | outcome, indent=1) + "\n")
    print(f"{name}: {outcome.get('skipped') or 'done'} ({known['seconds']} s)")
    return True


def tables(results):
    """{mark: Markdown} of `docs/performance.md`: of runs on GPUs, and of runs at true sizes on CPUs."""
    rows = [json.loads(path.read_text()) for path in sorted(results.glob("gpu-*.json"))]
    rows = [row for row in rows if row["stage"] != "machine"]
    on_cpu = [row["device"].endswith("CPU") for row in rows]
    return {
        "gpu": table([row for row, cpu in zip(rows, on_cpu, strict=True) if not cpu]),
        "cpu": table([row for row, cpu in zip(rows, on_cpu, strict=True) if cpu]),
    }


def table(rows):
    """Markdown of the stages' files; "" without one."""
    if not rows:
        return ""
    lines = ["| stage | sizes | seconds a step | share of the loss | peak | waits | plan | commit, device, date |",
             "|---|---|---:|---:|---:|---:|---|---|"]  # fmt: skip
    for row in rows:
        made = f"{row['commit'][:7]}, {row['device']}, {row['date']}"
        for name, found in parts_of(row):
            peak = max(found["peak"].values()) / 1e9
            seconds, share = found["seconds_a_step"], found["share_of_loss"]
            plan = found["plan"] or ""
            plan = "not counted" if "not counted" in plan else plan  # by runs of earlier versions
            time_of_it = f"{seconds:.3f} | {share:.0%}" if seconds is not None else " | "  # a single step is a warm-up
            lines.append(f"| {name} | {row['sizes']} | {time_of_it} | {peak:.2f} GB | "
                         f"{found['waits_a_step']:.1f} | {plan} | {made} |")  # fmt: skip
        if "skipped" in row:
            lines.append(f"| {row['stage']} | {row['sizes']} | not run: {row['skipped']} |  |  |  |  | {made} |")
    return "\n".join(lines)


def write_page(results):
    """Print the tables; write them into the page, if they are the repository's own results."""
    found = tables(results)
    print("\n\n".join(filter(None, found.values())))
    if results.resolve() == RESULTS:
        PAGE.write_text(put_tables(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")


def parts_of(row):
    """(name, `summary`) of all runs in a stage's file."""
    found = row.get("found", {})
    if "seconds_a_step" in found:
        return [(row["stage"], found)]
    return [(f"{row['stage']}, {name}", part) for name, part in found.items()
            if isinstance(part, dict) and "seconds_a_step" in part]  # fmt: skip


def main(argv=None):
    """The command; status 1 if a stage failed."""
    stages = all_stages()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=lambda text: Path(text).resolve(), required=True, help="folder of models, "
                        "pictures and runs: up to 40 GB")  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", choices=("true", "tiny"), default="true")
    parser.add_argument("--resolution", type=int, help="px (default: 1024, tiny 64)")
    parser.add_argument("--sdxl", type=Path, help="folder of an SDXL pipeline in place of random weights")
    parser.add_argument("--sd3", type=Path, help="folder of an SD3 or SD3.5 pipeline in place of random weights")
    parser.add_argument("--only", nargs="+", choices=stages, metavar="STAGE", help=f"of {', '.join(stages)}")
    parser.add_argument("--limit", type=int, default=SECONDS, help="seconds of a run (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="write the tables of what was measured, and end")
    args = parser.parse_args(argv)
    if args.table:
        return write_page(args.results)
    own = {"sdxl": args.sdxl, "sd3": args.sd3}
    models = {family: folder.resolve() for family, folder in own.items() if folder}
    check = Check(args.work, args.device, args.sizes == "tiny", models, args.resolution, args.limit)
    good = [run_stage(name, stages[name], check, args.results) for name in args.only or stages]
    write_page(args.results)
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
