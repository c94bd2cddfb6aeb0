"""Pipelines with the true architectures and random weights, to measure time and memory where no weights are at hand.

    python benchmarks/random_pipelines.py SDXL FOLDER                   # also "SD3.5 medium", "SD3.5 large"

The architectures are those of the published models; the tokenizers are those of the tiny pipelines in `examples/`,
whose token numbers are below any vocabulary's size. SD3's third text encoder (T5, 4.7 billion parameters) is left out.
Pictures of such a model are noise.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.memory import MODELS

ROOT = Path(__file__).resolve().parent.parent
CLIP_L = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
          "hidden_act": "quick_gelu", "projection_dim": 768}  # fmt: skip
CLIP_BIG_G = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "intermediate_size": 5120,
              "hidden_act": "gelu", "projection_dim": 1280}  # fmt: skip
VOCABULARY = {"vocab_size": 49408, "max_position_embeddings": 77}


def build_pipeline(name, folder):
    """Write the pipeline `name` (a key of `MODELS`) with random weights into a folder, unless it is there.

    SDXL takes 6.9 GB on disk in bfloat16, SD3.5 medium 6.7 GB, SD3.5 large 18 GB; as much memory is needed.
    """
    from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel

    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        return folder
    _, pipeline, part, denoiser, vae = MODELS[name]
    tiny = ROOT / "examples" / ("tiny-sdxl" if part == "unet" else "tiny-sd3")
    classes = {"unet": UNet2DConditionModel, "transformer": SD3Transformer2DModel}
    torch.manual_seed(0)
    made(classes[part], denoiser, torch.bfloat16).save_pretrained(folder / part)
    made(AutoencoderKL, vae, torch.float32).save_pretrained(folder / "vae")
    write_text_encoders(folder, tiny, part == "unet")
    shutil.copytree(tiny / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    index = json.loads((tiny / "model_index.json").read_text())
    index = {key: [None, None] if key.endswith("_3") else value for key, value in index.items()}
    index["_class_name"] = pipeline
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))  # last: a folder that has it is whole
    return folder


def made(cls, config, dtype):
    """A diffusers model with random weights, made in its dtype, so that float32 weights never fill the memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return cls.from_config(config)
    finally:
        torch.set_default_dtype(before)


def write_text_encoders(folder, tiny, sdxl):
    """Both CLIP text encoders, with the tokenizers of a tiny pipeline."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    for suffix, sizes in (("", CLIP_L), ("_2", CLIP_BIG_G)):
        shutil.copytree(tiny / f"tokenizer{suffix}", folder / f"tokenizer{suffix}", dirs_exist_ok=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder / f"tokenizer{suffix}")
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        cls = CLIPTextModel if sdxl and not suffix else CLIPTextModelWithProjection
        model = cls(CLIPTextConfig(**sizes, **VOCABULARY, **ids)).to(torch.bfloat16)
        model.save_pretrained(folder / f"text_encoder{suffix}")


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    print(f"wrote {build_pipeline(args.model, args.folder)}")


if __name__ == "__main__":
    main()
