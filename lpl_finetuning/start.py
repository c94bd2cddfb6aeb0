"""The first half second of a script: its flags and its images, checked before torch is imported."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lpl_finetuning.data.scan import Scan, find_images
from lpl_finetuning.errors import errors_for_people, quiet_libraries
from lpl_finetuning.flags import Flags, data_source


class Run(NamedTuple):
    """What a script's `main` is given."""

    args: Flags
    scan: Scan
    held_out: Sequence[Any]


def early(name: str, parse_args: Callable[[], Flags]) -> Run | None:
    """The flags and images of a script that is run; None where the script is imported.

    Called between a script's light imports and its slow imports. A mistake ends the process with one message and
    status 2.

    Args:
        name: the script's `__name__`.
        parse_args: the script's function.
    """
    if name != "__main__":
        return None
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads bring a busy CPU to a halt
    with errors_for_people("--debug" in sys.argv):
        args = parse_args()
        run = Run(args, *find_images(data_source(args)))
        quiet_libraries(args.debug)
    return run


def run_main(main: Callable, run: Run | None) -> None:
    """Call a script's `main`, with errors for people; nothing where the script is imported."""
    if run is not None:
        with errors_for_people(run.args.debug):
            main(*run)
