"""Fetch the viewer of interactive reports: python cli/report/fetch_viewer.py [PACKAGE.tgz]

NiiVue comes from its npm package, by npm (so from the registry that npm is set up for), or from a
file that was brought here. Package and file must have the hashes pinned in
medmamba/reporting/viewer.py.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from medmamba.files import write_atomic
from medmamba.reporting.viewer import (
    NIIVUE_FILE,
    NIIVUE_MEMBER,
    NIIVUE_PACKAGE,
    NIIVUE_PACKAGE_SHA256,
    NIIVUE_SHA256,
    NIIVUE_VERSION,
)

WAIT_S = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", nargs="?", type=Path, help="the npm package, already fetched")
    given = parser.parse_args().package
    if NIIVUE_FILE.exists() and digest(NIIVUE_FILE.read_bytes()) == NIIVUE_SHA256:
        print(f"{NIIVUE_FILE}: NiiVue {NIIVUE_VERSION} is there")
        return
    with tempfile.TemporaryDirectory() as scratch:
        package = (given or packed(Path(scratch))).read_bytes()
        require(package, NIIVUE_PACKAGE_SHA256, "the package")
        source = member(package, Path(scratch))
    require(source, NIIVUE_SHA256, NIIVUE_MEMBER)
    write_atomic(NIIVUE_FILE, source)
    print(f"{NIIVUE_FILE}: NiiVue {NIIVUE_VERSION}, {len(source)} bytes")


def packed(folder: Path) -> Path:
    """The package, by npm."""
    npm = shutil.which("npm")
    if npm is None:
        sys.exit(
            f"npm is not installed. Install it, or fetch {NIIVUE_PACKAGE} {NIIVUE_VERSION} "
            "elsewhere and name its file."
        )
    command = [npm, "pack", "--silent", "--fetch-retries=1", "--fetch-timeout=30000"]
    name = f"{NIIVUE_PACKAGE}@{NIIVUE_VERSION}"
    try:
        subprocess.run([*command, name], cwd=folder, check=True, timeout=WAIT_S, stdout=sys.stderr)
    except (subprocess.SubprocessError, OSError) as problem:
        sys.exit(f"npm cannot fetch {name} ({problem}).")
    [package] = folder.glob("*.tgz")
    return package


def member(package: bytes, folder: Path) -> bytes:
    path = folder / "checked.tgz"
    path.write_bytes(package)
    with tarfile.open(path) as archive:
        stream = archive.extractfile(NIIVUE_MEMBER)
        assert stream is not None
        return stream.read()


def require(content: bytes, expected: str, what: str) -> None:
    found = digest(content)
    if found != expected:
        sys.exit(f"{what}: has SHA-256 {found}, not {expected}. It is not used.")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    main()
