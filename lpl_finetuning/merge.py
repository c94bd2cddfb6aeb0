"""Add a LoRA, DoRA, LoHa or LoKr to the weights of its base model: a whole pipeline, which needs no adapter.

    python -m lpl_finetuning.merge stabilityai/stable-diffusion-xl-base-1.0 my-lora my-model
    python -m lpl_finetuning.merge my-base lora.safetensors my-model --strength 0.8 --single_file

The LoRA is a file, a folder or a name on the Hub, in the format of diffusers, PEFT, sd-scripts or LyCORIS.
"""

from pathlib import Path

from lpl_finetuning.errors import errors_for_people, quiet_libraries, require
from lpl_finetuning.evaluation.models import EvaluatedModel, check_evaluated, family_of, opened
from lpl_finetuning.files import is_new
from lpl_finetuning.flags import SAVE_DTYPES, FlagParser
from lpl_finetuning.lora_files import SINGLE_FILE, check_lora
from lpl_finetuning.results.merging import add_lora, parts_of, save_merged


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
    require(is_new(args.folder), f"{args.folder} is there already; name a new folder")
    require(not args.config_from or Path(args.base).is_file(),
            f"--config_from is for a base model in a single file, and {args.base} is none")  # fmt: skip
    family = family_of(args.base, args.base)
    check_lora(args.lora, args.lora, family)
    return check_evaluated(opened(Base(family, args.base, text=args.base), args.config_from))


def write_single_file(pipeline, folder):
    """The pipeline as one file in a folder."""
    from lpl_finetuning.results.export import save_single_file

    save_single_file(pipeline, folder / SINGLE_FILE)


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
        counts = add_lora(pipeline, base.family, args.lora, args.strength)
        if args.save_dtype:
            pipeline.to(dtype=getattr(torch, args.save_dtype))
        save_merged(pipeline, Path(args.folder), save_more=write_single_file if args.single_file else None)
        print(f"{args.folder} is {args.base} with the changes of {args.lora}: {parts_of(counts)}")


if __name__ == "__main__":
    main()
