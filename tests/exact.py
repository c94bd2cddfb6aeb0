"""Did a change of the code change what is trained? Both scripts' losses and weights, to the last bit.

    python -m tests.exact --write FILE        # before the change
    python -m tests.exact --compare FILE      # after it, in the same environment: exit status 1 where anything differs

Each case is a short training run from the command line. Written are its log values as hexadecimal floats and a sha256
of every tensor of its result and of its last checkpoint. The values depend on the processor and on the libraries'
versions, so FILE is made anew in each environment and is not kept in the repository; `tests/golden/` has curves with a
tolerance, which hold everywhere.
"""

import argparse
import contextlib
import hashlib
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMON = "--resolution 64 --train_batch_size 2 --lr_warmup_steps 0 --learning_rate 1e-3 --report_to none --seed 3 " \
    "--logging_steps 1 --mixed_precision no --max_train_steps 4 --checkpointing_steps 4"  # fmt: skip
CASES = {
    "sdxl-full": "sdxl --use_ema --snr_gamma 5 --noise_offset 0.05",
    "sdxl-full-lpl": "sdxl --use_lpl --use_ema --gradient_accumulation_steps 2 --timestep_sampling stratified",
    "sdxl-full-lpl-v": "sdxl --use_lpl --prediction_type v_prediction --lpl_norm_type shared --lpl_loss_type l1 "
    "--lpl_sigma_threshold 3 --lpl_scale --lpl_weight 0.1 --random_flip --lpl_checkpointing stage",
    "sdxl-lora-lpl": "sdxl --use_lpl --use_lora --lora_dropout 0.1 --optimizer prodigy --learning_rate 1 "
    "--lr_scheduler cosine --cache_variants 2 --resolution 48",
    "sdxl-lora-text": "sdxl --use_lpl --use_lora --train_text_encoder --text_encoder_lr 5e-4 "
    "--proportion_empty_prompts 0.5 --validation_prompt apple --num_validation_images 1 --validation_steps 2 "
    "--validation_split 2",
    "sd3-full-lpl": "sd3 --use_lpl --use_ema --gradient_accumulation_steps 2 --lpl_norm_type batch",
    "sd3-full": "sd3 --weighting_scheme cosmap --timestep_shift auto --aspect_ratio_buckets auto",
    "sd3-lora-lpl": "sd3 --use_lpl --use_lora --lora_blocks 0,1 --lpl_norm_type default --lpl_t_threshold 400 "
    "--gradient_checkpointing --validation_split 2 --validation_steps 2 --dataloader_num_workers 1",
    "sd3-lora-text": "sd3 --use_lpl --use_lora --train_text_encoder --proportion_empty_prompts 0.5 --use_8bit_adam "
    "--weighting_scheme mode --precondition_outputs 1",
}  # fmt: skip
SCRIPTS = {"sdxl": "train_sdxl_lpl.py", "sd3": "train_sd3_lpl_flow.py"}


def import_libraries():
    """Import what the scripts import, once: each case is a fork of this process."""
    import accelerate
    import datasets
    import diffusers
    import peft
    import torch
    import transformers
    from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline

    return (
        accelerate,
        datasets,
        diffusers,
        peft,
        torch,
        transformers,
        StableDiffusion3Pipeline,
        StableDiffusionXLPipeline,
    )


def make_inputs(folder):
    """Random tiny pipelines and captioned pictures of several shapes, the same in every process."""
    from PIL import Image

    from tests.tiny_models import picture_folder, sd3_pipeline, sdxl_pipeline

    sdxl_pipeline().save_pretrained(folder / "sdxl")
    sd3_pipeline().save_pretrained(folder / "sd3")
    pictures = picture_folder(folder / "pictures", count=7)
    for index, size in enumerate([(96, 64), (64, 96), (80, 80)]):
        path = pictures / f"{index:02d}.png"
        Image.open(path).resize(size, Image.Resampling.BICUBIC).save(path)


def run_case(case, folder):
    """Run one case in a fork; raises SystemExit with its output where it fails."""
    script, *flags = CASES[case].split()
    words = [*COMMON.split(), *flags, "--pretrained_model_name_or_path", folder / script, "--train_data_dir",
             folder / "pictures", "--cache_dir", folder / "cache", "--output_dir", folder / case]  # fmt: skip
    log = folder / f"{case}.log"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open(log, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.argv = [str(ROOT / SCRIPTS[script]), *map(str, words)]
            runpy.run_path(sys.argv[0], run_name="__main__")
            status = 0
        except SystemExit as error:
            status = error.code or 0
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status if isinstance(status, int) else 1)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"{case} failed:\n{log.read_text()[-3000:]}")


def result_of(folder):
    """{"steps": log values as hexadecimal floats, "tensors": sha256 by file and name} of a run's folder."""
    from safetensors.torch import load_file

    rows = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    steps = [{key: float(value).hex() for key, value in sorted(row.items()) if key != "samples_per_second"}
             for row in rows]  # fmt: skip
    tensors = {}
    for path in sorted(folder.rglob("*.safetensors")):
        for name, value in sorted(load_file(path).items()):
            content = value.contiguous().flatten().view(-1).numpy().tobytes()
            tensors[f"{path.relative_to(folder)}:{name}"] = hashlib.sha256(content).hexdigest()
    return {"steps": steps, "tensors": tensors}


def differences(before, after):
    """Lines that say where two results of one case differ; empty where they are equal."""
    for number, (old, new) in enumerate(zip(before["steps"], after["steps"], strict=False)):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                yield f"row {number}, {key}: {old.get(key)} -> {new.get(key)}"
    if len(before["steps"]) != len(after["steps"]):
        yield f"{len(before['steps'])} rows -> {len(after['steps'])}"
    keys = before["tensors"].keys() | after["tensors"].keys()
    changed = [key for key in sorted(keys) if before["tensors"].get(key) != after["tensors"].get(key)]
    if changed:
        yield f"{len(changed)} of {len(keys)} tensors, the first {changed[0]}"


def main():
    """Run the cases; write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    args = parser.parse_args()
    if (args.write is None) == (args.compare is None):
        parser.error("give --write FILE or --compare FILE")
    import_libraries()
    results, failed = {}, False
    before = json.loads(args.compare.read_text()) if args.compare else None
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_inputs(folder)
        for case in args.cases:
            run_case(case, folder)
            results[case] = result_of(folder / case)
            if before is None:
                print(f"{case}: {len(results[case]['tensors'])} tensors", flush=True)
                continue
            found = list(differences(before[case], results[case]))
            failed |= bool(found)
            print(f"{case}: " + ("equal" if not found else "; ".join(found[:4])), flush=True)
    if args.write:
        args.write.write_text(json.dumps(results, indent=1))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
    main()
