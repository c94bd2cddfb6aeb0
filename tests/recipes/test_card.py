"""Whole runs with all weights on a device that refuses to mix with the CPU, as a GPU does.

Training, validation, checkpoints, resuming and every export run on the card of `tests.card`.
"""

from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import train_sd3_lpl_flow
import train_sdxl_lpl
from lpl_finetuning.training import validation
from tests.card import CARD, OnCard, card
from tests.runs import run

KOHYA = "pytorch_lora_weights_kohya.safetensors"
LORA = ["--use_lora", "--output_kohya_format"]
CASES = {  # (script, flags, a file of the result)
    "sdxl lora": (train_sdxl_lpl, [*LORA, "--train_text_encoder"], KOHYA),
    "sdxl full": (train_sdxl_lpl, ["--single_file", "--use_ema", "--offload_ema"], "model.safetensors"),
    "sd3 lora of q and v": (train_sd3_lpl_flow, [*LORA, "--lora_layers", "to_q,add_v_proj"], KOHYA),
    "sd3 full": (train_sd3_lpl_flow, ["--single_file"], "model.safetensors"),
}


@pytest.mark.parametrize("case", [
    "sdxl full", "sd3 lora of q and v",
    *(pytest.param(case, marks=pytest.mark.slow) for case in ("sdxl lora", "sd3 full")),
])  # fmt: skip
def test_a_whole_run_on_a_card(case, flags, sd3_folder, tmp_path):
    script, more, file = CASES[case]
    if script is train_sd3_lpl_flow:
        flags = [*flags, "--pretrained_model_name_or_path", str(sd3_folder)]
    flags = [*flags, *more, "--use_lpl", "--validation_epochs", "50", "--validation_split", "2",
             "--validation_prompt", "a dog",
             "--num_validation_images", "1", "--gradient_checkpointing", "--train_batch_size", "1",
             "--output_dir", str(tmp_path)]  # fmt: skip
    script.load_text_encoders(script.parse_args(flags), torch.float32, "cpu")  # transformers' first, outside the card
    few = mock.patch.object(validation, "HELD_OUT_LEVELS", 2)
    with card(), few, mock.patch.object(script, "print_plan"):
        run(script, *flags, "--max_train_steps", 1, "--checkpointing_steps", 1)
        rows = run(script, *flags, "--max_train_steps", 2, "--resume_from_checkpoint", "latest")
    assert any("validation/diffusion_loss" in row for row in rows)
    assert load_file(tmp_path / file)
    assert (tmp_path / "validation" / "step-2.png").is_file()


def test_the_card_refuses_to_mix():
    """As a GPU does: only numbers alone may come from the CPU; nothing reads its memory but `.cpu()`."""
    with card():
        here, there = torch.arange(3.0), torch.arange(3.0, device=CARD)
        assert isinstance(there, OnCard) and there.device == CARD
        for mixed in (
            lambda: here + there,
            lambda: torch.cat([there, here]),
            lambda: there.index_select(0, here.long()),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        assert torch.equal((there + torch.tensor(1.0)).cpu(), here + 1)
        assert torch.equal((there + here.to(CARD)).cpu(), 2 * here)
        with pytest.raises(RuntimeError):
            there.numpy()
