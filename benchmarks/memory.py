"""Compute the GPU memory of fine-tuning for the real architectures: python benchmarks/memory.py

Models are built on the meta device from configurations, so no weights and no GPU are needed. The figures are those of
the scripts' `--dry_run`. The script writes the tables into docs/memory.md and docs/scaling.md, and with `--json PATH`
the figures as JSON.
"""

# ruff: noqa: E402

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import train_sd3_lpl_flow
import train_sdxl_lpl
from lpl_finetuning.files import format_bytes
from lpl_finetuning.training.models import load_vae
from lpl_finetuning.training.objective import lpl_stages
from lpl_finetuning.training.plan import memory_estimate
from lpl_finetuning.training.sharding import memory_of_rank

PAGE, SCALING_PAGE = ROOT / "docs" / "memory.md", ROOT / "docs" / "scaling.md"
NF4 = ROOT / "configs" / "nf4.json"
START, END = "<!-- table -->", "<!-- end of table -->"
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
LORA = ["--use_lora", "--rank", "16"]
WAYS = {
    "LoRA, rank 16": LORA, "LoRA, rank 16, fp16": LORA, "LoRA, rank 16, 4 bits": LORA, "all weights": [],
    "all, 8-bit Adam": ["--use_8bit_adam"],
}  # fmt: skip


def write_configurations(folder, pipeline_class, denoiser, denoiser_config, vae_config):
    """Write a pipeline folder of configurations only. Configurations that the estimate does not need are empty."""
    parts = ["vae", denoiser, "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"]
    for part in parts:
        (folder / part).mkdir()
        (folder / part / ("tokenizer.json" if "tokenizer" in part else "config.json")).write_text("{}")
    scheduler = "FlowMatchEulerDiscreteScheduler" if denoiser == "transformer" else "EulerDiscreteScheduler"
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": scheduler}))
    (folder / denoiser / "config.json").write_text(json.dumps(denoiser_config))
    (folder / "vae" / "config.json").write_text(json.dumps(vae_config))
    index = {"_class_name": pipeline_class} | {part: ["diffusers", part] for part in parts}
    (folder / "model_index.json").write_text(json.dumps(index))


RANKS = (1, 2, 4, 8, 16)


# {suffix of the model's name in the table: ZeRO stage}; without a suffix it is FSDP2
SHARDINGS = {"": 0, ", ZeRO-2": 2, ", ZeRO-3": 3}


def estimate(model, way, resolution, lpl, ranks=1, stage=0):
    """{what: bytes} on one GPU of a run in bfloat16 with gradient checkpointing and one image per device.

    way: a key of WAYS; the name may contain fp16 or 4 bits.
    ranks: number of GPUs that share the model, by FSDP2 or by DeepSpeed.
    stage: ZeRO stage of DeepSpeed; 0 is FSDP2.
    """
    script, *configurations = MODELS[model]
    with tempfile.TemporaryDirectory() as folder:
        write_configurations(Path(folder), *configurations)
        args = script.parse_args([
            "--pretrained_model_name_or_path", folder, "--train_data_dir", folder, "--resolution", str(resolution),
            "--train_batch_size", "1", "--gradient_checkpointing", "--mixed_precision", "bf16", "--dry_run",
            *WAYS[way], *(["--use_lpl"] if lpl else []),
        ])  # fmt: skip
        if "4 bits" in way:  # set here, since the command line refuses it when PyTorch is the CPU build
            args = args.but(bnb_quantization_config_path=str(NF4))
        dtypes = (torch.float16, torch.float32) if "fp16" in way else (torch.bfloat16, torch.bfloat16)
        denoiser = script.build_denoiser(args, dtypes[0], "meta")
        vae = load_vae(args.base_model, dtypes[1], "meta")  # under fp16 the loss' decoder is in float32
        stages = lpl_stages(args, vae)
        parts = memory_estimate(args, denoiser, vae.decoder, stages, dtypes[0], script.example_inputs)
        if ranks > 1:
            parts = memory_of_rank(parts, next(iter(denoiser.models().values())), ranks, stage)
        return dict(parts)


def table(rows):
    """The table of docs/memory.md, Markdown."""
    lines = [
        "| model | trained | px | without LPL | with LPL | of which weights, gradients, optimizer |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for (model, way, resolution), (without, with_lpl) in rows.items():
        fixed = sum(without[part] for part in ("weights", "gradients", "optimizer state"))
        total = [sum(parts.values()) for parts in (without, with_lpl)]
        figures = " | ".join(f"{size / 1e9:.1f} GB" for size in (*total, fixed))
        lines.append(f"| {model} | {way} | {resolution} | {figures} |")
    return "\n".join(lines)


def scaling_table(totals):
    """The table of docs/scaling.md, Markdown; totals: {(row, number of GPUs): bytes on each}."""
    heads = [f"{ranks} GPU" + "s" * (ranks > 1) for ranks in RANKS]
    lines = ["| all weights, 1024 px, with LPL | " + " | ".join(heads) + " |",
             "|---|" + "---:|" * len(RANKS)]  # fmt: skip
    for row in dict.fromkeys(row for row, _ in totals):
        lines.append(f"| {row} | " + " | ".join(f"{totals[row, ranks] / 1e9:.1f} GB" for ranks in RANKS) + " |")
    return "\n".join(lines)


def put_table(page, text):
    """Replace the table between the marks of a page."""
    old = page.read_text(encoding="utf-8")
    page.write_text(f"{old.split(START)[0]}{START}\n{text}\n{END}{old.split(END)[1]}", encoding="utf-8")


def main():
    """Compute the tables, print them and write them into the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    rows = {}
    for model in MODELS:
        for way in WAYS:
            for resolution in (512, 1024):
                rows[model, way, resolution] = [estimate(model, way, resolution, lpl) for lpl in (False, True)]
                print(
                    model,
                    way,
                    resolution,
                    *[format_bytes(sum(parts.values())) for parts in rows[model, way, resolution]],
                )
    put_table(PAGE, table(rows))
    totals = {}
    for model in MODELS:
        for name, stage in SHARDINGS.items():
            for ranks in RANKS:
                parts = estimate(model, "all weights", 1024, True, ranks, stage)
                totals[model + name, ranks] = sum(parts.values())
    print(scaling_table(totals))
    put_table(SCALING_PAGE, scaling_table(totals))
    if args.json:
        Path(args.json).write_text(
            json.dumps({" / ".join(map(str, key)): value for key, value in rows.items()}, indent=1)
        )


if __name__ == "__main__":
    main()
