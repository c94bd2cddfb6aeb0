"""Run a script that finds no space when it writes its result: python tests/full_disk.py SCRIPT FLAGS..."""

import errno
import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lpl_finetuning.data import scan
from lpl_finetuning.errors import errors_for_people
from lpl_finetuning.flags import data_source


def full(*args):
    """In the place of `save_result`."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if __name__ == "__main__":
    name, *words = sys.argv[1:]
    script = importlib.import_module(name)
    script.save_result = full
    with errors_for_people(debug=False):
        args = script.parse_args(words)
        script.main(args, *scan.find_images(data_source(args)))
