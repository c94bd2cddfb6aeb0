"""Flags that a GPU can't follow are refused by its compute capability, before weights load."""

import json

import pytest
import torch

import train_sd3_lpl_flow
import train_sdxl_lpl
from lpl_finetuning import flag_checks
from lpl_finetuning.errors import UserError
from lpl_finetuning.training import machine
from lpl_finetuning.training.machine import Card, check_cards, has_kernels

T4, V100, A100 = (Card(name, capability, ("sm_70", "sm_75", "sm_80", "sm_90"))
                  for name, capability in (("Tesla T4", (7, 5)), ("V100", (7, 0)), ("A100", (8, 0))))  # fmt: skip
P100 = Card("P100", (6, 0), ("sm_60",))


@pytest.fixture
def parsed(flags, tmp_path, monkeypatch):
    """Function from flags to those of a run, on a machine that has every package."""
    for name in ("is_installed", "is_for_cpus_only"):
        monkeypatch.setattr(flag_checks, name, lambda *_, value=name == "is_installed": value)
    monkeypatch.setattr(machine, "is_installed", lambda package: True)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)

    def parse(*more, **quantization):
        if quantization:
            path = tmp_path / "quantization.json"
            path.write_text(json.dumps(quantization))
            more = [*more, "--use_lora", "--bnb_quantization_config_path", path]
        return train_sdxl_lpl.parse_args([*flags, *map(str, more)])

    return parse


REFUSED = [  # (GPU, flags, quantization, words of the message)
    (T4, ["--mixed_precision", "bf16"], {}, "--mixed_precision bf16: Tesla T4 .compute capability 7.5. does not"),
    (V100, ["--lpl_vae_dtype", "bfloat16", "--use_lpl"], {}, "--lpl_vae_dtype bfloat16: V100"),
    (T4, [], {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}, "bnb_4bit_compute_dtype bfloat16 in"),
    (V100, [], {"load_in_8bit": True}, "V100 .* does not multiply in 8 bits.*use load_in_4bit"),
    (P100, ["--torch_compile"], {}, "--torch_compile: P100 .* is too old"),
    (Card("RTX 5090", (12, 0), A100.kernels), [], {}, "has no kernels for this GPU, only for sm_70"),
]


@pytest.mark.parametrize(("card", "more", "quantization", "words"), REFUSED)
def test_what_a_gpu_cannot_do(parsed, card, more, quantization, words):
    with pytest.raises(UserError, match=words):
        check_cards(parsed(*more, **quantization), [A100, card])


def test_what_it_can(parsed, capsys, monkeypatch):
    monkeypatch.setattr(machine, "computes_bfloat16", lambda: True)
    check_cards(parsed("--mixed_precision", "bf16", "--torch_compile", "--allow_tf32"), [A100])
    check_cards(parsed("--mixed_precision", "fp16", load_in_4bit=True), [T4, V100])
    check_cards(parsed("--mixed_precision", "bf16"), [])  # this CPU
    assert "warning" not in capsys.readouterr().err
    check_cards(parsed("--allow_tf32"), [T4])
    assert "warning: --allow_tf32 does nothing" in capsys.readouterr().err


@pytest.mark.parametrize(("has_gpu", "computes", "told"), [(False, False, True), (True, False, False),
                                                           (False, True, False)])  # fmt: skip
def test_a_cpu_that_emulates_bfloat16_is_told(has_gpu, computes, told, parsed, monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_gpu)
    monkeypatch.setattr(machine, "computes_bfloat16", lambda: computes)
    check_cards(parsed("--mixed_precision", "bf16"), [])
    said = capsys.readouterr().err
    assert said.startswith("warning: --mixed_precision bf16: this CPU emulates") is told and bool(said) is told
    check_cards(parsed("--mixed_precision", "no"), [])
    check_cards(parsed("--mixed_precision", "bf16"), [A100])
    assert not capsys.readouterr().err


def test_accelerates_own_precision_counts(parsed, monkeypatch):
    """The recipe's flag is absent: the precision is that of `accelerate config`."""
    args = parsed("--mixed_precision", "no").but(mixed_precision=None)
    check_cards(args, [T4])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="accelerate's mixed_precision bf16: Tesla T4"):
        check_cards(args, [T4])


def test_the_compiler_needs_triton(parsed, monkeypatch):
    monkeypatch.setattr(machine, "is_installed", lambda package: False)
    with pytest.raises(UserError, match="--torch_compile: the package triton is not installed"):
        check_cards(parsed("--torch_compile"), [A100])


@pytest.mark.parametrize(("capability", "kernels", "runs"), [
    ((8, 6), ["sm_80"], True),  # the same major version
    ((8, 0), ["sm_86"], False),
    ((9, 0), ["sm_80", "compute_80"], True),  # compiled anew
    ((9, 0), ["sm_80"], False),
    ((7, 5), ["sm_80", "compute_80"], False),
    ((9, 0), ["sm_90a"], True),
    ((12, 0), ["sm_90a", "sm_120"], True),
    ((12, 1), ["sm_90a"], False),
    ((7, 5), [], True),  # a build that does not tell
])  # fmt: skip
def test_kernels_of_a_build(capability, kernels, runs):
    assert has_kernels(capability, kernels) == runs


def test_xformers_takes_one_dtype_only(parsed, flags, sd3_folder, tmp_path):
    """Queries and keys that are float32 beside values in half precision: a quantized base, SD3.5 trained whole."""
    xformers = "--enable_xformers_memory_efficient_attention"
    with pytest.raises(UserError, match=f"and {xformers} exclude each other"):
        parsed(xformers, load_in_4bit=True)
    from tests.tiny_models import sd3_pipeline

    sd3_pipeline(t5=False, sd35=True).save_pretrained(tmp_path / "sd35")

    def sd3(folder, *more):
        train_sd3_lpl_flow.parse_args([*flags, "--pretrained_model_name_or_path", str(folder), xformers, *more])

    with pytest.raises(UserError, match="queries and keys of this transformer are float32, its values bf16"):
        sd3(tmp_path / "sd35", "--mixed_precision", "bf16")
    sd3(tmp_path / "sd35", "--mixed_precision", "bf16", "--use_lora")
    sd3(tmp_path / "sd35", "--mixed_precision", "no")
    sd3(sd3_folder, "--mixed_precision", "bf16")
