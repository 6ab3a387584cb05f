"""Documents out of files, read as a stream: nothing here needs memory for more than a piece of one.

.jsonl .json      a JSON object a line, a document its field `field`
.parquet          a row a document, its column `field`
a folder          of `datasets` (save_to_disk): a row a document; of any other, all files below it
any other file    UTF-8 text, one document
"""

import codecs
import importlib
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate, chain, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

from growth.errors import Refusal, reason, refuse

# Characters, where nobody says how many: the tokenizer holds about 100 bytes a token, so 100 MB.
PIECE = 1 << 20
BLOCK = 1 << 20  # bytes read at once, of files that are read whole
ROWS = 64  # rows read at once: a row of web text takes some kB
MARKS = {  # the longer first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
CONTINUED = bytes(range(0x80, 0xC0))  # what no character of UTF-8 begins with
JSON_LINES = (".jsonl", ".json")
SAVED, SPLITS = ("state.json", "dataset_info.json"), "dataset_dict.json"  # save_to_disk's

Paths = str | Path | Iterable[str | Path]
Piece = tuple[str, bool]  # as many characters as asked for at most, and whether its document ends with them
Part = tuple[float, float]  # from this share of a file up to that one
WHOLE = (0.0, 1.0)


def documents(
    paths: Paths, what: str = "data", field: str = "text", characters: int | None = None
) -> Iterator[Piece]:
    """The documents of files, in the order given; of a folder, every file below it, in the order of names.

    Hidden files are left out of a folder, and so are its empty files, and empty rows; links are followed. A
    byte-order mark is no text. Documents are cut behind a line where there is one. Raises Refusal, which
    calls the argument `what`, where a file is missing or cannot be read, is not UTF-8, where a row is no JSON
    object or has no string in `field`, where a file that was named is empty, and where a folder holds no text
    at all. characters: of a piece, at most; default: PIECE.
    """
    for path in named(paths, what):
        empty, count = True, 0
        for file in files_below(path, what):
            count += 1
            for piece in documents_in(file, f"{what} {file}", field, characters=characters):
                empty = False
                yield piece
        if empty:
            raise textless(path, what, count)


def textless(path: Path, what: str, count: int) -> Refusal:
    """That of a path, with `count` files, that was named and holds no text."""
    got = f"a folder without any ({count} files)" if path.is_dir() else "an empty file"
    return refuse(f"{what} {path}", "text", got, "name a file that holds text")


def load_text(paths: Paths, what: str = "data", field: str = "text") -> list[str]:
    """The same documents, each whole, in memory."""
    texts, parts = [], []
    for piece, last in documents(paths, what, field):
        parts.append(piece)
        if last:
            texts.append("".join(parts))
            parts = []
    return texts


def pieces(blocks: Iterable[str], characters: int) -> Iterator[Piece]:
    """One document, given in blocks of any size, in pieces of at most so many characters."""
    rest = ""
    for block in blocks:
        rest += block
        while len(rest) > characters:
            end = rest.rfind("\n", 0, characters) + 1 or characters
            yield rest[:end], False
            rest = rest[end:]
    yield rest, True


def named(paths: Paths, what: str) -> list[Path]:
    """The paths, at least one, each with a name."""
    found = [paths] if isinstance(paths, str | Path) else list(paths)
    for path in found:
        if not str(path) or "\0" in str(path):
            raise refuse(what, "the name of a file or a folder", repr(str(path)), "name one")
    if not found:
        raise refuse(what, "at least one file or folder", "none", "name one")
    return [Path(path) for path in found]


def files_below(path: Path, what: str, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The file at `path`, or all below the folder at `path`, which lies in the folders `above`.

    A folder that save_to_disk wrote counts as a file.
    """
    name = f"{what} {path}"
    try:
        kind = path.stat().st_mode
        if stat.S_ISREG(kind):
            yield path
            return
        if not stat.S_ISDIR(kind):
            raise refuse(name, "a file or a folder", "a pipe or a device", "copy what it gives to a file")
        real = path.resolve()
        if real in above:
            raise refuse(name, "a folder", f"a link back to {real}, where it lies itself", "remove the link")
        inside = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    except FileNotFoundError as error:
        got = "a link to nothing" if path.is_symlink() else "nothing there"
        raise refuse(name, "a file or a folder", got, "check the path") from error
    except OSError as error:
        remedy = "check its links and permissions"
        raise refuse(name, "a file or a folder that can be read", error.strerror, remedy) from error
    if (path / SPLITS).exists():
        splits = ", ".join(str(folder) for folder in inside if folder.is_dir()) or "its splits"
        raise refuse(name, "one split of a data set", "all of them", f"name {splits}")
    if all((path / file).exists() for file in SAVED):
        yield path
        return
    for file in inside:
        yield from files_below(file, what, (*above, real))


def statuses(file: Path, what: str) -> Iterator[tuple[Path, os.stat_result]]:
    """Of a file, or of all in a folder that save_to_disk wrote, what the disk says."""
    with _reading(f"{what} {file}"):
        inside = sorted(file.iterdir()) if file.is_dir() else [file]
    for path in inside:
        with _reading(f"{what} {path}"):
            status = path.stat()
        yield path, status


def documents_in(
    file: Path, name: str, field: str, part: Part = WHOLE, characters: int | None = None
) -> Iterator[Piece]:
    """The documents of a file, in pieces of at most so many `characters`; default: PIECE.

    name: what a refusal calls it. part: of text what lies there, from a line's begin on; of rows those that
    begin there, whole. So parts that make up the file have every row once, and all text but the rest of a
    line at each seam. Of a group of Parquet's rows those before the part are decompressed too.
    """
    characters = characters or PIECE
    if file.is_dir():
        rows = _saved_rows(file, name, field, part)
    elif file.suffix == ".parquet":
        rows = _parquet_rows(file, name, field, part)
    elif file.suffix in JSON_LINES:
        rows = _json_rows(file, name, field, part)
    else:
        yield from _text(file, name, part, characters)
        return
    for row in rows:
        if row.strip():
            yield from pieces([row], characters)


def _text(file: Path, name: str, part: Part, characters: int) -> Iterator[Piece]:
    """A text file as one document, none where it is blank."""
    blocks, head = _decoded(file, name, part, min(characters, BLOCK)), ""
    for block in blocks:
        head += block
        if head.strip():
            yield from pieces(chain([head], blocks), characters)
            return


def _decoded(file: Path, name: str, part: Part, size: int) -> Iterator[str]:
    """What a text file says, its lines ended alike."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    begin, stop = _bytes(file, name, part)
    end = begin  # of what was read
    for block in chain(_blocks(file, name, begin, stop, size), [b""]):
        if not end:
            _refuse_marked(block, name)
            end = len(codecs.BOM_UTF8) if block.startswith(codecs.BOM_UTF8) else 0
            block = block[end:]
        elif end == begin:
            cut = block.find(b"\n") + 1 or len(block) - len(block.lstrip(CONTINUED))
            block, end = block[cut:], end + cut
        if (zero := block.find(0)) >= 0:
            remedy = "is it UTF-16, or binary? Convert it to UTF-8, or leave it out"
            raise refuse(name, "UTF-8 text", f"NUL bytes, the first at {end + zero}", remedy)
        end += len(block)
        try:
            yield decoder.decode(block, final=not block and stop is None)
        except UnicodeDecodeError as error:
            raise _not_utf8(error, name, end - len(error.object)) from error


def _bytes(file: Path, name: str, part: Part) -> tuple[int, int | None]:
    """Where a part begins and ends; None for the end of the file, which may be growing."""
    begin, end = part
    with _reading(name):
        size = file.stat().st_size
    return int(begin * size), None if end == 1 else int(end * size)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "check its links and permissions"
        raise refuse(name, "a file that can be read", error.strerror, remedy) from error


def _blocks(file: Path, name: str, begin: int, end: int | None, size: int) -> Iterator[bytes]:
    with _reading(name), file.open("rb") as stream:
        stream.seek(begin)
        while block := stream.read(size if end is None else min(size, end - stream.tell())):
            yield block


def _refuse_marked(start: bytes, name: str) -> None:
    for mark, encoding in MARKS.items():
        if start.startswith(mark):
            raise refuse(name, "UTF-8 text", f"{encoding}, by its first bytes", "convert it to UTF-8")


def _not_utf8(error: UnicodeDecodeError, name: str, before: int) -> Refusal:
    got = f"byte {error.object[error.start]:#04x} at {before + error.start}"
    return refuse(name, "UTF-8 text", got, "convert the file, or leave it out")


def _json_rows(file: Path, name: str, field: str, part: Part) -> Iterator[str]:
    begin, end = _bytes(file, name, part)
    since = f" behind byte {begin}" if begin else ""
    for number, line in enumerate(_lines(file, name, begin, end), 1):
        where, remedy = f"{name}, line {number}{since}", "write one object a line, or name the file .txt"
        if number == 1 and not begin:
            _refuse_marked(line, name)
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise _not_utf8(error, where, 0) from error
        except (ValueError, RecursionError) as error:
            raise refuse(where, "a JSON object", reason(error), remedy) from error
        if not isinstance(row, dict):
            raise refuse(where, "a JSON object", _kind(row), remedy)
        _refuse_fieldless(row, where, field)
        yield _string(row[field], where, field)


def _lines(file: Path, name: str, begin: int, end: int | None) -> Iterator[bytes]:
    """Those that begin between two bytes."""
    with _reading(name), file.open("rb") as stream:
        at = begin
        if begin:
            stream.seek(begin - 1)
            at += len(stream.readline(-1 if end is None else end - begin + 1)) - 1
        while (end is None or at < end) and (line := stream.readline()):
            at += len(line)
            yield line.removesuffix(b"\n")


def _parquet_rows(file: Path, name: str, field: str, part: Part) -> Iterator[str]:
    pyarrow, parquet = _library("pyarrow", name), _library("pyarrow.parquet", name)
    try:
        with parquet.ParquetFile(file, buffer_size=BLOCK, pre_buffer=False) as table:  # else a group is held
            _refuse_fieldless(table.schema_arrow.names, name, field)
            rows = _rows(table.metadata.num_rows, part)
            first, groups = _groups(table.metadata, rows)
            batches = table.iter_batches(batch_size=ROWS, columns=[field], row_groups=groups)
            inside = _inside((batch.column(0) for batch in batches), first, rows)
            yield from _strings(inside, name, field, rows.start)
    except (pyarrow.ArrowException, OSError) as error:
        raise refuse(name, "a Parquet file", reason(error), "write it again, or leave it out") from error


def _rows(count: int, part: Part) -> range:
    return range(*(int(share * count) for share in part))


def _groups(metadata: Any, rows: range) -> tuple[int, list[int]]:
    """The groups that have some of the rows, and the number of their first row."""
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    bounds = pairwise(accumulate(sizes, initial=0))
    found = {i: a for i, (a, b) in enumerate(bounds) if max(a, rows.start) < min(b, rows.stop)}
    return min(found.values(), default=0), list(found)


def _inside(columns: Iterable[Any], first: int, rows: range) -> Iterator[list]:
    """Of columns, which follow each other from row `first` on, the values of `rows`."""
    for column in columns:
        if wanted := column[max(0, rows.start - first) : max(0, rows.stop - first)]:
            yield wanted.to_pylist()
        first += len(column)
        if first >= rows.stop:
            return


def _saved_rows(folder: Path, name: str, field: str, part: Part) -> Iterator[str]:
    datasets = _library("datasets", name)
    try:
        table = datasets.load_from_disk(str(folder))
    except Exception as error:  # damaged files raise whatever the parser that meets them does
        raise refuse(name, "a data set that save_to_disk wrote", reason(error), "save it again") from error
    _refuse_fieldless(table.column_names, name, field)
    rows = _rows(len(table), part)
    if part != WHOLE:
        table = table.select(rows)
    batches = table.select_columns([field]).with_format("arrow").iter(batch_size=ROWS)
    yield from _strings((batch.column(0).to_pylist() for batch in batches), name, field, rows.start)


def _library(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise refuse(
            name, f"{library}, which reads it", "none installed", "pip install 'lcikernels[data]'"
        ) from error


def _strings(batches: Iterable[list], name: str, field: str, before: int) -> Iterator[str]:
    for number, value in enumerate(chain.from_iterable(batches), before + 1):
        yield _string(value, f"{name}, row {number}", field)


def _refuse_fieldless(names: Iterable[str], where: str, field: str) -> None:
    if field not in (names := list(names)):
        remedy = "pass the one that holds the text, --text-field of train and transfer, or call it text"
        raise refuse(where, f"a field {field!r}", ", ".join(names) or "none", remedy)


def _string(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise refuse(where, f"a string in {field!r}", _kind(value), "leave the row out, or mend it")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
