"""The first half second of a script: its flags and its images, checked before torch is imported."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lpl_finetuning.data.scan import Scan, find_images
from lpl_finetuning.errors import errors_for_people, is_or_are, quiet_libraries, require
from lpl_finetuning.flags import Flags, data_source
from lpl_finetuning.stages import show_stages, stage_ended


def find_training_images(args: Flags) -> tuple[Scan, Sequence[Any]]:
    """(scan, held-out images) of a training run.

    Raises:
        UserError: too few images are held out for what is to be measured.
    """
    scan, held_out = find_images(data_source(args))
    measured, count = args.validation_metrics and args.validation_kid_every, len(held_out)
    require(not measured or count > 1, f"--validation_metrics: KID needs 2 held-out images or more, and there "
            f"{is_or_are(count)} {count}; hold out more, or give --validation_kid_every 0")  # fmt: skip
    return scan, held_out


def early(name: str, parse_args: Callable[[], Flags], find: Callable = find_training_images) -> tuple | None:
    """The arguments of a script's `main` if the script is run: (flags, *what `find` returns); None if it is imported.

    Called between a script's light imports and its slow imports. A mistake ends the process with one message and
    status 2.

    Args:
        name: the script's `__name__`.
        parse_args: the script's function.
        find: finds what the flags name on disk.
    """
    if name != "__main__":
        return None
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads bring a busy CPU to a halt
    with errors_for_people("--debug" in sys.argv):
        args = parse_args()
        if args.debug:
            show_stages()
        stage_ended("light imports; flags and base model checked")
        run = (args, *find(args))
        stage_ended("pictures found")
        quiet_libraries(args.debug)
    return run


def run_main(main: Callable, run: tuple | None) -> None:
    """Call a script's `main`, with errors for people; nothing where the script is imported."""
    if run is not None:
        stage_ended("slow imports")
        with errors_for_people(run[0].debug):
            main(*run)
