"""``medmamba doctor``: whether this machine is fit, and what will be used."""

import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from medmamba import __version__
from medmamba.cli.caches import CACHE_VARIABLE
from medmamba.cli.options import Json

PACKAGES = (
    "torch", "triton", "monai", "nibabel", "SimpleITK", "scikit-image", "numpy", "scipy",
    "blosc2", "safetensors", "pydantic", "typer",
)  # fmt: skip
MEMORY_INFO = Path("/proc/meminfo")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - only its size is read


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``fit`` is False where the machine cannot do the work."""

    topic: str
    value: str
    fit: bool = True


Quick = Annotated[
    bool,
    typer.Option("--quick", help="Memory, disk and folders only, in a moment: a health check."),
]


Model = Annotated[
    Path | None,
    typer.Option(
        "--model", "-m", metavar="MODEL",
        help="Also tell whether this model may run in reduced precision here.",
    ),
]  # fmt: skip


def doctor(as_json: Json = False, quick: Quick = False, model: Model = None) -> None:
    """Check device, memory, disk, compiler and scan kernels; exit code 6 if something is unfit."""
    findings = _system() if quick else [*_system(), *_device(), *_scan()]
    findings += [] if model is None else _parity(model)
    packages = {name: _version(name) for name in PACKAGES}
    if as_json:
        _print_json(findings, packages)
    else:
        _print_tables(findings, packages)
    if not all(finding.fit for finding in findings):
        raise typer.Exit(6)


def _system() -> list[Finding]:
    disk = shutil.disk_usage(Path.cwd())
    findings = [
        Finding("medmamba", f"{__version__} on Python {platform.python_version()}"),
        Finding("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"),
        Finding("memory", _memory()),
        Finding("free disk", f"{disk.free / 2**30:.0f} GiB here"),
        Finding(
            "C++ compiler", shutil.which("c++") or shutil.which("g++") or "none (not needed to run)"
        ),
    ]
    if SHARED_MEMORY.exists():
        size = shutil.disk_usage(SHARED_MEMORY).total / 2**20
        findings.append(Finding("shared memory", f"{size:.0f} MiB (medmamba needs none)"))
    return [*findings, _cache_folder()]


def _cache_folder() -> Finding:
    """Whether compiled kernels can be kept: the folder must be writable and allow execution."""
    named = os.environ.get(CACHE_VARIABLE)
    if not named:
        return Finding("cache folder", f"the libraries' own ({CACHE_VARIABLE} is not set)")
    folder = Path(named)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".sh") as probe:
            Path(probe.name).chmod(0o700)
    except OSError as error:
        return Finding("cache folder", f"{folder}: not writable ({error.strerror})", fit=False)
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        return Finding("cache folder", f"{folder}: mounted noexec, GPU kernels cannot be kept")
    return Finding("cache folder", f"{folder}: writable, executable")


def _memory() -> str:
    if not MEMORY_INFO.exists():
        return "unknown"
    fields = dict(
        line.split(":", 1) for line in MEMORY_INFO.read_text().splitlines() if ":" in line
    )
    total, free = (int(fields[key].split()[0]) / 2**20 for key in ("MemTotal", "MemAvailable"))
    return f"{total:.1f} GiB, {free:.1f} GiB available"


def _device() -> list[Finding]:
    import torch

    from medmamba.machine import processor_name
    from medmamba.training.precision import describe_cpu

    findings = [Finding("CPU", f"{processor_name()}, {describe_cpu()}")]
    if not torch.cuda.is_available():
        findings.append(Finding("GPU", "none that torch can use; everything runs on the CPU"))
        return findings
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        findings.append(
            Finding(f"GPU {index}", f"{name}, {total / 2**30:.0f} GiB, {free / 2**30:.0f} GiB free")
        )
    return findings


def _parity(model: Path) -> list[Finding]:
    """The gate that a model passes before it computes in reduced precision."""
    from medmamba.pipeline.predictors import check_parity
    from medmamba.training.precision import choose_precision, resolve_device

    device = resolve_device("auto")
    precision = choose_precision(device, "auto")
    if precision == "fp32":
        return [Finding("parity gate", f"{device} has no native reduced precision: fp32")]
    gates = check_parity(model, precision)
    return [Finding(f"parity gate of {gate.precision}", f"{gate}") for gate in gates]


def _scan() -> list[Finding]:
    import torch

    from medmamba.kernels.backend import BackendStatus, backend_report, choice_problem

    def finding(row: BackendStatus, device: str) -> Finding:
        words = ["used" if row.chosen else "available" if row.available else "not used", row.reason]
        if row.error is not None and row.ns_per_element is not None:
            verdict = "passed" if row.passed else "FAILED"
            words.append(f"self-test {verdict}, error {row.error:.0e}, {row.ns_per_element:.2f} ns")
        text = ", ".join(word for word in words if word)
        return Finding(f"scan {row.name}", f"{device}: {text}", row.passed or not row.chosen)

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    problems = {device: choice_problem(device) for device in devices}
    unfit = [Finding("scan", f"{device}: {why}", False) for device, why in problems.items() if why]
    return [*unfit, *(finding(row, device) for device in devices for row in backend_report(device))]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _print_json(findings: list[Finding], packages: dict[str, str]) -> None:
    import json

    report: dict[str, Any] = {
        "fit": all(finding.fit for finding in findings),
        "findings": [vars(finding) for finding in findings],
        "packages": packages,
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


def _print_tables(findings: list[Finding], packages: dict[str, str]) -> None:
    from medmamba.cli.display import data, print_table

    rows = [(item.topic, item.value, "ok" if item.fit else "UNFIT") for item in findings]
    print_table("This machine", ("what", "found", ""), rows, right_from=3)
    data.print("packages: " + ", ".join(f"{name} {value}" for name, value in packages.items()))
