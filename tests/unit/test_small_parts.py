"""Small functions about base models, data and recipes: fingerprints, layers, the Hub, counts, tables, paths."""

import os
import shutil
import time

import numpy as np
import pytest
from huggingface_hub import constants

import train_sdxl_lpl
from lpl_finetuning import base_model
from lpl_finetuning.base_model import (
    BaseModel,
    check_part,
    model_digest,
    offline_without_hub,
    require_layers,
    weights_fingerprint,
)
from lpl_finetuning.data.encoding import count_missing
from lpl_finetuning.data.samples import FramingRules
from lpl_finetuning.data.tables import OLD_SECONDS, _remove_old
from lpl_finetuning.errors import UserError
from lpl_finetuning.families import SDXL
from tests.runs import ROOT

EXAMPLE = ROOT / "examples" / "tiny-sdxl"


def test_models_that_differ_in_one_of_several_files(tmp_path):
    digests = set()
    for number, (config, weights) in enumerate([("a", "a"), ("b", "a"), ("a", "b")]):
        folder = tmp_path / str(number)
        (folder / "vae").mkdir(parents=True)
        (folder / "vae" / "config.json").write_text(config)
        (folder / "vae" / "model.safetensors").write_text(weights)
        digests.add(model_digest(folder, "vae"))
    assert len(digests) == 3


def test_weights_that_differ_at_their_ends_only(tmp_path):
    found = set()
    for end in (b"a", b"b"):
        folder = tmp_path / end.decode() / "unet"
        folder.mkdir(parents=True)
        (folder / "diffusion_pytorch_model.safetensors").write_bytes(bytes(100_000) + end)
        found.add(weights_fingerprint(BaseModel(SDXL, str(folder.parent))))
    assert len(found) == 2


def test_the_end_of_a_layers_name_begins_at_a_dot():
    layers = ["down_blocks.0.attn1.to_q", "to_k"]
    require_layers("unet", ["to_q", "attn1.to_q", "to_k"], layers)
    for wrong in ("o_q", "1.to_q", "attn1"):
        with pytest.raises(UserError, match=f"no layer called {wrong}"):
            require_layers("unet", [wrong], layers)


@pytest.mark.parametrize("before", [False, True])
def test_the_hubs_client_is_as_before(monkeypatch, before):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", before)
    monkeypatch.setattr(base_model, "hub_problem", lambda: "it can't be reached")
    with offline_without_hub():
        assert constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE is before


def test_the_same_key_counts_once():
    items = [("a", 1), ("b", 2), ("a", 1), ("there", 4)]
    assert count_missing({"there"}, items, lambda size: size) == (2, 3)


@pytest.mark.parametrize("held_out", [False, True])
def test_held_out_images_are_not_mirrored(held_out):
    framing = FramingRules(resolution=64, random_flip=True).framing([], held_out=held_out)
    assert framing.random_flip == (not held_out)
    assert framing.center_crop == held_out
    assert isinstance(framing.buckets, np.ndarray)


def test_a_table_that_was_read_lately_stays(tmp_path):
    now = time.time()
    old = now - OLD_SECONDS - 1000
    ages = {"images-read.sqlite": (now, old), "images-opened.sqlite": (old, now), "images-old.sqlite": (old, old),
            "images-used.sqlite": (old, old)}  # fmt: skip
    for name, times in ages.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, times)
    _remove_old(tmp_path, tmp_path / "images-used.sqlite")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(ages.keys() - {"images-old.sqlite"})


def test_a_path_in_a_recipe_is_seen_from_its_folder(tmp_path, monkeypatch):
    (tmp_path / "mine" / "pictures").mkdir(parents=True)
    (tmp_path / "elsewhere" / "others").mkdir(parents=True)
    (tmp_path / "mine" / "recipe.yaml").write_text("train_data_dir: pictures\ninit_lora: others\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = train_sdxl_lpl.build_parser().read_recipe(tmp_path / "mine" / "recipe.yaml")
    assert recipe == {"train_data_dir": str((tmp_path / "mine" / "pictures").resolve()), "init_lora": "others"}


def test_a_part_on_the_hub_is_found_without_network(tmp_path, monkeypatch):
    """In the cache, alone or in a pipeline; what was found stays found when the network is lost."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("lpl_finetuning.base_model.hub_problem", lambda: "HF_HUB_OFFLINE is set")
    for name, part in (("alone", ""), ("piped", "vae")):
        folder = tmp_path / f"models--me--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("a" * 40)
        shutil.copytree(EXAMPLE / "vae", folder / "snapshots" / ("a" * 40) / part, dirs_exist_ok=True)
        base = BaseModel(SDXL, str(EXAMPLE), vae=f"me/{name}")
        assert check_part("flag", f"me/{name}", "AutoencoderKL", "vae").is_file()
        shutil.rmtree(folder)
        assert base.place("vae")[:2] == (f"me/{name}", part), "without the files too"
    with pytest.raises(UserError, match="not in the Hub's cache"):
        check_part("flag", "me/nowhere", "AutoencoderKL", "vae")
