"""What a warm start saves: hashes of large files are kept, one process makes them, and only for what is loaded."""

import json
import multiprocessing
import os
import time

import pytest

import train_sdxl_lpl
from lpl_finetuning import files, stages
from lpl_finetuning.base_model import idle_weights
from lpl_finetuning.data.encoding import model_identity
from lpl_finetuning.files import remembered_sha256, sha256_of
from lpl_finetuning.start import early


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file that counts as large, last changed a while ago, and a cache of its own; (path, log of hashed files)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "LARGE", 10)
    monkeypatch.setattr(files, "SETTLED", 0.2)
    log, real = tmp_path / "log", sha256_of

    def logged(path):
        with open(log, "a") as file:
            file.write(f"{path}\n")
        time.sleep(0.1)
        return real(path)

    monkeypatch.setattr(files, "sha256_of", logged)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"a" * 100)
    time.sleep(0.25)
    log.touch()
    return path, lambda: len(log.read_text().splitlines())


def test_a_file_is_hashed_once(large, tmp_path):
    path, hashed = large
    assert remembered_sha256(path) == remembered_sha256(path) == sha256_of(path)
    assert hashed() == 1
    before = path.stat()
    path.write_bytes(b"b" * 100)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and time as before: the inode's time tells
    time.sleep(0.25)
    assert remembered_sha256(path) == sha256_of(path) and hashed() == 2
    other = tmp_path / "other"
    other.write_bytes(b"c" * 100)
    os.replace(other, path)
    assert remembered_sha256(path) == sha256_of(path)  # just changed: not kept, as the next change may have its stamp
    assert remembered_sha256(path) == sha256_of(path) and hashed() == 4


def test_a_damaged_or_missing_cache_costs_time_only(large, tmp_path, monkeypatch):
    path, hashed = large
    wanted = remembered_sha256(path)
    [kept] = (tmp_path / "cache").rglob("*.json")
    assert json.loads(kept.read_text())["sha256"] == wanted
    for damage in ("{", "[]", '{"path": 1}'):
        kept.write_text(damage)
        assert remembered_sha256(path) == wanted
    assert hashed() == 4
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert remembered_sha256(path) == wanted


def test_one_rank_hashes_for_all(large):
    path, hashed = large
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=remembered_sha256, args=(path,)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * 4 and hashed() == 1


def test_only_what_is_loaded_counts(flags, sdxl_folder, tmp_path):
    import shutil

    folder = shutil.copytree(sdxl_folder, tmp_path / "model")
    args = train_sdxl_lpl.parse_args([*flags, "--pretrained_model_name_or_path", str(folder)])
    before = model_identity(args.base_model, "text_encoder", "tokenizer")
    for name in ("model.fp16.safetensors", "pytorch_model.bin"):
        (folder / "text_encoder" / name).write_bytes(b"not loaded")
    assert {path.name for path in idle_weights(args.base_model, "text_encoder")} == {
        "model.fp16.safetensors", "pytorch_model.bin"}  # fmt: skip
    assert model_identity(args.base_model, "text_encoder", "tokenizer") == before
    (folder / "text_encoder" / "config.json").write_text("{}")
    assert model_identity(args.base_model, "text_encoder", "tokenizer") != before


def test_stages_of_a_start(capsys, monkeypatch, flags):
    """Under --debug alone, up to the first step."""
    monkeypatch.setattr(stages, "LAST", [time.monotonic()])
    monkeypatch.setattr(stages, "SHOWN", [])
    early("__main__", lambda: train_sdxl_lpl.parse_args(flags), find=lambda args: ())
    assert "start-up" not in capsys.readouterr().err
    early("__main__", lambda: train_sdxl_lpl.parse_args([*flags, "--debug"]), find=lambda args: ())
    stages.stage_ended("first step", last=True)
    stages.stage_ended("second step", last=True)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("start-up:")]
    assert [line.split(" s  ")[1] for line in told] == [
        "light imports; flags and base model checked", "pictures found", "first step"]  # fmt: skip
