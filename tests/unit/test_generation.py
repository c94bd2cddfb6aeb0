"""Pictures for captions: the same for every batch size and order, kept, never mixed with those of other settings."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lpl_finetuning.errors import UserError
from lpl_finetuning.evaluation.generation import GenerationSettings, generate, picture_seed, start_noise
from lpl_finetuning.evaluation.models import find_source, load_pipeline

CAPTIONS = {"apple": "a red apple", "b/dog": "a photo of a dog", "sun": "the sun", "tree": "green leaves", "x": ""}
QUICK = {"steps": 2, "guidance": (1.0, 3.0)}


@pytest.fixture(scope="module")
def pipelines(sdxl_folder, sd3_folder):
    """{family: a loaded pipeline}"""
    return {folder.name: load_pipeline(find_source(str(folder)), torch.float32, "cpu")
            for folder in (sdxl_folder, sd3_folder)}  # fmt: skip


def pictures_of(folder):
    """{name: int16 (H, W, 3)}"""
    return {path.relative_to(folder).as_posix(): np.asarray(Image.open(path), np.int16)
            for path in sorted(folder.rglob("*.png"))}  # fmt: skip


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_batch_size_and_what_is_there_change_nothing(family, pipelines, tmp_path):
    pipeline = pipelines[family]
    folders = generate(pipeline, CAPTIONS, GenerationSettings(**QUICK, batch_size=1), tmp_path / "one", bar=False)
    assert folders == {1.0: tmp_path / "one/guidance-1", 3.0: tmp_path / "one/guidance-3"}
    generate(pipeline, CAPTIONS, GenerationSettings(**QUICK, batch_size=4), tmp_path / "four", bar=False)
    some = {stem: CAPTIONS[stem] for stem in ("sun", "apple")}
    generate(pipeline, some, GenerationSettings(**QUICK), tmp_path / "later", bar=False)
    kept = (tmp_path / "later/guidance-1/sun.png").stat().st_mtime_ns
    generate(pipeline, CAPTIONS, GenerationSettings(**QUICK), tmp_path / "later", bar=False)
    assert (tmp_path / "later/guidance-1/sun.png").stat().st_mtime_ns == kept, "made again"
    one, four, later = (pictures_of(tmp_path / name) for name in ("one", "four", "later"))
    assert one.keys() == four.keys() == later.keys() and len(one) == 10
    for name in one:
        assert one[name].shape == (64, 64, 3)
        assert np.abs(one[name] - four[name]).max() <= 1 and np.abs(one[name] - later[name]).max() <= 1
    assert np.abs(one["guidance-1/sun.png"] - one["guidance-3/sun.png"]).max() > 0
    assert np.abs(one["guidance-1/sun.png"] - one["guidance-1/apple.png"]).max() > 5


def test_every_model_starts_from_the_same_noise(pipelines):
    first = start_noise(pipelines["sdxl"], 0, "sun", (64, 64))
    assert torch.equal(first, start_noise(pipelines["sdxl"], 0, "sun", (64, 64)))
    assert not torch.equal(first, start_noise(pipelines["sdxl"], 1, "sun", (64, 64)))
    assert start_noise(pipelines["sd3"], 0, "sun", (64, 128)).shape == (1, 16, 8, 16)
    assert picture_seed(0, "sun") == 7494942763238489032, "another seed would be another picture for all users"
    assert all(0 <= picture_seed(seed, "x") < 2**63 for seed in range(100))


def test_the_record(pipelines, tmp_path):
    pipeline, settings = pipelines["sdxl"], GenerationSettings(steps=1, guidance=(1.0,))
    some = {"sun": "the sün"}
    generate(pipeline, some, settings, tmp_path, "model A", bar=False)
    found = json.loads((tmp_path / "generation.json").read_text(encoding="utf-8"))
    assert found == {"model": "model A", "prediction": "epsilon", "sampler": "DDIMScheduler", "steps": 1,
                     "size": [64, 64], "seed": 0, "dtype": "float32", "captions": some}  # fmt: skip
    assert Image.open(tmp_path / "guidance-1/sun.png").text["caption"] == "the sün"
    for changes, model, captions, message in (
        ({"steps": 2}, "model A", some, "steps 1, not 2"),
        ({"seed": 1}, "model A", some, "seed 0, not 1"),
        ({"size": (128, 64)}, "model A", some, "size"),
        ({"sampler": "euler"}, "model A", some, "sampler DDIMScheduler, not EulerDiscreteScheduler"),
        ({}, "model B", some, "model model A, not model B"),
        ({}, "model A", {"sun": "the moon"}, "other captions, such as sun"),
    ):
        other = GenerationSettings(**{"steps": 1, "guidance": (1.0,), **changes})
        with pytest.raises(UserError, match=message):
            generate(pipeline, captions, other, tmp_path, model, bar=False)
    generate(pipeline, some, GenerationSettings(1, (1.0, 2.0), batch_size=3), tmp_path, "model A", bar=False)
    assert (tmp_path / "guidance-2/sun.png").is_file(), "another guidance and batch size fit"


def test_what_is_refused(pipelines, tmp_path):
    pipeline = pipelines["sd3"]
    with pytest.raises(UserError, match="multiples of 16"):
        generate(pipeline, CAPTIONS, GenerationSettings(size=(64, 72)), tmp_path / "a", bar=False)
    for stem in ("../out", "/out", "a/../../out"):
        with pytest.raises(UserError, match="leads out of the folder"):
            generate(pipeline, {stem: ""}, GenerationSettings(), tmp_path / "b", bar=False)
    (tmp_path / "c").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "c" / "x.png")
    with pytest.raises(UserError, match=r"no generation\.json"):
        generate(pipeline, CAPTIONS, GenerationSettings(), tmp_path / "c", bar=False)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/generation.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        generate(pipeline, CAPTIONS, GenerationSettings(), tmp_path / "d", bar=False)


def test_what_is_not_finite_is_refused(pipelines, tmp_path, monkeypatch):
    pipeline = pipelines["sdxl"]
    monkeypatch.setattr(
        pipeline.vae, "decode", lambda z: type("", (), {"sample": torch.full((1, 3, 64, 64), torch.nan)})
    )
    with pytest.raises(UserError, match="not finite"):
        generate(pipeline, {"a": ""}, GenerationSettings(1, (1.0,)), tmp_path, bar=False)
    assert not list(tmp_path.rglob("*.png"))
