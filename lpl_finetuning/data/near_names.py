"""Names that nearly match: the same name to a person, and another name to a file system.

Two names nearly match if they differ in the case of letters, in the way that accents are written (macOS writes é as e
and an accent), in blanks around the parts of a path, in a backslash for a slash, or in a doubled or missing ending:
`a.png.txt`, `a.txt.txt`.
Nothing else is near: a slip of the finger may be the name of another picture.

Importing this file imports nothing but the standard library and endings. Paths have `/`.
"""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lpl_finetuning.data.formats import IMAGE_EXTENSIONS, PLUGIN_EXTENSIONS

CAPTION_EXTENSIONS = (".txt", ".caption")  # the first kind that is found beside an image is read
_ENDINGS = (*IMAGE_EXTENSIONS, *PLUGIN_EXTENSIONS, *CAPTION_EXTENSIONS)


def near_key(path: str) -> str:
    """What names that nearly match have in common, but for their endings."""
    if not path.isascii():  # the case of some letters is written with accents of their own
        path = unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
    return "/".join([part.strip() for part in path.lower().replace("\\", "/").split("/")])


def bare_key(path: str) -> str:
    """The same without endings of images and captions, however many."""
    key = near_key(path)
    while key.endswith(_ENDINGS):
        root, ending = os.path.splitext(key)
        if not ending:  # a hidden file
            break
        key = root.rstrip()
    return key


@dataclass
class Matches:
    """Pictures and caption files whose names nearly match.

    Attributes:
        taken: path of a picture -> stem of its caption files.
        unclear: (pictures, caption files) that nearly match, where more than one could be meant.
    """

    taken: dict[str, str] = field(default_factory=dict)
    unclear: list[tuple[list[str], list[str]]] = field(default_factory=list)


def matches(pictures: Iterable[tuple[str, str]], captions: Sequence[tuple[str, str]]) -> Matches:
    """The caption files of pictures that have no caption file of exactly their name.

    Args:
        pictures: (path, stem) of each such picture; only those near a caption file are kept in memory.
        captions: (path, stem) of each caption file without a picture.
    """
    files: dict[str, list[tuple[str, str]]] = {}
    for path, stem in captions:
        files.setdefault(bare_key(stem), []).append((path, stem))
    near: dict[str, list[tuple[str, str]]] = {}
    for path, stem in pictures:
        if (key := bare_key(stem)) in files:
            near.setdefault(key, []).append((path, stem))
    found = Matches()
    for key, group in near.items():
        if len({stem for _, stem in group}) == len({stem for _, stem in files[key]}) == 1:
            found.taken.update(dict.fromkeys((path for path, _ in group), files[key][0][1]))
        else:
            found.unclear.append((sorted(path for path, _ in group), sorted(path for path, _ in files[key])))
    return found


class NearFiles:
    """Files by names that nearly match, for listings. paths: of all files below the folder."""

    def __init__(self, paths: Iterable[str]):
        self._whole: dict[str, list[str]] = {}
        self._bare: dict[str, list[str]] = {}
        self._base: dict[str, list[str]] = {}
        for path in paths:
            key = near_key(path)
            self._whole.setdefault(key, []).append(path)
            self._bare.setdefault(os.path.splitext(key)[0].rstrip(), []).append(path)
            self._base.setdefault(os.path.basename(key), []).append(path)

    def find(self, name: str) -> list[str]:
        """The files that may be meant by a listed name: one is taken, of several none. name: relative to the root."""
        key = os.path.normpath(near_key(name))
        found = self._whole.get(key, [])
        return found or ([] if key.endswith(_ENDINGS) else self._bare.get(key, []))

    def hints(self, name: str) -> list[str]:
        """Files of the same name in other folders, or with another ending: worth a word, and not taken."""
        key = os.path.normpath(near_key(name))
        return self._base.get(os.path.basename(key)) or self._bare.get(os.path.splitext(key)[0].rstrip(), [])
