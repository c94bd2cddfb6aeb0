"""--validation_metrics in both recipes: the one-step test and KID, in the log, in run.png and on the card."""

import pytest
import torch

from lpl_finetuning.data.scan import find_images
from lpl_finetuning.errors import UserError
from lpl_finetuning.evaluation.models import find_source, load_pipeline
from lpl_finetuning.evaluation.networks import DEFAULT_NETWORK, load_network
from lpl_finetuning.evaluation.onestep import LEVELS, OneStepSettings, one_step_of
from lpl_finetuning.flags import data_source
from lpl_finetuning.training import measures
from tests import sd3, sdxl
from tests.tiny_models import picture_folder

MORE = ["--max_validation_samples", 4, "--resolution", 64, "--mixed_precision", "no"]


class Colours:
    """A feature network: means over squares of 16 px."""

    name, dims = "colours", 48

    def stages(self, images):
        return [torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2).float() + 1, 16)]

    def __call__(self, images):
        return self.stages(images)[0].flatten(1)


@pytest.mark.parametrize("family", ["sdxl", pytest.param("sd3", marks=pytest.mark.slow)])
def test_measures_are_logged_drawn_and_on_the_card(family, request, monkeypatch, tmp_path):
    """Before training they are what `one_step_of` finds for the base model; and no bit of the training changes.

    With the real network for SDXL, and for SD3, to save time, with a small one.
    """
    network = load_network(DEFAULT_NETWORK) if family == "sdxl" else Colours()
    monkeypatch.setattr(measures, "feature_network", lambda device: network)
    script, folder = {"sdxl": sdxl, "sd3": sd3}[family], request.getfixturevalue(f"{family}_folder")
    pictures = picture_folder(tmp_path / "pictures", 6, size=80)
    flags = ["--pretrained_model_name_or_path", folder, "--train_data_dir", pictures, "--cache_dir",
             tmp_path / "cache", "--train_batch_size", 2, "--learning_rate", 1e-3, "--lr_warmup_steps", 0,
             "--report_to", "none", "--validation_data_dir", pictures, "--max_train_steps", 3, "--validation_steps", 1,
             "--logging_steps", 1, *MORE, *(["--max_sequence_length", 256] if family == "sd3" else [])]  # fmt: skip
    rows = script.run(*flags, "--validation_metrics", "--validation_kid_every", 2, "--validation_kid_samples", 6,
                      "--output_dir", tmp_path / "with", pictures=True)  # fmt: skip
    measured = [row for row in rows if "validation/one_step/psnr" in row]
    assert [row["step"] for row in measured] == [0, 1, 2, 3]
    assert [row["step"] for row in rows if "validation/kid" in row] == [0, 2, 3]
    _, held_out = find_images(data_source(script.run.args[0].parse_args([str(flag) for flag in flags])))
    pipeline = load_pipeline(find_source(str(folder)), torch.float32, "cpu")
    expected = one_step_of(pipeline, held_out, 64, OneStepSettings(), [network], bar=False).metrics
    for name, values in expected.items():
        key = f"validation/one_step/{name.replace(' ', '_')}"
        assert measured[0][key] == pytest.approx(values.mean(), rel=1e-3, abs=1e-4), name
        for level, log_snr in enumerate(LEVELS):
            assert measured[0][f"{key}/snr{log_snr:+g}"] == pytest.approx(values[level].mean(), rel=2e-3, abs=1e-3)
    assert measured[0] != {**measured[3], "step": 0}
    assert (tmp_path / "with/run.png").stat().st_size > 10000
    card = (tmp_path / "with/README.md").read_text()
    assert (
        f"| {measured[0]['validation/one_step/psnr']:.4g} -> {measured[3]['validation/one_step/psnr']:.4g} |" in card
    )
    script.run(*flags, "--output_dir", tmp_path / "without")
    assert script.weights(tmp_path / "with") == script.weights(tmp_path / "without")
    assert "before -> after" not in (tmp_path / "without/README.md").read_text()


@pytest.mark.parametrize(
    "more, message",
    [
        ("--validation_metrics", "--validation_metrics measures held-out images"),
        ("--validation_kid_every 3", "--validation_kid_every does nothing"),
        ("--validation_kid_samples 30", "--validation_kid_samples does nothing"),
        ("--validation_metrics --validation_split 2 --validation_kid_every -1", "must be 0 or more"),
        ("--validation_metrics --validation_split 2", "nowhere_to_be_found is not installed.*requirements-eval.txt"),
    ],
)
def test_what_is_refused_before_any_weights_load(more, message, flags, monkeypatch):
    import train_sdxl_lpl

    monkeypatch.setattr("lpl_finetuning.flag_checks.missing_package", lambda name: "nowhere_to_be_found")
    with pytest.raises(UserError, match=message):
        train_sdxl_lpl.parse_args([*flags, *more.split()])


def test_no_package_is_needed_without_kid(flags, monkeypatch):
    import train_sdxl_lpl

    monkeypatch.setattr("lpl_finetuning.flag_checks.missing_package", lambda name: "nowhere_to_be_found")
    more = ["--validation_metrics", "--validation_split", "2", "--validation_kid_every", "0"]
    assert train_sdxl_lpl.parse_args([*flags, *more]).validation_metrics
