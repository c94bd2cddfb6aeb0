"""The small files of a model, on disk or on the Hub: found, fetched and read, or why not."""

import contextlib
import functools
import json
import re
from pathlib import Path

from cli_utils import UserError, require


@functools.cache
def _hub_problem(endpoint):
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=4)  # any answer will do
    except Exception as error:  # no network, no such host, a proxy that refuses: many kinds
        return f"{endpoint.split('://')[-1]} can't be reached: {' '.join(str(error).split()) or type(error).__name__}"
    return None


def hub_problem():
    """Why the Hub can't be asked, or None. It is tried once, for 4 s, where its client would try for half a minute."""
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return _hub_problem(constants.ENDPOINT)


@contextlib.contextmanager
def offline_without_hub():
    """Inside, the clients of the Hub look into their caches at once when it can't be reached."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or bool(hub_problem())
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def model_file(name_or_path, file, revision=None, subfolder=None):
    """Path of one small file of a model, on disk or fetched from the Hub; None when the model does not have it."""
    folder = Path(name_or_path)
    relative = f"{subfolder}/{file}" if subfolder else file
    if folder.is_dir():
        return folder / relative if (folder / relative).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name_or_path, relative, revision=revision, local_files_only=bool(hub_problem())))
    except LocalEntryNotFoundError:  # no network, which says nothing about the file
        raise
    except EntryNotFoundError:
        return None


def unreadable(name, error):
    """Why a name could not be read on the Hub and what to do, from the exception of its client."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"it is gated: accept its licence at https://huggingface.co/{name}, then run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such --revision; its revisions are at " + f"https://huggingface.co/{name}/tree/main"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no folder here, and no model on the Hub that you may see; check the name, or run `hf auth login`"
    if problem := hub_problem():
        return f"no folder here, not in the Hub's cache on this machine, and {problem}; give a folder, or connect"
    return f"neither a folder here nor readable on the Hub ({type(error).__name__}: {' '.join(str(error).split())})"


def read_json(path):
    """A JSON file's content; UserError names a file that is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:  # no JSON, no UTF-8, no permission
        raise UserError(f"{path}: not valid JSON ({error}); repair it, or download the model again") from None


def read_object(path):
    """The same for a file that must hold an object, such as a config.json."""
    content = read_json(path)
    require(isinstance(content, dict), f"{path}: found a JSON {type(content).__name__}, expected an object; "
            "download the model again")  # fmt: skip
    return content


def hub_like(name):
    """Whether a name can be one of the Hub's, name or owner/name, and not a path."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) and not name.startswith((".", "-"))
