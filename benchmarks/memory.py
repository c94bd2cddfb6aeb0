"""Compute memory and arithmetic of fine-tuning for the real architectures: python benchmarks/memory.py

Models are built on the meta device from configurations, so no weights and no GPU are needed. The figures are those of
the scripts' `--dry_run`: the bytes of live tensors at the peak of a step, and its floating-point operations. The
script writes the tables into docs/memory.md, docs/scaling.md and docs/performance.md. A setup takes ten seconds and
more; `--json PATH` keeps figures, and reads what it kept from the same run before.
"""

# ruff: noqa: E402

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import train_sd3_lpl_flow
import train_sdxl_lpl
from benchmarks.records import put_tables
from lpl_finetuning.files import format_bytes
from lpl_finetuning.training.live_memory import Peak
from lpl_finetuning.training.plan import format_flop
from lpl_finetuning.training.sharding import memory_of_rank
from lpl_finetuning.training.step_memory import (
    Machine,
    RunCode,
    autoencoder_networks,
    count_step,
    flop_of_step,
    highest,
)
from lpl_utils import LPLGate

PAGE, SCALING_PAGE, SPEED_PAGE = (ROOT / "docs" / f"{name}.md" for name in ("memory", "scaling", "performance"))
NF4 = ROOT / "configs" / "nf4.json"
VAE = {
    "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "norm_num_groups": 32,
    "sample_size": 1024,
}  # fmt: skip
SDXL_VAE = VAE | {"latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": True}
SD3_VAE = VAE | {
    "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
    "use_post_quant_conv": False, "force_upcast": True,
}  # fmt: skip
EULER = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
         "beta_end": 0.012, "num_train_timesteps": 1000}  # fmt: skip
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}
UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 128, "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
MMDIT = {
    "_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "in_channels": 16,
    "attention_head_dim": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "out_channels": 16,
}  # fmt: skip
SD35_MEDIUM = MMDIT | {
    "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
    "qk_norm": "rms_norm", "dual_attention_layers": list(range(13)),
}  # fmt: skip
SD35_LARGE = MMDIT | {
    "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}  # fmt: skip
MODELS = {  # name: (script, pipeline class, denoiser's folder and configuration, autoencoder's)
    "SDXL": (train_sdxl_lpl, "StableDiffusionXLPipeline", "unet", UNET, SDXL_VAE),
    "SD3.5 medium": (train_sd3_lpl_flow, "StableDiffusion3Pipeline", "transformer", SD35_MEDIUM, SD3_VAE),
    "SD3.5 large": (train_sd3_lpl_flow, "StableDiffusion3Pipeline", "transformer", SD35_LARGE, SD3_VAE),
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
          "projection_dim": 768}  # fmt: skip
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32,
          "projection_dim": 1280}  # fmt: skip
STEP = "--resolution 1024 --use_lpl --center_crop --train_batch_size 1 --gradient_checkpointing --mixed_precision bf16"
SETUPS = {  # the row's name, of a recipe and the flags after it, or of all weights: model
    "`sdxl-lora-16gb`": "SDXL",
    "`sdxl-lora-16gb`, --lpl_num_blocks 3": "SDXL",
    "`sdxl-lora-16gb`, --lpl_num_blocks 2": "SDXL",
    "`sdxl-lora-16gb`, --no-gradient_checkpointing": "SDXL",
    "`sdxl-lora-16gb`, fp16": "SDXL",
    "`sdxl-lora-16gb`, fp16, --lpl_num_blocks 3": "SDXL",
    "`sdxl-lora-16gb-fp16`": "SDXL",
    "`sdxl-subject-lora`": "SDXL",
    "`sdxl-style-lora`": "SDXL",
    "`sdxl-lora-8gb`": "SDXL",
    "`sd35-medium-lora`": "SD3.5 medium",
    "`sd35-medium-lora`, --no-gradient_checkpointing": "SD3.5 medium",
    "`sd35-large-lora-24gb`": "SD3.5 large",
    "`sd35-large-lora-24gb`, 4 bits": "SD3.5 large",
    "SDXL, all weights": "SDXL",
    "`sdxl-full-24gb`": "SDXL",
    "`sdxl-full-80gb`": "SDXL",
    "`sdxl-full-80gb`, --use_8bit_adam": "SDXL",
    "SD3.5 medium, all weights": "SD3.5 medium",
    "SD3.5 large, all weights": "SD3.5 large",
}
RECIPES = ROOT / "configs" / "recipes"
REPLACED = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "bnb_quantization_config_path")


def write_configurations(folder, pipeline_class, denoiser, denoiser_config, vae_config):
    """Write a pipeline folder of configurations only. Configurations that the estimate does not need are empty."""
    parts = ["vae", denoiser, "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"]
    for part in parts:
        (folder / part).mkdir()
        (folder / part / ("tokenizer.json" if "tokenizer" in part else "config.json")).write_text("{}")
    scheduler = FLOW if denoiser == "transformer" else EULER
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / denoiser / "config.json").write_text(json.dumps(denoiser_config))
    for part, config in (("text_encoder", CLIP_L), ("text_encoder_2", CLIP_G)):
        (folder / part / "config.json").write_text(json.dumps(config | {"vocab_size": 49408}))
    (folder / "vae" / "config.json").write_text(json.dumps(vae_config))
    index = {"_class_name": pipeline_class} | {part: ["diffusers", part] for part in parts}
    (folder / "model_index.json").write_text(json.dumps(index))


RANKS = (1, 2, 4, 8, 16)


# {suffix of the model's name in the table: ZeRO stage}; without a suffix it is FSDP2
SHARDINGS = {"": 0, ", ZeRO-2": 2, ", ZeRO-3": 3}


def parts_of(name):
    """(recipe or None, flags) of a setup's name."""
    first, *others = name.split(", ")
    recipe = first.strip("`") if first.startswith("`") else None
    return recipe, " ".join(part for part in others if part.startswith("--")) if recipe else STEP


def arguments(name, folder):
    """(script, flags) of a setup, for the configurations in a folder. Flags of a recipe are read from its file."""
    script, *configurations = MODELS[SETUPS.get(name) or SETUPS[name.split(", ")[0]]]  # --only may add flags
    recipe, flags = parts_of(name)
    text = (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8") if recipe else ""
    if "pretrained_vae_model_name_or_path" in text:  # the autoencoder that does not overflow
        configurations[-1] = SDXL_VAE | {"force_upcast": False}
    write_configurations(Path(folder), *configurations)
    kept = "\n".join(line for line in text.splitlines() if not line.startswith(REPLACED))
    kept = kept.replace("mixed_precision: fp16", "mixed_precision: bf16")
    (Path(folder) / "recipe.yaml").write_text(kept or "use_lpl: true", encoding="utf-8")
    words = (
        f"--config {folder}/recipe.yaml --pretrained_model_name_or_path {folder} --train_data_dir {folder} "
        f"--validation_prompt x --dry_run {flags}"
    )
    args = script.parse_args(words.split())
    quantized = "\nbnb_quantization_config_path" in text or "4 bits" in name
    precision = "fp16" if "fp16" in name else "bf16"  # set here: the CPU build of PyTorch refuses both flags
    return script, args.but(mixed_precision=precision, bnb_quantization_config_path=str(NF4) if quantized else None)


def count(name):
    """{phase: Peak} of a setup on one GPU."""
    with tempfile.TemporaryDirectory() as folder:
        script, args = arguments(name, folder)
        plan = SimpleNamespace(
            schedule=script.Schedule(args),
            dtype={"fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision],
            batch_size=args.train_batch_size,
            total_steps=1,
        )
        code = RunCode(script.build_denoiser, script.training_step, script.example_batch, autoencoder_networks,
                       script.held_out_functions())  # fmt: skip
        return count_step(args, plan, code, Machine(args.mixed_precision))


def ranks_of(name, peaks):
    """{(row, GPUs): bytes} of a setup whose training state is shared."""
    with tempfile.TemporaryDirectory() as folder:
        script, args = arguments(name, folder)
        [model] = script.build_denoiser(args, torch.bfloat16, "meta").models().values()
    found = {}
    for suffix, stage in SHARDINGS.items():
        for ranks in RANKS:
            sizes = [sum(peak.kinds.values()) if ranks == 1
                     else sum(size for _, size in memory_of_rank(list(peak.kinds.items()), model, ranks, stage))
                     for peak in peaks.values()]  # fmt: skip
            found[SETUPS[name] + suffix, ranks] = max(sizes)
    return found


def table(counts):
    """The table of docs/memory.md, Markdown. counts: {setup: {phase: Peak}}."""
    lines = [
        "| setup, 1024 px | at the peak | peak of a step without LPL | where the peak is |",
        "|---|---:|---:|---|",
    ]
    for name, peaks in counts.items():
        top = highest(peaks)
        others = max(peak.size for phase, peak in peaks.items() if phase != "LPL")
        lines.append(f"| {name} | {top.size / 1e9:.1f} GB | {others / 1e9:.1f} GB | {top.where} |")
    return "\n".join(lines)


GATES = {"t < 200": LPLGate(t_threshold=200), "sigma / alpha <= 3": LPLGate(sigma_threshold=3)}
ARITHMETIC = (  # setups in the table of the arithmetic
    "`sdxl-lora-16gb`",
    "`sdxl-lora-16gb`, --lpl_num_blocks 3",
    "`sdxl-lora-16gb`, --lpl_num_blocks 2",
    "`sdxl-lora-16gb`, --no-gradient_checkpointing",
    "`sdxl-full-80gb`",
    "`sd35-medium-lora`",
    "`sd35-large-lora-24gb`",
)


def arithmetic_table(counts):
    """The table of docs/performance.md, Markdown. counts: as of `table`."""
    lines = ["| setup, 1024 px | an image without LPL | more with LPL | "
             + " | ".join(f"step, {gate}" for gate in GATES) + " |",
             "|---|---:|---:|" + "---:|" * len(GATES)]  # fmt: skip
    for name in ARITHMETIC:
        with tempfile.TemporaryDirectory() as folder:
            script, args = arguments(name, folder)
            shares = [script.Schedule(args).gated_share(gate) for gate in GATES.values()]
        step, lpl = flop_of_step(counts[name])
        cells = [format_flop(flop / args.train_batch_size) for flop in (step, lpl)]
        for share in shares:
            cells.append(f"{1 + share * lpl / step:.2f} times ({share:.1%} of samples)")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def scaling_table(totals):
    """The table of docs/scaling.md, Markdown; totals: {(row, number of GPUs): bytes on each}."""
    heads = [f"{ranks} GPU" + "s" * (ranks > 1) for ranks in RANKS]
    lines = ["| all weights, 1024 px, with LPL | " + " | ".join(heads) + " |",
             "|---|" + "---:|" * len(RANKS)]  # fmt: skip
    for row in dict.fromkeys(row for row, _ in totals):
        lines.append(f"| {row} | " + " | ".join(f"{totals[row, ranks] / 1e9:.1f} GB" for ranks in RANKS) + " |")
    return "\n".join(lines)


def kept_counts(path):
    """{setup: {phase: Peak}} of a file of figures; {} without such a file."""
    if not path or not Path(path).is_file():
        return {}
    content = json.loads(Path(path).read_text())
    return {name: {phase: Peak(**peak) for phase, peak in peaks.items()} for name, peaks in content.items()}


def main():
    """Count the setups, print them and write the tables into the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--only", nargs="+", help="setups to count; the pages are then left alone")
    args = parser.parse_args()
    counts = kept_counts(args.json)
    for name in args.only or SETUPS:
        if name not in counts:
            counts[name] = count(name)
        print(name, format_bytes(highest(counts[name]).size), highest(counts[name]).where, flush=True)
        if args.json:
            content = {name: {phase: asdict(peak) for phase, peak in peaks.items()} for name, peaks in counts.items()}
            Path(args.json).write_text(json.dumps(content, indent=1))
    if args.only:
        return
    pages = {PAGE: {"table": table({name: counts[name] for name in SETUPS})},
             SPEED_PAGE: {"arithmetic": arithmetic_table(counts)}}  # fmt: skip
    totals = {}
    for name in SETUPS:
        if name.endswith(", all weights"):
            totals |= ranks_of(name, counts[name])
    pages[SCALING_PAGE] = {"table": scaling_table(totals)}
    for page, tables in pages.items():
        page.write_text(put_tables(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
