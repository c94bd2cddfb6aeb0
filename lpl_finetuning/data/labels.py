"""Labels in the place of captions: the classes of a labelled set of images, checked before training starts.

A label is the only caption of its image: the name of the folder that holds it, the text in a column, or the name in a
ClassLabel column of a data set. Scan, tables, split and caches of captioned images therefore serve labelled images.

Importing this file imports neither torch nor datasets.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lpl_finetuning.data.scan import Scan
from lpl_finetuning.data.tables import SEPARATOR, CaptionedImage, ImageTable
from lpl_finetuning.errors import DataError, counted, first_names

LEAST_IMAGES = 2  # of a class
IN_WORDS_OF_LABELS = (  # messages about captions speak of labels where captions are labels
    (", or give one caption for all with --instance_prompt", ""),
    ("; or give all one with --instance_prompt", ""),
    ("--caption_column", "--label_column"),
    ("caption", "label"),
)


@dataclass(frozen=True)
class Classes:
    """The classes of a labelled set of images.

    Attributes:
        names: sorted; the place of a name is the number of its class.
        training: number of images of each class to train on.
        held_out: number of held-out images of each class.
    """

    names: tuple[str, ...]
    training: tuple[int, ...]
    held_out: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)

    def weights(self, power: float) -> list[float]:
        """The weight of each class in the loss: count ** -power, scaled so that the mean over images is 1."""
        raw = [count**-power for count in self.training]
        mean = sum(weight * count for weight, count in zip(raw, self.training, strict=True)) / sum(self.training)
        return [weight / mean for weight in raw]

    @property
    def majority(self) -> float:
        """The accuracy on the held-out images of always naming the class that is most frequent among them."""
        return max(self.held_out) / max(1, sum(self.held_out))

    def remarks(self) -> list[str]:
        """Sentences about classes that no held-out image measures; [] where no image is held out."""
        without = [name for name, count in zip(self.names, self.held_out, strict=True) if not count]
        if not without or len(without) == len(self.names):
            return []
        return [f"No held-out image is of these classes, which no accuracy counts: {first_names(without)}."]


def labels_of(images: Sequence[CaptionedImage]) -> Iterator[str]:
    """The label of each image."""
    if isinstance(images, ImageTable):
        yield from (captions for (captions,) in images.columns("captions"))
    else:
        yield from (image.caption for image in images)


def classes_of(scan: Scan, held_out: Sequence[CaptionedImage], flags: str) -> Classes:
    """The `Classes` of the images to train on and the held-out images.

    Args:
        scan: with the images to train on.
        held_out: images to validate with.
        flags: the flags that name the images and their labels, for messages.

    Raises:
        DataError: there is one class only, or a class has too few images to be learnt.
    """
    training, measured = Counter(labels_of(scan.images)), Counter(labels_of(held_out))
    names, both = sorted(training.keys() | measured.keys()), training + measured
    if both[""]:
        raise DataError(f"{flags}: {counted(both[''], 'image')} without a label.", "Label them, or remove them.")
    several = [name for name in names if SEPARATOR in name]
    if several:
        labels = " and ".join(several[0].split(SEPARATOR))
        raise DataError(f"{flags}: an image has several labels, {labels}.", "Give each image one label.")
    lonely = [name for name in names if both[name] < LEAST_IMAGES]
    if lonely:
        raise DataError(
            f"{flags}: a class needs {LEAST_IMAGES} images at least, and these have one: {first_names(lonely)}.",
            "Add images, or remove the class.",
        )
    unseen = [name for name in names if not training[name]]
    if unseen:
        raise DataError(
            f"{flags}: no image to train on has the label of some held-out images: {first_names(unseen)}.",
            "Add images of the class, or hold out fewer or others.",
        )
    if len(names) < 2:
        raise DataError(
            f"{flags}: all {len(scan.images)} images have the label {names[0]!r}; a classifier needs two classes at "
            "least.",
            "Sort the images into one folder for each class, or name the column of their labels with --label_column.",
        )
    return Classes(tuple(names), tuple(training[name] for name in names), tuple(measured[name] for name in names))


@contextlib.contextmanager
def in_words_of_labels() -> Iterator[None]:
    """Context manager for a scan of labelled images: a DataError about captions speaks of labels."""
    try:
        yield
    except DataError as error:
        problem, advice = error.problem, error.advice
        if advice.startswith("Put a file"):  # beside each picture: that is no column
            advice = "List the images in metadata.csv with that column, or sort them into folders and omit the flag."
        for word, other in IN_WORDS_OF_LABELS:
            problem, advice = problem.replace(word, other), advice.replace(word, other)
        raise DataError(problem, advice) from error
