"""Fixtures: a tiny random SDXL pipeline and a folder of pictures, built once."""

import os
import shutil
import sys
import tempfile

import pytest

from tests import children

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each of hundreds of processes compiles the project anew
sys.dont_write_bytecode = False
os.environ["OMP_NUM_THREADS"] = "1"  # the last bits of a sum follow from it; and the tests fill the cores themselves

# Whoever runs the tests: their token, their settings of accelerate, their caches and their proxy do not matter.
for name in list(os.environ):
    if name.startswith(("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_", "ACCELERATE_", "FSDP_")):
        del os.environ[name]
HOME = tempfile.mkdtemp(prefix="lpl-tests-")
os.environ |= {"HF_HOME": f"{HOME}/huggingface", "XDG_CACHE_HOME": f"{HOME}/cache", "HF_HUB_OFFLINE": "1",
               "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}  # fmt: skip


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    """A random SDXL pipeline on disk (epsilon-prediction)."""
    from tests.tiny_models import sdxl_pipeline

    folder = tmp_path_factory.mktemp("models") / "sdxl"
    sdxl_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def feature_networks(sdxl_folder, tmp_path_factory):
    """{flag: folder} of a classifier and a tiny decoder for the latents of the random SDXL."""
    from lpl_finetuning.families import SDXL
    from tests.tiny_models import save_feature_networks

    return save_feature_networks(tmp_path_factory.mktemp("networks"), sdxl_folder, SDXL)


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory):
    """A random SD3 pipeline on disk, with three text encoders."""
    from tests.tiny_models import sd3_pipeline

    folder = tmp_path_factory.mktemp("models") / "sd3"
    sd3_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def singles(tmp_path_factory):
    """{family: single file of a tiny example, in float16}"""
    from lpl_finetuning.results.export import save_single_file
    from tests.runs import ROOT

    folder = tmp_path_factory.mktemp("singles")
    files = {family: folder / f"{family}.safetensors" for family in ("sdxl", "sd3")}
    for family, file in files.items():
        save_single_file(ROOT / "examples" / f"tiny-{family}", file)
    return files


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Six captioned pictures of 64 px."""
    from tests.tiny_models import picture_folder

    return picture_folder(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """One cache for all runs of a session, so that most of them encode nothing."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """The folder of scans in a cache of the test's own, outside its data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/lpl/scans"


@pytest.fixture
def flags(sdxl_folder, pictures, cache_dir):
    """The flags that every run of the SDXL recipe shares."""
    return (
        f"--pretrained_model_name_or_path {sdxl_folder} --train_data_dir {pictures} --cache_dir {cache_dir} "
        "--resolution 64 --train_batch_size 4 --lr_warmup_steps 0 --learning_rate 1e-3 --report_to none --seed 3 "
        "--logging_steps 1 --mixed_precision no"
    ).split()


@pytest.fixture(autouse=True)
def nothing_goes_on():
    """What a test has started and not ended, because it failed, ends with it."""
    yield
    children.end_all()


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write the golden curves anew")
    parser.addoption("--slow", action="store_true", help="also what another test tries in another form")
    parser.addoption("--gpu", action="store_true", help="let tests see a GPU: for those that need one")


def pytest_configure(config):
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # curves and refusals are those of a CPU


LONG = ("sdxl_options", "train_sdxl", "guard", "chaos", "train_sd3", "readme", "zero", "scaling", "publishing",
        "run_data", "article", "recipes", "evaluate_models", "measures", "third_family", "checkpoints", "base_model",
        "lpl", "memory", "preview", "export", "store", "safety", "uncertainty", "hub", "images", "scan")  # fmt: skip


def pytest_collection_modifyitems(config, items):
    """Files that take minutes come first, the longest ahead, so that parallel workers end together."""
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes long; see --slow"))
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


def pytest_unconfigure():
    children.end_all()
    children.SERVER.close()
    children.LIGHT_SERVER.close()
    shutil.rmtree(HOME, ignore_errors=True)
