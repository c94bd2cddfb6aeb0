"""Fixtures: a tiny random SDXL pipeline and a folder of pictures, built once."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["OMP_NUM_THREADS"] = "1"  # the last bits of a sum follow from it; and the tests fill the cores themselves
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    """A random SDXL pipeline on disk (epsilon-prediction)."""
    from tests.tiny_models import sdxl_pipeline

    folder = tmp_path_factory.mktemp("models") / "sdxl"
    sdxl_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory):
    """A random SD3 pipeline on disk, with three text encoders."""
    from tests.tiny_models import sd3_pipeline

    folder = tmp_path_factory.mktemp("models") / "sd3"
    sd3_pipeline().save_pretrained(folder)
    return folder


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


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write the golden curves anew")
