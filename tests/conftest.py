"""Options and fixtures shared by every test."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
# dicom_phantom.py, nnunet_results.py and the fakes of tests/inference serve other folders too.
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(1, str(ROOT / "tests" / "inference"))
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


@pytest.fixture
def medmamba(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run the program in this process: (exit code, standard output, standard error)."""
    from medmamba.cli.app import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medmamba", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        caught = capsys.readouterr()
        return int(end.value.code or 0), caught.out, caught.err

    return run


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


def write_ellipsoids(folder: Path, *, cases: int = 6, test_cases: int = 2) -> Path:
    """Write an nnU-Net raw dataset of bright ellipsoids on oblique, anisotropic grids."""
    from medmamba.io import write_image
    from medmamba.volume import Geometry

    rng = np.random.default_rng(7)
    for number in range(cases + test_cases):
        part = "Tr" if number < cases else "Ts"
        shape = tuple(int(size) for size in rng.integers((18, 26, 26), (24, 34, 34)))
        image, labels = _ellipsoid(shape, rng)
        geometry = Geometry.from_matrix(shape, _oblique(rng))
        name = f"case_{number:03d}"
        write_image(folder / f"images{part}" / f"{name}_0000.nii.gz", image, geometry)
        write_image(folder / f"labels{part}" / f"{name}.nii.gz", labels, geometry)
    description = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "shell": 1, "core": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def _ellipsoid(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    centre = np.array(shape) * rng.uniform(0.4, 0.6, 3)
    radii = np.array(shape) * rng.uniform(0.3, 0.4, 3)
    points = np.indices(shape).reshape(3, -1).T
    distance = np.linalg.norm((points - centre) / radii, axis=1).reshape(shape)
    labels = (distance < 1).astype(np.uint8) + (distance < 0.5)
    image = 40.0 * labels + rng.normal(100.0, 6.0, shape)
    return image.astype(np.int16), labels


def _oblique(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(-0.3, 0.3)
    turn = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    matrix = np.eye(4)
    # Columns step along (D, H, W): z with 2 mm, y and x with 1 mm.
    matrix[:3, :3] = turn @ np.array([[0, 0, 1.0], [0, 1.0, 0], [2.0, 0, 0]])
    matrix[:3, 3] = rng.uniform(-50, 50, 3)
    return matrix


@pytest.fixture
def ellipsoids(tmp_path: Path) -> Path:
    """A small raw dataset that a network learns in seconds."""
    return write_ellipsoids(tmp_path / "Dataset901_Ellipsoids")


@pytest.fixture(scope="session")
def write_raw_ellipsoids() -> Callable[[Path], Path]:
    """The function that writes them, for fixtures that live longer than a test."""
    return write_ellipsoids
