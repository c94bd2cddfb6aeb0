"""Saved states (no pickle) and autocast for all pretraining scripts."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def save_state(folder, step, model, optimizer, ema=None):
    """Write the state to a temporary folder, then replace the old state by it. ema: None for a model without one."""
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    # copies, since safetensors refuses shared tensors and T5 has its embeddings twice
    tensors = {f"model/{name}": value.clone().contiguous() for name, value in model.state_dict().items()}
    tensors |= {f"ema/{index}": value.contiguous() for index, value in enumerate(ema.shadow_params if ema else ())}
    for index, entries in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer/{index}/{name}": torch.as_tensor(value).contiguous() for name, value in entries.items()
        }
    save_file(tensors, temporary / "state.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": step, "ema_step": ema and ema.optimization_step}))
    folder.mkdir(exist_ok=True)
    for name in ("state.safetensors", "state.json"):
        os.replace(temporary / name, folder / name)


def load_state(folder, model, optimizer, ema=None):
    """Load what `save_state` wrote. Returns the number of steps made, 0 without a saved state."""
    folder = Path(folder)
    if not (folder / "state.json").is_file():
        return 0
    tensors = load_file(folder / "state.safetensors")
    info = json.loads((folder / "state.json").read_text())
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model/")})
    if ema:
        ema.shadow_params = [tensors[f"ema/{index}"] for index in range(len(ema.shadow_params))]
        ema.optimization_step = info["ema_step"]
    state = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, index, entry = name.split("/")
            state.setdefault(int(index), {})[entry] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return info["step"]


def autocast():
    """bfloat16 autocast if the CPU computes in it. Otherwise float32, since emulation is many times slower."""
    computes = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast("cpu", torch.bfloat16, enabled=computes)
