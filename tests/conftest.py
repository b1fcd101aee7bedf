"""Options and fixtures shared by every test."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    # pytest's own --fixtures (a synonym of --funcargs) gives way to ours.
    parser._anonymous._arggroup.conflict_handler = "resolve"
    parser.addoption(
        "--fixtures",
        type=Path,
        default=None,
        help="folder of golden fixtures (default: ../shared/fixtures, else tests/golden)",
    )


def fixtures_folder(config: pytest.Config) -> Path:
    """The folder whose golden cases the parity tests run; all of them."""
    chosen = config.getoption("--fixtures")
    if chosen is not None:
        return Path(chosen)
    beside = SHARED / "fixtures"
    return beside if beside.is_dir() else ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def fixtures_dir(request: pytest.FixtureRequest) -> Path:
    """Root of the golden fixtures."""
    return fixtures_folder(request.config)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real labelled images; the test is skipped where there is none."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("no folder of real images beside the checkout")
    return folder
