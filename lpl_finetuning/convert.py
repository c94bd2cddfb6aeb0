"""Convert a model in a single file, as ComfyUI and A1111 read it, to a folder in diffusers' layout.

    python -m lpl_finetuning.convert model.safetensors my-base
    python -m lpl_finetuning.convert model.safetensors my-base --config_from another-base     # other sizes

What the file says of its prediction goes into the folder's scheduler: the tensors v_pred and ztsnr, and the metadata
of modelspec. The training scripts take single files themselves; a folder is for other programs.
"""

import argparse
import os
import shutil
from pathlib import Path

from lpl_finetuning.errors import counted, errors_for_people, first_names, require
from lpl_finetuning.files import check_free_space, is_new
from lpl_finetuning.flags import FlagParser
from lpl_finetuning.single_file import SDXL_FILE, read_single_file, schedule_of
from lpl_finetuning.unpacking import Unpacked, opened, surplus, with_schedule, write_small


def check_folder(folder):
    """Refuse a folder that has something in it."""
    require(is_new(folder), f"{folder} is there already; name a new folder")


def save_whole(single, folder, files, parts, borrowed, config_from):
    """Write a pipeline's folder, which is complete or not there.

    Args:
        single: the `SingleFile`; files, parts, borrowed: see `opened`; config_from: the flag's value.
    """
    temporary = folder.with_name(f".tmp-{folder.name}")
    unpacked = Unpacked(single.path, temporary, parts, borrowed, config_from)
    check_free_space(folder, unpacked.size, str(folder))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_small(temporary, files)
        unpacked.make()
        (temporary / ".lock").unlink(missing_ok=True)
        for link in [path for path in temporary.rglob("*") if path.is_symlink()]:
            source = link.resolve()
            link.unlink()
            shutil.copy(source, link)
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def tell(single, settings, left):
    """Print what the file says, and what the folder's scheduler was set to.

    Args:
        settings: of the scheduler; None for SD3.
        left: names in the file that have no place in the model.
    """
    said = [f"{place}: {kind}" for place, kind in single.marks.items()]
    said += [f"{place}: zero terminal SNR" for place in single.zero_snr]
    if left:
        title = single.layout.title
        print(f"left out: {counted(len(left), 'tensor')} that no {title} has ({first_names(left)})")
    print(f"{single.path.name} is {single.layout.title}. Of its prediction it says: {'; '.join(said) or 'nothing'}")
    if settings is None:
        print("Such a file has no timestep shift: it is the configuration's")
        return
    print("scheduler: " + ", ".join(f"{name} {value}" for name, value in settings.items()))
    kind = settings["prediction_type"]
    if any(other != kind for other in single.marks.values()):
        print(f"--prediction_type {kind} wins over what the file says")
    if bool(single.zero_snr) != settings["rescale_betas_zero_snr"]:
        print(f"--{'no-' if single.zero_snr else ''}zero_snr wins over what the file says")
    if not said and kind == "epsilon":
        print("Nearly all such files predict epsilon. If this one does not: --prediction_type v_prediction")


def build_parser():
    """The flags of the command."""
    parser = FlagParser(__doc__)
    add = parser.add_argument
    add("file", help="the model, a .safetensors file")
    add("folder", help="new folder for the pipeline")
    add("--config_from", help="folder or Hub name of a pipeline with what the file lacks: configurations, tokenizers, "
        "text encoders (default: the package's, which has no text encoders)")  # fmt: skip
    add("--prediction_type", choices=("epsilon", "v_prediction"), help="what an SDXL predicts, where the file does "
        "not say it or says it wrongly")  # fmt: skip
    add("--zero_snr", action=argparse.BooleanOptionalAction, help="whether the noise of an SDXL reaches zero "
        "terminal SNR (default: what the file says)")  # fmt: skip
    return parser


def main(argv=None):
    """The command: exit status 0, or 2 for a mistake of the user's."""
    with errors_for_people(False):
        args = build_parser().parse(argv)
        single, folder = read_single_file(args.file), Path(args.folder)
        prediction_type, zero_snr = schedule_of(single, args.prediction_type, args.zero_snr)
        check_folder(folder)
        files, parts, borrowed = opened(args.file, single, args.config_from)
        left, settings = surplus(args.file, single, parts), None
        if single.layout is SDXL_FILE:
            files, settings = with_schedule(files, prediction_type, zero_snr)
        save_whole(single, folder, files, parts, borrowed, args.config_from)
        tell(single, settings, left)
        print(f"{args.folder} is a base model now: --pretrained_model_name_or_path {args.folder}")


if __name__ == "__main__":
    main()
