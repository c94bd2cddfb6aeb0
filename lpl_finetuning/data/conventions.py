"""Conventions of other programs for names of files and folders: helper files beside pictures, and repeats.

A helper file is a picture for a program and not for training: a mask, a depth map, a thumbnail. Paths have `/`.
Importing this file imports nothing but the standard library.
"""

import re
from pathlib import PurePosixPath
from typing import NamedTuple

_MADE_FOLDERS = {  # folders that programs make beside pictures, in lower case -> what is in them
    "@eadir": "thumbnails of a Synology NAS (@eaDir)",
    "@__thumb": "thumbnails of a QNAP NAS (@__thumb)",
    "#recycle": "deleted files of a NAS (#recycle)",
    "@recycle": "deleted files of a NAS (@Recycle)",
    "$recycle.bin": "deleted files of Windows ($RECYCLE.BIN)",
    "lost+found": "lost files of a file system (lost+found)",
    "__macosx": "files that macOS adds to archives (__MACOSX)",
    "system volume information": "files of Windows (System Volume Information)",
}
_THUMBNAIL = re.compile(r"SYNO(FILE|PHOTO)_THUMB", re.IGNORECASE)
_ONE_TRAINER = re.compile(r".+-(mask|cond)label", re.IGNORECASE | re.DOTALL)
_WORD = (
    r"masks?|depth|depth[-_ ]?maps?|depths|normals?|normal[-_ ]?maps?|canny|edges?|hed|soft[-_ ]?edges?"
    r"|line[-_ ]?arts?|scribbles?"
    r"|open[-_ ]?poses?|dw[-_ ]?poses?|poses?|segm?s?|segmentations?|controls?|controlnet|conds?"
    r"|conditions?|conditioning([-_ ](images?|data))?|alphas?|mattes?|trimaps?|thumbs?|thumbnails?|previews?"
)
_AFTER = re.compile(rf"(?P<stem>.+)[-_. ](?P<word>{_WORD})", re.IGNORECASE | re.DOTALL)
_BEFORE = re.compile(rf"(?P<word>{_WORD})[-_. ](?P<stem>.+)", re.IGNORECASE | re.DOTALL)
_SIZED = re.compile(r"(?P<stem>.+)-\d{2,4}x\d{2,4}", re.DOTALL)
_FOLDER = re.compile(_WORD, re.IGNORECASE)
_BESIDE = ("", "images", "image", "imgs", "img", "pictures", "photos", "train", "data", "target", "targets", "rgb")
_REPEATS = re.compile(r"(?P<repeats>[1-9]\d{0,3})_(?P<name>.*\S.*)", re.DOTALL)


class Helper(NamedTuple):
    """What a name looks like.

    Attributes:
        what: names the kind and the convention, plural.
        partners: paths without ending; the name is that of a helper file if there is a picture with one of them. None
            where the name alone tells.
    """

    what: str
    partners: tuple[str, ...] | None


def is_of_the_system(folder: str) -> bool:
    """Whether a folder of that name belongs to a system or NAS, such as lost+found: nobody keeps pictures there."""
    return folder.lower() in _MADE_FOLDERS


def helper_of(path: str) -> Helper | None:
    """What kind of helper file a picture may be, from the path relative to the folder; None for an ordinary name."""
    pure = PurePosixPath(path)
    for folder in pure.parts[:-1]:
        if what := _MADE_FOLDERS.get(folder.lower()):
            return Helper(what, None)
    if _THUMBNAIL.match(pure.name):
        return Helper("thumbnails of a Synology NAS (SYNOFILE_THUMB…)", None)
    if match := _ONE_TRAINER.fullmatch(pure.stem):
        kind = match[1].lower()
        what = "masks" if kind == "mask" else "conditioning images"
        return Helper(f"{what} of OneTrainer (name-{kind}label)", None)
    for pattern, form in ((_AFTER, "name_{}"), (_BEFORE, "{}_name")):
        if match := pattern.fullmatch(pure.stem):
            word = match["word"].lower()
            return Helper(
                f"{word} images beside their pictures ({form.format(word)})", (_joined(pure, match["stem"]),)
            )
    if match := _SIZED.fullmatch(pure.stem):
        return Helper("smaller copies beside their pictures (name-150x150)", (_joined(pure, match["stem"]),))
    for place, folder in enumerate(pure.parts[:-1]):
        if _FOLDER.fullmatch(folder):
            before, after = pure.parts[:place], (*pure.parts[place + 1 : -1], pure.stem)
            partners = ("/".join((*before, *([other] if other else ()), *after)) for other in _BESIDE)
            what = f"{folder.lower()} images of pictures with the same names ({folder}/name)"
            return Helper(what, tuple(partners))
    return None


def _joined(pure: PurePosixPath, stem: str) -> str:
    return (pure.parent / stem).as_posix()


def without_repeats(folder: str) -> tuple[str, int]:
    """(name, repeats) of a folder that is named as for kohya's scripts, "10_sks dog"; (the name, 0) of any other.

    A year is no number of repeats: "2024_spring" is another name.
    """
    match = _REPEATS.fullmatch(folder)
    if match is None or 1900 <= int(match["repeats"]) < 2100:
        return folder, 0
    return match["name"], int(match["repeats"])
