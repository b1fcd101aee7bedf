"""Names of cases that say nothing of a patient: keyed hashes (HMAC-SHA256) of the names found.

Whoever has the key can tell which case is which; nobody else can, not even by trying names out.
"""

import hashlib
import hmac
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from medmamba.dataset.case import Case
from medmamba.dataset.inputs import CaseListing, Rejection, stem_of
from medmamba.dataset.manifest import CaseStream
from medmamba.errors import UsageError

MIN_KEY_BYTES = 16
DIGITS = 16
"""Of the hash in a name: two of 10^7 cases share one with a chance of 3e-6."""


@dataclass(frozen=True, kw_only=True)
class Redaction:
    """Renames cases by a key."""

    key: bytes

    def name(self, case_id: str) -> str:
        """The name that stands for a case in every output."""
        digest = hmac.new(self.key, case_id.encode(), hashlib.sha256).hexdigest()
        return f"case-{digest[:DIGITS]}"

    def of(self, item: Case | Rejection) -> Case | Rejection:
        """The same case or rejection under its new name."""
        return self.case(item) if isinstance(item, Case) else self.rejection(item)

    def case(self, case: Case) -> Case:
        """The same images under a name that says nothing."""
        return replace(case, id=self.name(case.id), known_as=case.id)

    def rejection(self, item: Rejection) -> Rejection:
        """The code alone: a text about names cannot be told apart from them."""
        name = self.name(item.id)
        text = f"case {name}: the text is left out with its name; `medmamba check` gives it."
        return Rejection(id=name, code=item.code, message=text)

    def listing(self, listing: CaseListing) -> CaseListing:
        """All cases of a listing under new names, in their order."""
        cases = sorted(map(self.case, listing.cases), key=lambda case: case.id)
        rejected = sorted(map(self.rejection, listing.rejected), key=lambda item: item.id)
        return CaseListing(cases=tuple(cases), rejected=tuple(rejected))

    def stream(self, stream: CaseStream) -> "RedactedStream":
        """A stream whose cases come under new names."""
        return RedactedStream(stream=stream, redaction=self)


@dataclass(frozen=True, kw_only=True)
class RedactedStream:
    """The cases of a list under new names; it can be read again."""

    stream: CaseStream
    redaction: Redaction

    @property
    def total(self) -> int:
        """Cases in it."""
        return self.stream.total

    def __iter__(self) -> Iterator[Case | Rejection]:
        return map(self.redaction.of, self.stream)


def read_key(path: Path) -> Redaction:
    """Read a key file; white space at its ends does not count.

    Raises:
        UsageError: it cannot be read, or it is too short to be a secret.
    """
    try:
        key = path.read_bytes().strip()
    except OSError as problem:
        raise UsageError(f"{path}: the key cannot be read ({problem.strerror}).") from problem
    if len(key) < MIN_KEY_BYTES:
        raise UsageError(
            f"{path}: a key of {len(key)} bytes can be guessed; {MIN_KEY_BYTES} are needed. "
            "Make one with: head -c 32 /dev/urandom | base64 > KEYFILE"
        )
    return Redaction(key=key)


def without_names(text: str, case: Case) -> str:
    """A text about a case in which its new name stands where files or the case were named."""
    if not case.known_as:
        return text
    for name in sorted(_private_names(case), key=len, reverse=True):
        text = text.replace(name, case.id)
    return text


def _private_names(case: Case) -> set[str]:
    """What a message could call the case: names of it, of its files, and of files in these."""
    names = {case.known_as}
    for path in case.images:
        names |= {path.name, stem_of(path), path.stem}
        with suppress(OSError, zipfile.BadZipFile):
            if path.is_dir():
                names |= {inner.name for inner in path.rglob("*")}
            elif zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    listed = archive.namelist()
                names |= {*listed, *(Path(member).name for member in listed)}
    # One or two letters are words of messages, too, and name nobody.
    return {name for name in names if len(name) > 2}
