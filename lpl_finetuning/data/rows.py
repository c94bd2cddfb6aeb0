"""The rows of listings: `metadata.jsonl`, `.csv` and `.parquet`.

A CSV may begin with Excel's `sep=;`. Without such a line the separator is the one that makes columns of the header:
commas, else semicolons or tabs. A place says where a row stands, for messages. Importing this file imports neither
torch nor datasets; a Parquet listing imports pyarrow.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from itertools import chain
from pathlib import Path

from lpl_finetuning.data.findings import BYTE_ORDER_MARK, USUAL_NAMES, json_object, not_utf8, require_column
from lpl_finetuning.data.tables import ROWS_AT_ONCE
from lpl_finetuning.errors import DataError, because, shown

LISTING_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
DATASET_EXTENSIONS = (".arrow", ".parquet")  # of files that hold images and captions, unless called as a listing
_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}
_DECLARED = re.compile(r'"?sep=([,;\t|])"?', re.IGNORECASE)  # the first line, for Excel


def listing_rows(
    listing: Path, image_column: str, caption_column: str, caption_needed: bool
) -> Iterator[tuple[str, dict]]:
    """(place, row) of each row of a listing; the ending of the name tells the kind.

    Args:
        listing: the file.
        image_column, caption_column: the columns of a Parquet file that are read.
        caption_needed: refuse a Parquet file without the caption column.
    """
    if listing.suffix == ".jsonl":
        return _json_rows(listing)
    if listing.suffix == ".csv":
        return _csv_rows(listing)
    return _parquet_rows(listing, image_column, caption_column, caption_needed)


def _json_rows(listing: Path) -> Iterator[tuple[str, dict]]:
    # Lines of a binary file: lines of a text file would also end at U+2028 and the like inside a string.
    start = 0
    for number, line in enumerate(_lines(listing), start=1):
        try:
            text = line.decode().lstrip(BYTE_ORDER_MARK)
        except UnicodeDecodeError as error:
            raise not_utf8(f"{listing}:{number}", start + error.start) from error
        start += len(line)
        if text.strip():
            yield f"{listing}:{number}", json_object(text, f"{listing}:{number}")


def _lines(listing: Path) -> Iterator[bytes]:
    try:
        with open(listing, "rb") as file:
            yield from file
    except OSError as error:
        raise DataError(f"{shown(str(listing))}: can't be read: {because(error)}.") from error


def _csv_rows(listing: Path) -> Iterator[tuple[str, dict]]:
    try:
        # newline="" leaves line breaks, also those inside quotes, to csv.
        with open(listing, "rb") as file, TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            header, separator, before = _csv_header(text)
            # Without skipinitialspace, a quote after a comma and a blank would begin no quoted field.
            reader = csv.DictReader(chain([header], text), strict=True, skipinitialspace=True, delimiter=separator)
            try:
                reader.fieldnames = _csv_columns(reader.fieldnames or [], _line(listing, before + 1))
                for row in reader:
                    place = _line(listing, before + reader.line_num)
                    yield place, _checked_row(row, place, separator)
            except csv.Error as error:
                # line_num counts the rows before this row: csv notices an open quote only at the end of the file.
                place = _line(listing, before + reader.line_num + 1)
                raise DataError(f"{place}: not CSV ({error}). Is a quote left open?") from error
    except UnicodeDecodeError:
        # The error counts from the start of the last block, so the file is searched again for the place.
        _refuse_not_utf8(listing)
        raise
    except OSError as error:
        raise DataError(f"{shown(str(listing))}: can't be read: {because(error)}.") from error


def _line(listing: Path, number: int) -> str:
    return f"{listing}:{number}"


def _csv_header(text: TextIOWrapper) -> tuple[str, str, int]:
    """(first line with the columns, separator, number of lines before it)."""
    header = text.readline().lstrip(BYTE_ORDER_MARK)
    if declared := _DECLARED.fullmatch(header.rstrip("\r\n")):
        return text.readline(), declared[1], 1
    return header, _separator(header), 0


def _separator(header: str) -> str:
    """The separator of a header: another than the comma where only that makes columns with a usual name."""
    usual = {"file_name", *USUAL_NAMES["--image_column"], *USUAL_NAMES["--caption_column"]}
    if "," not in header:
        for separator in (";", "\t"):
            names = [name.strip().strip('"').lower() for name in header.split(separator)]
            if len(names) > 1 and usual.intersection(names):
                return separator
    return ","


def _checked_row(row: dict, place: str, separator: str) -> dict:
    """A row of a CSV.

    Raises:
        DataError: there are more fields than columns, or a quote is hidden behind a blank.
    """
    name = _SEPARATORS.get(separator, "separator")
    if None in row:
        raise DataError(f"{place}: more fields than columns.", f"Put a caption with a {name} into quotes.")
    if any(_LATE_QUOTE.match(cell) for cell in row.values() if cell):
        raise DataError(f"{place}: a tab or another blank stands between a {name} and a quote.", "Remove the blank.")
    return row


_LATE_QUOTE = re.compile(r'\s+"')  # at the start of a cell: csv has taken the quote for a part of the text


def _csv_columns(names: Sequence[str], place: str) -> list[str]:
    """The names of the columns without blanks around them. A table with other separators is refused."""
    if len(names) == 1:
        for separator, what in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
            if separator in names[0]:
                raise DataError(
                    f"{place}: the columns seem to be separated by {what}, and none of them is called file_name.",
                    "Name the columns file_name and text, or separate them with commas.",
                )
    return [name.strip() for name in names]


def _refuse_not_utf8(listing: Path) -> None:
    """Raise a DataError for the first line that is not UTF-8."""
    start = 0
    for number, line in enumerate(_lines(listing), start=1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise not_utf8(f"{listing}:{number}", start + error.start) from error
        start += len(line)


def _parquet_rows(
    listing: Path, image_column: str, caption_column: str, caption_needed: bool
) -> Iterator[tuple[str, dict]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(listing) as file:
            names = file.schema_arrow.names
            wanted = [name for name in (image_column, "file_name", caption_column) if name in names]
            if image_column not in names and "file_name" not in names:
                require_column("file_name", names, str(listing), "--image_column")
            if caption_needed:
                require_column(caption_column, names, str(listing), "--caption_column")
            number = 0
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(dict.fromkeys(wanted))):
                for row in batch.to_pylist():
                    yield f"{listing}: row {number} (counted from 0)", row
                    number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{shown(str(listing))}: can't be read as Parquet: {because(error)}") from error


def column_names(table: Path) -> list[str]:
    """The names of the columns of a CSV or JSONL file, from the first lines; none where the file is no such table."""
    try:
        with open(table, "rb") as file:
            head = file.read(_HEAD).decode(errors="replace").lstrip(BYTE_ORDER_MARK)
        if table.suffix.lower() == ".jsonl":
            return [str(name) for name in json_object(head.splitlines()[0], "")]
        lines = head.splitlines()
        declared = _DECLARED.fullmatch(lines[0])
        header = lines[1] if declared else lines[0]
        [names] = csv.reader([header], delimiter=declared[1] if declared else _separator(header))
        return [name.strip() for name in names]
    except (OSError, ValueError, IndexError, csv.Error):
        return []


_HEAD = 2**16  # bytes
