"""Which files a dump consists of, and how they are opened: on this machine, or by URI (`s3://`, `hdfs://`)."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from pyarrow import fs

from kellm_features.errors import DataError

# As Wikimedia names parts: enwiki-20240101-pages-articles-multistream1.xml-p1p41242.bz2
_DUMP = re.compile(r"^(?!\.).+\.xml(?:-p\d+p\d+)?(?:\.bz2)?$")
_MULTISTREAM = re.compile(r"^(.*multistream)(\d*)\.xml(-p\d+p\d+)?\.bz2$")
ACCEPTED = ".xml, .xml.bz2, or a part such as …multistream1.xml-p1p41242.bz2"


def find_parts(dumps: Iterable[str | Path]) -> list[str]:
    """The files that paths, glob patterns and folders stand for, each once, sorted.

    Raises:
        DataError: one of them stands for no file.
    """
    found: set[str] = set()
    for dump in map(str, dumps):
        if is_remote(dump):
            found.update(_remote(dump))
            continue
        path = Path(dump)
        if path.is_dir():
            parts = [str(part) for part in path.iterdir() if _DUMP.match(part.name) and part.is_file()]
        elif path.exists() or not glob.has_magic(dump):
            parts = [dump]  # the check of the file says what is wrong with it
        else:
            folder = Path(path.anchor)  # empty for a relative pattern
            parts = [str(part) for part in folder.glob(str(path.relative_to(folder))) if _DUMP.match(part.name)]
        if not parts:
            raise DataError(_nothing(dump))
        found.update(parts)
    if not found:
        raise DataError(f"no dump is named; give the path of a MediaWiki dump: {ACCEPTED}")
    return sorted(found)


def find_index(dump: str) -> str | None:
    """The multistream index that lies beside a dump under Wikimedia's name, if it does."""
    folder, slash, name = dump.rpartition("/")
    told = _MULTISTREAM.match(name)
    if not told:
        return None
    index = f"{folder}{slash}{told[1]}-index{told[2]}.txt{told[3] or ''}.bz2"
    return index if exists(index) else None


def is_remote(path: str) -> bool:
    """Whether a path names its file system."""
    return "://" in path


def exists(path: str) -> bool:
    """Whether there is such a file."""
    if not is_remote(path):
        return Path(path).is_file()
    files, inner = _file_system(path)
    return bool(files.get_file_info(inner).type == fs.FileType.File)


def open_file(path: str) -> BinaryIO:
    """A file to read and seek in.

    Raises:
        DataError: it cannot be read.
    """
    try:
        if not is_remote(path):
            return Path(path).open("rb")
        files, inner = _file_system(path)
        return cast(BinaryIO, files.open_input_file(inner))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}): a MediaWiki dump was expected ({ACCEPTED}), at the "
            "same path on every machine that reads it"
        ) from error


def size_of(path: str) -> int:
    """Bytes of a file."""
    with open_file(path) as file:
        return file.seek(0, 2)


def _remote(dump: str) -> list[str]:
    files, inner = _file_system(dump)
    prefix = dump[: len(dump) - len(inner)] if dump.endswith(inner) else dump.partition("://")[0] + "://"
    if files.get_file_info(inner).type == fs.FileType.Directory:
        folder, pattern = inner, "*"
    elif glob.has_magic(inner):
        folder, pattern = str(PurePosixPath(inner).parent), PurePosixPath(inner).name
    else:
        return [dump]
    listed = files.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    parts = [prefix + info.path for info in listed if fnmatch(info.base_name, pattern) and _DUMP.match(info.base_name)]
    if not parts:
        raise DataError(_nothing(dump))
    return parts


def _file_system(uri: str) -> tuple[fs.FileSystem, str]:
    try:
        files, inner = fs.FileSystem.from_uri(uri)
    except (ValueError, OSError) as error:  # pyarrow's own errors are ValueErrors
        raise DataError(f"{uri} cannot be opened ({error}): give a path, or a URI of s3, gs, hdfs or file") from error
    return files, str(inner)


def _nothing(dump: str) -> str:
    path = Path(dump)
    seen = ""
    if path.is_dir():
        names = sorted(part.name for part in path.iterdir())
        seen = f" (it holds {', '.join(names[:3]) or 'nothing'}{' …' if len(names) > 3 else ''})"
    return f"{dump} stands for no MediaWiki dump{seen}: files named {ACCEPTED} were looked for"
