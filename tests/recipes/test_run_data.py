"""Both recipes on messy folders: buckets, several captions, bad images, caches that are shared, killed and damaged."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import train_sd3_lpl_flow
import train_sdxl_lpl
from lpl_finetuning import errors
from lpl_finetuning import flags as flags_module
from lpl_finetuning.data import report as report_module
from lpl_finetuning.data import scan as scan_module
from lpl_finetuning.data.encoding import latent_bytes
from lpl_finetuning.flags import data_source
from lpl_finetuning.training import run
from lpl_utils import LPLGate
from tests import children, runs
from tests.children import start
from tests.runs import assert_resume_is_exact, command, forbid_loading, objective_of

SCRIPTS = {"sdxl": train_sdxl_lpl, "sd3": train_sd3_lpl_flow}
SHAPES = [
    (64, 64),
    (96, 64),
    (64, 96),
    (150, 70),
    (48, 160),
    (97, 61),
    (64, 64),
    (130, 64),
    (70, 150),
]  # width, height


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Nine pictures of many shapes in two folders, one of them with three captions."""
    folder = tmp_path_factory.mktemp("mixed") / "set"
    (folder / "deep er").mkdir(parents=True)
    rng, lines = np.random.default_rng(0), []
    for number, size in enumerate(SHAPES):
        coarse = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        name = f"{'deep er/' if number % 2 else ''}{number}.png"
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / name)
        captions = ["a red apple", "the sun", "green leaves"] if number == 4 else "a photo of a dog"
        lines.append(json.dumps({"file_name": name, "text": captions}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(params=["sdxl", "sd3"])
def recipe(request, mixed, cache_dir):
    """(script, its flags on the mixed folder with buckets)."""
    model = request.getfixturevalue(f"{request.param}_folder")
    flags = (
        f"--pretrained_model_name_or_path {model} --train_data_dir {mixed} --cache_dir {cache_dir} --resolution 64 "
        "--aspect_ratio_buckets auto --train_batch_size 2 --lr_warmup_steps 0 --learning_rate 1e-3 --report_to none "
        "--seed 3 --logging_steps 1 --mixed_precision no"
    ).split()
    return SCRIPTS[request.param], flags


def prepared(script, *flags):
    """(args, RunData) of a run, as its main makes them."""
    args = script.parse_args([str(flag) for flag in flags])
    AcceleratorState._reset_state(True)
    accelerator = run.start_accelerator(args)
    scan, held_out = scan_module.find_images(data_source(args))
    return args, script.fill_caches(args, scan.images, held_out, torch.float32, accelerator), accelerator


def test_batches_are_of_one_shape_and_tell_the_model_which(recipe, tmp_path):
    """Shapes, micro-conditioning and captions of what the loader gives, against the pictures themselves."""
    script, flags = recipe
    args, data, accelerator = prepared(script, *flags, "--center_crop", "--output_dir", tmp_path)
    assert data.cached and len(data.framing.sizes) > 3
    used, captions = Counter(), set()
    for batch in run.batches(args, data, accelerator, 0, 36):
        height, width = (8 * side for side in batch["mean"].shape[-2:])
        for index, caption, time_ids in zip(batch["index"], batch["caption"], batch["time_ids"], strict=True):
            image = data.images[index]
            ratio = np.log(image.size[0] / image.size[1])
            distances = [abs(ratio - np.log(h / w)) for h, w in data.framing.sizes]
            assert (height, width) == data.framing.sizes[int(np.argmin(distances))]
            original, (top, left), target = time_ids.reshape(3, 2).int().tolist()
            assert tuple(original) == image.size and target == [height, width]
            scale = max(height / image.size[0], width / image.size[1])
            assert abs(2 * top - (scale * image.size[0] - height)) <= 2
            assert abs(2 * left - (scale * image.size[1] - width)) <= 2
            assert caption in image.captions
            used[int(index)] += 1
            if len(image.captions) > 1:
                captions.add(caption)
    assert len(used) == 9 and max(used.values()) - min(used.values()) <= 2, "72 samples of 9 images"
    assert len(captions) == 3, "each of several captions has its turn"


def test_buckets_train_and_resume_exactly(recipe, tmp_path):
    """With the loss, in every shape; one recipe with numbered crops, the other with new ones in every step."""
    script, flags = recipe
    more = ["--cache_variants", 3, "--random_flip"] if script is train_sdxl_lpl else ["--use_lora"]
    assert_resume_is_exact(script, [*flags, *more, "--use_lpl", "--lpl_t_threshold", 900], tmp_path, steps=6, at=3)
    rows = [json.loads(line) for line in (tmp_path / "whole/logs/metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["train_loss"]) for row in rows) and any(row["lpl/loss"] > 0 for row in rows)


def test_thresholds_follow_the_shape(sdxl_folder, sd3_folder):
    """--lpl_threshold_resolution and --timestep_shift auto go by the area of each bucket, not by --resolution."""
    gate = LPLGate(sigma_threshold=3, threshold_resolution=512, resolution=512)
    assert gate.at(1024).limit == 6 and gate.at(512) == gate and LPLGate(t_threshold=200).at(64).limit == 200
    args = train_sdxl_lpl.parse_args(["--pretrained_model_name_or_path", str(sdxl_folder), "--dataset_name", "x"])
    assert objective_of(args).resolution(torch.zeros(1, 4, 64, 256)) == 1024
    args = train_sd3_lpl_flow.parse_args(
        f"--pretrained_model_name_or_path {sd3_folder} --dataset_name x --resolution 64 --timestep_shift auto".split()
    )
    schedule = train_sd3_lpl_flow.Schedule(args)
    half = torch.tensor([0.5])
    for resolution in (64, 128):
        shift = 3 * resolution / 1024
        sigma = schedule.draw_timesteps(half, resolution).item() / 1000
        assert sigma == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), rel=1e-5)
    assert schedule.draw_timesteps(half) == schedule.draw_timesteps(half, 64)


def test_positions_that_the_transformer_does_not_know(sd3_folder, mixed):
    flags = f"--pretrained_model_name_or_path {sd3_folder} --train_data_dir {mixed} --aspect_ratio_buckets".split()
    for buckets, words in {"64,72": "multiple of 16", "64,512": "positions up to 256 px"}.items():
        with pytest.raises(errors.UserError, match=words):
            train_sd3_lpl_flow.parse_args([*flags, buckets])


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def launch(script, *flags, ranks=1):
    """Run a script to its end in processes of its own; what it printed."""
    words = command(script, *flags)
    if ranks > 1:
        words = children.torchrun(ranks, *words[1:])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = children.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def shards(cache):
    """{shard: number of its entries} of the latents in a cache."""
    found = {path: load_file(path)["__keys"] for path in sorted(Path(cache).glob("lpl/latents/*/shard-*.safetensors"))}
    keys = torch.cat(list(found.values())) if found else torch.zeros(0, 16)
    assert len(torch.unique(keys, dim=0)) == len(keys), "no image is encoded twice"
    return {path: len(keys) for path, keys in found.items()}


def test_two_ranks_encode_each_image_once_and_equal_one_rank(recipe, tmp_path):
    """Between them they fill the cache; they train on disjoint batches, as one rank with twice the accumulation."""
    script, flags = recipe
    flags = [
        *flags,
        "--center_crop",
        "--random_flip",
        "--use_lora",
        "--max_train_steps",
        4,
        "--checkpointing_steps",
        99,
    ]
    caches = {name: tmp_path / f"cache-{name}" for name in ("two", "one")}
    launch(script, *flags, "--cache_dir", caches["two"], "--output_dir", tmp_path / "two", ranks=2)
    launch(script, *flags, "--cache_dir", caches["one"], "--output_dir", tmp_path / "one",
           "--gradient_accumulation_steps", 2)  # fmt: skip
    counts = {name: shards(cache) for name, cache in caches.items()}
    assert sum(counts["two"].values()) == sum(counts["one"].values()) == 18
    one, two = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("one", "two"))
    for key in one:
        assert torch.allclose(one[key], two[key], atol=1e-6), key


# ---------------------------------------------------------------------------------------------------------------------
# Caches


@pytest.fixture
def many(tmp_path, mixed):
    """Enough pictures for several shards."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(700):
        Image.new("RGB", SHAPES[number % 4], (number % 256, number // 256, 7)).save(folder / f"{number}.png")
    return folder


WAITS_FOR_ITS_END = """
import runpy, sys, time
from lpl_finetuning.data import store as store_utils
put = store_utils.TensorStore.put
def slow(store, entries):
    put(store, entries)
    time.sleep(60 if "latents" in str(store.folder) else 0)  # however late the kill comes, not all is encoded
store_utils.TensorStore.put = slow
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_killed_encoding_goes_on_where_it_was(sdxl_folder, many, tmp_path):
    """Killed again and again, no shard is damaged and none is made twice; at the end everything is there."""
    flags = (
        f"--pretrained_model_name_or_path {sdxl_folder} --train_data_dir {many} --cache_dir {tmp_path / 'cache'} "
        f"--resolution 64 --aspect_ratio_buckets auto --center_crop --instance_prompt dog --max_train_steps 1 "
        f"--report_to none --mixed_precision no --train_batch_size 2 --output_dir {tmp_path / 'out'}"
    ).split()
    counts, words = [], command(train_sdxl_lpl, *flags)
    words = [words[0], "-c", WAITS_FOR_ITS_END, *words[1:]]
    for _ in range(2):
        process = start(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=runs.ROOT)
        before, end = len(shards(tmp_path / "cache")), time.monotonic() + 120
        while len(shards(tmp_path / "cache")) == before and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        counts.append(sum(shards(tmp_path / "cache").values()))
    assert 0 < counts[0] < counts[1] < 700
    launch(train_sdxl_lpl, *flags)
    assert sum(shards(tmp_path / "cache").values()) == 700
    assert not list((tmp_path / "cache").rglob("*.damaged"))


def test_a_damaged_shard_is_made_again_and_not_trusted(recipe, tmp_path, caplog):
    script, flags = recipe
    flags = [*flags, "--center_crop", "--max_train_steps", 2, "--cache_dir", tmp_path / "cache"]
    before = runs.run(script, *flags, "--output_dir", tmp_path / "a")
    [*_, shard] = shards(tmp_path / "cache")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    after = runs.run(script, *flags, "--output_dir", tmp_path / "b")
    assert [row["train_loss"] for row in after] == [row["train_loss"] for row in before]
    assert shard.with_name(shard.name + ".damaged").exists() and shard.exists() and shard.name in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_damaged_while_a_run_reads_it_is_told_in_a_line(recipe, tmp_path, monkeypatch, workers):
    script, flags = recipe
    flags = [*flags, "--center_crop", "--max_train_steps", 2, "--cache_dir", tmp_path / "cache"]
    flags += ["--output_dir", tmp_path / "out", "--dataloader_num_workers", workers]
    batches = run.batches

    def spoilt(*args):
        for shard in shards(tmp_path / "cache"):
            content = bytearray(shard.read_bytes())
            content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
            shard.write_bytes(content)
        return batches(*args)

    with monkeypatch.context() as patch:
        patch.setattr(run, "batches", spoilt)
        with pytest.raises(errors.RankError, match=r"\A[^\n]*shard-[^\n]*this cache file is damaged[^\n]*\Z"):
            runs.run(script, *flags)
    rows = runs.run(script, *flags, "--resume_from_checkpoint", "latest")
    assert len(rows) == 2, "what was damaged is encoded anew"


def test_one_image_under_two_captions_is_encoded_once(recipe, mixed, tmp_path):
    script, flags = recipe
    folder = tmp_path / "twice"
    shutil.copytree(mixed, folder)
    lines = [{"file_name": "0.png", "text": text} for text in ("the sun", "a red apple")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = [*flags, "--center_crop", "--cache_dir", tmp_path / "cache", "--train_data_dir", folder]
    _, data, _ = prepared(script, *words, "--output_dir", tmp_path / "out")
    assert len(data.images) == 2 and len(data.latents) == 1 and len(data.prompts) == 3


def test_no_room_for_the_cache_is_said_before_anything_is_loaded(recipe, tmp_path, monkeypatch):
    script, flags = recipe
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    forbid_loading(monkeypatch, script)
    with pytest.raises(errors.DataError, match="--cache_dir"):
        runs.run(script, *flags, "--center_crop", "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out")
    assert not list(tmp_path.rglob("shard-*"))


def test_the_predicted_size_is_the_size(recipe, tmp_path):
    """What the plan says that encodings will take is what the shards then take, to a few per cent."""
    script, flags = recipe
    words = [*flags, "--center_crop", "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out"]
    args, data, _ = prepared(script, *words)

    predicted = sum(
        latent_bytes(data.framing.sizes[bucket], script.latent_channels(args.base_model), 8)
        for bucket in data.framing.buckets
    )
    predicted += len(data.prompts) * script.prompt_bytes(args, torch.float32)
    found = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("shard-*"))
    headers = sum(
        int.from_bytes(path.read_bytes()[:8], "little") + 8 for path in (tmp_path / "cache").rglob("shard-*")
    )
    assert predicted == pytest.approx(found - headers, rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Messy folders


def test_bad_images_are_refused_or_left_out_before_weights_load(recipe, mixed, tmp_path, monkeypatch):
    script, flags = recipe
    folder = tmp_path / "bad"
    shutil.copytree(mixed, folder)
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:200])
    words = [*flags, "--center_crop", "--train_data_dir", folder, "--max_train_steps", 1]
    with monkeypatch.context() as patch:
        for name in ("build_denoiser", "load_vae", "load_text_encoders"):
            patch.setattr(script, name, lambda *args, name=name: pytest.fail(f"{name} was called"))
        with pytest.raises(errors.DataError, match=r"(?s)0\.png.*--on_bad_image skip"):
            runs.run(script, *words, "--output_dir", tmp_path / "a")
        with pytest.raises(errors.DataError, match="--strict"):
            runs.run(script, *words, "--on_bad_image", "skip", "--strict", "--output_dir", tmp_path / "a")
    runs.run(script, *words, "--on_bad_image", "skip", "--output_dir", tmp_path / "b")
    report = json.loads((tmp_path / "b" / "data_report.json").read_text())
    assert report["images"] == 8 and report["bad"][0][0] == "0.png" and report["remarks"]
    assert sum(bucket["images"] for bucket in report["buckets"]) == 8 and report["truncated"] == dict.fromkeys(
        report["truncated"], 0
    )


def test_truncated_captions_are_counted_for_each_encoder(recipe, mixed, tmp_path, capsys):
    script, flags = recipe
    folder = tmp_path / "long"
    shutil.copytree(mixed, folder)
    lines = [{"file_name": "0.png", "text": "green leaves " * 90}, {"file_name": "2.png", "text": "the sun"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prompts = ["--validation_prompt", "a sun", "blue " * 90]
    for _ in range(2):  # the second time from the cache
        args = script.parse_args([*flags, "--train_data_dir", str(folder), "--dry_run", "--output_dir", str(tmp_path),
                                  *prompts])  # fmt: skip
        AcceleratorState._reset_state(True)
        script.main(args, *scan_module.find_images(data_source(args)))
        said = capsys.readouterr().out
        assert "1 of them by tokenizer, 1 of them by tokenizer_2" in said
        assert said.count("warning: the validation prompt") == 1 and "prompt 'blue blue" in said


def test_tags_and_trigger_words_reach_the_model(recipe, mixed, tmp_path):
    """What is drawn is among what was encoded, in several orders, the trigger word first."""
    script, flags = recipe
    folder = tmp_path / "tags"
    shutil.copytree(mixed, folder)
    lines = [{"file_name": f"{number}.png", "text": "dog, red, blue, sea, sun"} for number in (0, 2)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["--center_crop", "--train_data_dir", folder, "--trigger_word", "sks", "--shuffle_tags", "--keep_tags", 1]
    args, data, accelerator = prepared(script, *flags, *words, "--tag_shuffles", 4, "--output_dir", tmp_path / "out")
    drawn = {text for batch in run.batches(args, data, accelerator, 0, 30) for text in batch["caption"]}
    assert drawn == set(data.captions.texts(["dog, red, blue, sea, sun"])) and len(drawn) > 2
    assert all(text.startswith("sks, dog, ") for text in drawn)


def test_remarks_on_held_out_images_are_heard(request, pictures, tmp_path):
    model = request.getfixturevalue("sdxl_folder")
    held_out = shutil.copytree(pictures, tmp_path / "held-out")
    (held_out / "01.png").write_bytes(b"")
    flags = ["--pretrained_model_name_or_path", model, "--train_data_dir", pictures, "--cache_dir", tmp_path / "cache",
             "--resolution", 64, "--validation_data_dir", held_out, "--on_bad_image", "skip"]  # fmt: skip
    args = train_sdxl_lpl.parse_args([str(flag) for flag in [*flags, "--strict"]])
    scan, images = scan_module.find_images(data_source(args))
    report = report_module.build_report(scan, images, flags_module.framing_rules(args), args.train_batch_size)
    remarks = report["remarks"]
    assert len(images) == 5
    assert "--validation_data_dir: 1 of the images are left out." in remarks
    with pytest.raises(errors.DataError, match="--strict"):
        report_module.refuse_remarks(report)
