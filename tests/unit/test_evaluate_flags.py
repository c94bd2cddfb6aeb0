"""evaluate_models.py before it imports torch: flags, models and pictures that do not fit."""

import dataclasses
import re
import sys

import numpy as np
import pytest
from PIL import Image

import evaluate_models
from lpl_finetuning.errors import DataError, UserError
from tests import children
from tests.runs import ROOT


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """real: 16 captioned pictures; made: the same names; other: other names; few: too few."""
    place = tmp_path_factory.mktemp("pictures")
    for name, count, prefix in (("real", 16, ""), ("made", 16, ""), ("other", 16, "x"), ("few", 3, "")):
        (place / name).mkdir()
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(place / name / f"{prefix}{number}.png")
            if name == "real":
                (place / name / f"{number}.txt").write_text(f"picture {number}")
    return place


def flags(folders, *more, real="real", model="made"):
    """The least command line, with more flags."""
    return ["--real", str(folders / real), "--model", str(folders / model), "--output", str(folders / "report"),
            *map(str, more)]  # fmt: skip


@pytest.mark.parametrize(("more", "message"), [
    (["--modle", "x"], "unknown flag --modle: did you mean --model?"),
    (["--steps", "0"], "--steps is 0; it must be above 0"),
    (["--steps", "many"], "--steps"),
    (["--size", "-8"], "--size is -8"),
    (["--guidance", "0.5"], "--guidance is 0.5; each must be 1 or more"),
    (["--guidance", "nan"], "--guidance is nan"),
    (["--guidance", "3", "3"], "--guidance has 3.0 twice"),
    (["--seed", "-1"], "--seed is -1"),
    (["--max_pictures", "0"], "--max_pictures is 0"),
    (["--max_captions", "0"], "--max_captions is 0"),
    (["--sampler", "dpm"], "--sampler"),
    (["--held_out", "nowhere"], "--held_out nowhere: there is no such folder"),
    (["--network", "efficientnet-lite2", "--network", "efficientnet-lite2"], "--network has efficientnet-lite2 twice"),
])  # fmt: skip
def test_a_wrong_flag_is_refused(folders, more, message):
    with pytest.raises(UserError, match=re.escape(message)):
        evaluate_models.parse_args(flags(folders, *more))


@pytest.mark.parametrize("name", ["real", "model", "output"])
def test_a_flag_that_is_missing_is_named(folders, name):
    words = flags(folders)
    place = words.index(f"--{name}")
    with pytest.raises(UserError, match=f"--{name} is missing"):
        evaluate_models.parse_args(words[:place] + words[place + 2 :])


def test_folders_that_lie_in_each_other_are_refused(folders):
    words = flags(folders)
    for place, inside in (("real", "--real"), ("made", "--model")):
        words[-1] = str(folders / place / "report")
        with pytest.raises(UserError, match=f"lies in {inside}"):
            evaluate_models.parse_args(words)
    (folders / "file").write_text("")
    words[-1] = str(folders / "file" / "report")
    with pytest.raises(UserError, match="is a file; name a folder"):
        evaluate_models.parse_args(words)
    with pytest.raises(UserError, match="--held_out is the folder of --real"):
        evaluate_models.parse_args(flags(folders, "--held_out", folders / "real"))
    with pytest.raises(UserError, match=r"3 of its 3 pictures are in --real .* too \(0.png, 1.png, 2.png\)"):
        found(folders, "--held_out", folders / "few")  # other files with the same content
    with pytest.raises(UserError, match=r"--model has .* twice"):
        evaluate_models.parse_args(flags(folders, "--model", folders / "made"))


def found(folders, *more, **options):
    return evaluate_models.find_everything(evaluate_models.parse_args(flags(folders, *more, **options)))


def test_finished_pictures_are_paired_by_name(folders, own_cache, capsys):
    [made], real, held_out = found(folders)
    assert made.paired and len(made.images) == len(real) == 16 and held_out is None
    [other], _, _ = found(folders, model="other")
    assert (
        not other.paired
        and "(16 of 16 are missing), so it is compared unpaired, by distances" in capsys.readouterr().out
    )
    assert made.folder(folders) != other.folder(folders)


def test_what_only_models_need_is_refused_for_finished_pictures(folders, own_cache):
    for more in (["--steps", "5"], ["--guidance", "2"], ["--sampler", "own"], ["--dtype", "bfloat16"]):
        with pytest.raises(UserError, match=f"{more[0]} does nothing: all models are folders of finished pictures"):
            found(folders, *more)


def test_too_few_pictures_are_refused(folders, own_cache):
    with pytest.raises(UserError, match="3 pictures are used"):
        found(folders, real="few")
    with pytest.raises(UserError, match="8 pictures are used"):
        found(folders, "--max_pictures", 8)
    with pytest.raises(UserError, match="--max_captions is 8"):
        found(folders, "--max_captions", 8)


def test_models_need_captions_and_finished_pictures_do_not(folders, sdxl_folder, own_cache):
    assert len(found(folders, real="other", model="other")[1]) == 16
    with pytest.raises(DataError, match="no caption"):
        found(folders, "--model", sdxl_folder, real="other")
    [_, model], real, _ = found(folders, "--model", sdxl_folder, "--instance_prompt", "a thing", real="other")
    assert model.images is None and real[0].caption == "a thing"


def test_the_size_is_what_the_models_make(folders, sdxl_folder, own_cache):
    args = evaluate_models.parse_args(flags(folders, "--model", sdxl_folder))
    contenders, *_ = evaluate_models.find_everything(args)
    assert evaluate_models.picture_size(args, contenders) == (64, 64)
    assert evaluate_models.picture_size(args, contenders[:1]) == (32, 32), "of finished pictures"
    assert evaluate_models.picture_size(args.but(size=48), contenders) == (48, 48)


def test_a_model_of_another_training_size_is_told(folders, sdxl_folder, tmp_path, own_cache, capsys):
    """The run's configuration lies beside the result: of the whole run, or above a checkpoint of it."""
    args = evaluate_models.parse_args(flags(folders, "--model", sdxl_folder))
    contenders, *_ = evaluate_models.find_everything(args)
    lora = dataclasses.replace(
        contenders[1], source=dataclasses.replace(contenders[1].source, lora=str(tmp_path / "x"))
    )
    for text, told in (("resolution: 128\n", True), ("resolution: 64\n", False), ("nothing: 1\n", False)):
        (tmp_path / "config.yaml").write_text(f"seed: 1\n{text}")
        evaluate_models.picture_size(args, [contenders[0], lora])
        warned = "was trained at 128 px, and pictures are made at 64 px; --size 128 compares what it learnt"
        assert (warned in capsys.readouterr().err) == told


def test_ctrl_c_says_how_to_go_on(folders, own_cache, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_models, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_models.main(evaluate_models.parse_args(flags(folders)), *found(folders))
    assert "The same command goes on from here" in capsys.readouterr().err


def test_pictures_are_chosen_evenly(folders, own_cache, monkeypatch):
    monkeypatch.setattr(evaluate_models, "FEW_PICTURES", 4)
    _, real, _ = found(folders, "--max_pictures", 4)
    _, everything, _ = found(folders)
    names = [image.name for image in everything]
    assert [image.name for image in real] == [names[place] for place in (0, 5, 10, 15)]


def test_mistakes_are_told_before_torch_is_imported(folders, tmp_path):
    """In a process that refuses to import torch."""
    for more, message in ((["--modle", "x"], "did you mean --model?"), (["--model", "a/b/c"], "--model a/b/c"),
                          (["--network", "efficientnet-lite3"], "--network efficientnet-lite3")):  # fmt: skip
        words = [sys.executable, "evaluate_models.py", *flags(folders, *more, "--cache_dir", tmp_path)]
        result = children.run(words, light=True, cwd=ROOT, text=True, timeout=60)
        assert result.returncode == 2 and message in result.stderr, result.stderr


@pytest.mark.parametrize(("model", "more", "message"), [
    ("tiny-sdxl", ["--steps", "30"], "--steps is 30; under DDIM it must divide 1000, .* give 25 or 40"),
    ("tiny-sdxl", ["--steps", "30", "--sampler", "euler"], None),
    ("tiny-sd3", ["--steps", "30"], None),
    ("tiny-sd3", ["--sampler", "ddim"], "--sampler ddim is not for rectified flow"),
])  # fmt: skip
def test_what_the_sampler_can_not_do_is_told_before_weights_load(folders, model, more, message):
    args = evaluate_models.parse_args(flags(folders, *more, model=ROOT / "examples" / model))
    if message is None:
        evaluate_models.find_everything(args)
        return
    with pytest.raises(UserError, match=message):
        evaluate_models.find_everything(args)
