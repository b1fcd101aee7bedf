"""Work lists as people and programs write them: which files belong to which case.

One case a row: tab-separated paths (.txt), CSV, JSON Lines, or one JSON document. CSV and JSON
Lines are read row by row, whatever their length. What the rows mean is ``inputs`` to judge.
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmamba.errors import UsageError

LIST_SUFFIXES = (".txt", ".csv", ".json", ".jsonl")
STREAMED_SUFFIXES = (".csv", ".jsonl")

ID_KEYS = ("case_id", "id")
CHANNEL_PREFIX = "channel_"
"""Columns or keys channel_0, channel_1, ... hold the path of a channel each."""
MAX_CHANNELS = 9999
_FILE_KEY = re.compile(r"(?:channel_|images?_?)([0-9]*)")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case of a list.

    Args:
        name: of the case; None where the list names files only.
        files: as they stand in the list; an empty one before another is a missing channel.
    """

    name: str | None
    files: tuple[str, ...]


def read_rows(path: Path) -> Iterator[Row]:
    """Read a list row by row.

    Raises:
        UsageError: the file cannot be read, or a row cannot be understood; names the line.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".json":
            yield from _document(path)
            return
        with path.open(encoding="utf-8-sig", newline="" if kind == ".csv" else None) as lines:
            read = {".csv": _csv, ".jsonl": _json_lines, ".txt": _plain}[kind]
            yield from read(path.name, lines)
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"{path.name}: the list cannot be read ({problem}).") from problem


def _plain(name: str, lines: Iterator[str]) -> Iterator[Row]:
    for line in lines:
        text = line.strip()
        if text and not text.startswith("#"):
            yield _row(None, text.split("\t"))


def _csv(name: str, lines: Iterator[str]) -> Iterator[Row]:
    reader = csv.reader(lines)
    columns: list[int] | None = None
    named: int | None = None
    try:
        for number, row in enumerate(reader):
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if number == 0 and _is_head(cells):
                named, columns = _head(name, [cell.lower() for cell in cells])
            elif columns is None:
                yield _row(None, cells)
            else:
                cells += [""] * (max(columns, default=0) + 1 - len(cells))
                case = None if named is None else cells[named]
                yield _row(case, [cells[at] for at in columns])
    except csv.Error as problem:
        raise UsageError(f"{name}: line {reader.line_num} is not CSV ({problem}).") from problem


def _is_head(cells: list[str]) -> bool:
    lower = [cell.lower() for cell in cells]
    return any(cell in ID_KEYS or cell.startswith(CHANNEL_PREFIX) for cell in lower)


def _head(name: str, head: list[str]) -> tuple[int | None, list[int]]:
    named = next((head.index(key) for key in ID_KEYS if key in head), None)
    numbered = [(_channel(name, cell), at) for at, cell in enumerate(head) if _names_file(cell)]
    if not numbered:
        raise UsageError(
            f"{name}: no column of files ({', '.join(head)[:120]}). Name the columns case_id, "
            "channel_0, channel_1 and so on."
        )
    if len({number for number, _ in numbered}) < len(numbered):
        raise UsageError(f"{name}: a channel has two columns. Name each column once.")
    return named, [at for _, at in sorted(numbered)]


def _names_file(key: str) -> bool:
    return key.startswith(CHANNEL_PREFIX) or _FILE_KEY.fullmatch(key) is not None


def _channel(name: str, key: str) -> int:
    match = _FILE_KEY.fullmatch(key)
    if match is None or len(match[1]) > len(str(MAX_CHANNELS)) or int(match[1] or 0) > MAX_CHANNELS:
        raise UsageError(f"{name}: '{key}' names no channel. Use channel_0, channel_1 and so on.")
    return int(match[1] or 0)


def _json_lines(name: str, lines: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise UsageError(f"{name}: line {number} is not valid JSON ({problem}).") from problem
        yield _entry(f"{name}: line {number}", entry)


def _document(path: Path) -> Iterator[Row]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, RecursionError) as problem:
        raise UsageError(f"{path.name}: the list is not valid JSON ({problem}).") from problem
    if isinstance(value, dict):
        value = [{"case_id": key, "images": files} for key, files in value.items()]
    if not isinstance(value, list):
        raise UsageError(f"{path.name}: a list of cases or a map case -> files is needed.")
    for number, entry in enumerate(value, start=1):
        yield _entry(f"{path.name}: entry {number}", entry)


def _entry(where: str, entry: Any) -> Row:
    case_id = None
    files = entry
    if isinstance(entry, dict):
        case_id = next((str(entry[key]) for key in ID_KEYS if key in entry), None)
        files = entry.get("images")
        if isinstance(files, dict):
            files = files.get("images")
        if files is None:
            files = _channels(where, entry)
    if isinstance(files, str):
        files = [files]
    if not isinstance(files, list) or not all(isinstance(item, str) for item in files):
        raise UsageError(
            f"{where}: {str(entry)[:80]} is no path, list of paths, or map with case_id and "
            "channel_0, channel_1 and so on."
        )
    return _row(case_id, files)


def _channels(where: str, entry: dict[str, Any]) -> list[Any]:
    keys = [key for key in entry if key.startswith(CHANNEL_PREFIX)]
    numbered = {_channel(where, key): "" if entry[key] is None else entry[key] for key in keys}
    return [numbered.get(number, "") for number in range(max(numbered, default=-1) + 1)]


def _row(name: str | None, files: list[str]) -> Row:
    while files and not files[-1]:
        files = files[:-1]
    return Row(name=name, files=tuple(files))
