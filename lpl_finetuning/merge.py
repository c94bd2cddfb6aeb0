"""Add a LoRA, DoRA, LoHa or LoKr to the weights of its base model: a whole pipeline, which needs no adapter.

    python -m lpl_finetuning.merge stabilityai/stable-diffusion-xl-base-1.0 my-lora my-model
    python -m lpl_finetuning.merge my-base lora.safetensors my-model --strength 0.8 --single_file

The LoRA is a file, a folder or a name on the Hub, in the format of diffusers, PEFT, sd-scripts or LyCORIS.
"""

import os
import shutil
from pathlib import Path

from lpl_finetuning.errors import counted, errors_for_people, first_names, quiet_libraries, require
from lpl_finetuning.evaluation.models import EvaluatedModel, check_evaluated, family_of, opened
from lpl_finetuning.files import follow_umask
from lpl_finetuning.flags import SAVE_DTYPES, FlagParser
from lpl_finetuning.lora_files import ADAPTER, SINGLE_FILE, check_lora, find_lora, put_lora, read_lora


def build_parser():
    """The flags of the command."""
    parser = FlagParser(__doc__)
    add = parser.add_argument
    add("base", help="the base model: folder or Hub name of a pipeline, or a whole model in a single file")
    add("lora", help="what is added to it: a file, folder or Hub name")
    add("folder", help="new folder for the result")
    add("--config_from", help="folder or Hub name of a pipeline with what a single file lacks: configurations, "
        "tokenizers, text encoders")  # fmt: skip
    add("--strength", type=float, default=1.0, help="share of the change that is added (default: %(default)s)")
    add("--save_dtype", choices=SAVE_DTYPES, help="dtype of the result (default: that of the base model's files)")
    add("--single_file", action="store_true", help=f"write {SINGLE_FILE} for ComfyUI and (SDXL) A1111 too")
    return parser


class Base(EvaluatedModel):
    """A pipeline that something is merged into. Messages name it instead of a flag."""

    def flag(self, part=None):
        """The base model as it was given, whichever the part."""
        return self.text


def checked(args):
    """The base model of the flags; it, the LoRA and the folder are checked as far as small files tell."""
    folder = Path(args.folder)
    require(not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
            f"{folder} is there already; name a new folder")  # fmt: skip
    require(not args.config_from or Path(args.base).is_file(),
            f"--config_from is for a base model in a single file, and {args.base} is none")  # fmt: skip
    family = family_of(args.base, args.base)
    check_lora(args.lora, args.lora, family)
    return check_evaluated(opened(Base(family, args.base, text=args.base), args.config_from))


def add_lora(pipeline, base, lora, strength):
    """Add a LoRA's changes to the weights of a pipeline; returns {part: number of layers}.

    Args:
        lora: file, folder or name on the Hub; strength: factor of the change.
    """
    family = base.family
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


def save_merged(pipeline, folder, single_file):
    """Write a pipeline's folder, which is complete or not there."""
    from lpl_finetuning.results.export import save_single_file

    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        pipeline.save_pretrained(temporary)
        if single_file:
            save_single_file(pipeline, temporary / SINGLE_FILE)
        for place in (temporary, *temporary.iterdir()):
            follow_umask(place)
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv=None):
    """The command: exit status 0, or 2 for a mistake of the user's."""
    with errors_for_people(False):
        args = build_parser().parse(argv)
        base = checked(args)
        quiet_libraries(False)
        import diffusers
        import torch

        from lpl_finetuning.training.models import load_pipeline

        pipeline = load_pipeline(base, getattr(diffusers, base.family.pipeline_class))
        counts = add_lora(pipeline, base, args.lora, args.strength)
        if args.save_dtype:
            pipeline.to(dtype=getattr(torch, args.save_dtype))
        save_merged(pipeline, Path(args.folder), args.single_file)
        parts = ", ".join(f"{counted(count, 'layer')} of the {part}" for part, count in counts.items())
        print(f"{args.folder} is {args.base} with the changes of {args.lora}: {parts}")


if __name__ == "__main__":
    main()
