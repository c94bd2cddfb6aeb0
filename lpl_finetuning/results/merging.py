"""Adding a LoRA, DoRA, LoHa or LoKr to the weights of a pipeline, and saving it whole."""

import itertools
import json
import os
import shutil
import sys

from safetensors import SafetensorError

from lpl_finetuning.errors import UserError, counted, first_names, require
from lpl_finetuning.files import follow_umask, is_new
from lpl_finetuning.lora_files import ADAPTER, MERGED, find_lora, mark_of, put_lora, read_lora


def merge_result(family, lora, load_base, folder):
    """Write a run's LoRA, the folder `lora`, added to its base model, as a whole pipeline.

    A failure is a warning: the LoRA is written by then, and can be merged by command.

    Args:
        load_base: function that returns the pipeline of the base model.
    """
    try:
        pipeline = load_base()
        counts = add_lora(pipeline, family, str(lora), 1.0)
        save_merged(pipeline, folder, lora)
    except (UserError, OSError, RuntimeError, SafetensorError) as error:
        print(f"\nwarning: --merge_into {folder}: the whole model could not be written ({error}); the LoRA is in "
              f"{lora}, and python -m lpl_finetuning.merge adds it to the base model", file=sys.stderr)  # fmt: skip
        return
    print(f"\n{folder}: the base model with {parts_of(counts)} changed")


def parts_of(counts):
    """{part: number of layers} in words."""
    return ", ".join(f"{counted(count, 'layer')} of the {part}" for part, count in counts.items())


def add_lora(pipeline, family, lora, strength):
    """Add a LoRA's changes to the weights of a pipeline; returns {part: number of layers}.

    Args:
        lora: file, folder or name on the Hub; strength: factor of the change.
    """
    models = {part: getattr(pipeline, part) for part in (family.denoiser.name, *family.text_encoders)}
    read = read_lora(lora, find_lora(lora, lora, family), family, type(pipeline), models)
    return {part: merge_adapter(lora, part, models[part], *found, strength) for part, found in read.items()}


def merge_adapter(flag, part, model, layers, config, strength):
    """Give a model an adapter, add its changes to the weights in float32, and remove it; returns its layers' number.

    Args:
        flag: begins messages; layers, config: an entry of `read_lora`.
    """
    import torch

    from lpl_finetuning.training.models import adapted_layers

    require(not getattr(config, "lora_bias", False), f"{flag}: its layers have a bias (lora_bias), which can't be "
            "added to layers without one: use it as a LoRA")  # fmt: skip
    put_lora(flag, part, model, layers, config, torch.float32)
    names, broken = adapted_layers(model), []
    with torch.no_grad():
        for name in names:
            adapter = model.get_submodule(name)
            layer = adapter.get_base_layer()
            before = layer.weight.data
            layer.weight.data = before.to(torch.float32, copy=True)  # PEFT adds in place
            adapter.merge(adapter_names=[ADAPTER])
            after = torch.lerp(before.float(), layer.weight.data, strength).to(before.dtype)
            layer.weight.data = after
            broken += [] if after.isfinite().all() else [name]
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer)
    del model.peft_config
    model._hf_peft_config_loaded = False
    require(not broken, f"{flag}: {counted(len(broken), 'layer')} of the {part} would not be finite numbers "
            f"({first_names(broken)}); lower --strength")  # fmt: skip
    return len(names)


def save_merged(pipeline, folder, lora=None, save_more=None):
    """Write a pipeline's folder, which is complete or not there; what is there already is set aside, never deleted.

    Args:
        lora: folder of a run, which `merged_from` knows again.
        save_more: function (pipeline, folder) that writes more into the folder.
    """
    folder = folder.resolve()
    temporary = folder.with_name(f".tmp-{folder.name}-{mark_of(lora or folder)}")  # no other run's
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        pipeline.save_pretrained(temporary)
        if save_more:
            save_more(pipeline, temporary)
        if lora:
            (temporary / MERGED).write_text(json.dumps({"lora": mark_of(lora)}) + "\n", encoding="utf-8")
        for place in (temporary, *temporary.iterdir()):
            follow_umask(place)
        set_aside(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def set_aside(folder):
    """Make room for a folder: an empty one is removed, another one gets the next free name NAME-before-N."""
    if not folder.exists():
        return
    if is_new(folder):
        folder.rmdir()
        return
    names = (folder.with_name(f"{folder.name}-before-{number}") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    os.replace(folder, aside)
    print(f"\n{folder} was there; it is {aside} now")
