"""The page on memory is what the scripts' own estimate says, for the true architectures."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from lpl_finetuning.training import plan
from tests.runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory

PAGE = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")


def row(model, way, resolution):
    """The figures of a row of the page, in GB."""
    [line] = [line for line in PAGE.splitlines() if line.startswith(f"| {model} | {way} | {resolution} |")]
    return [float(figure) for figure in re.findall(r"([\d.]+) GB", line)]


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("SDXL", 2_567_463_684), ("SD3.5 medium", 2.24e9), pytest.param("SD3.5 large", 8.06e9, marks=pytest.mark.slow)],
)
def test_rows_of_the_page_are_computed_anew(model, parameters):
    """LoRA at 512 px, and by known counts of parameters for all weights: 4 + 4 + 8 bytes each under AdamW."""
    parts = memory.estimate(model, "LoRA, rank 16", 512, lpl=True)
    total, of_the_loss = sum(parts.values()), parts["decoder"] + parts["LPL"]
    figures = [(total - of_the_loss) / 1e9, total / 1e9]
    assert row(model, "LoRA, rank 16", 512)[:2] == pytest.approx(figures, abs=0.051)
    assert row(model, "all weights", 1024)[2] == pytest.approx(16 * parameters / 1e9, rel=0.005)
    assert row(model, "all, 8-bit Adam", 1024)[2] == pytest.approx(10 * parameters / 1e9, rel=0.005)


def test_a_quantized_denoiser_is_counted_in_its_bits(tmp_path):
    """Frozen linear weights in half a byte or one, everything else as it is."""
    frozen, trained = torch.nn.Linear(8, 4).requires_grad_(False), torch.nn.Linear(8, 4)
    models = {"unet": torch.nn.ModuleList([frozen, trained, torch.nn.LayerNorm(4)]), "text_encoder": frozen}
    path = tmp_path / "config.json"
    plain = 4 * (36 + 36 + 8 + 36)
    for content, saved in (('{"load_in_4bit": true}', 32 * 3.5), ('{"load_in_8bit": true}', 32 * 3)):
        path.write_text(content)
        args = SimpleNamespace(bnb_quantization_config_path=path)
        assert plan.weight_bytes(args, models) == plain - saved
    assert plan.weight_bytes(SimpleNamespace(bnb_quantization_config_path=None), models) == plain


def test_the_table_is_whole():
    assert PAGE.count("| SD") == len(memory.MODELS) * len(memory.WAYS) * 2
    for model in memory.MODELS:
        for way in memory.WAYS:
            small, large = row(model, way, 512), row(model, way, 1024)
            assert small[0] < small[1] < large[1] and small[2] == large[2] < small[0]
