"""Choice of backend: visible, forced by the environment, never silent."""

import logging
import sys

import pytest
import torch
from scan_cases import Sizes, make_arguments

from medmamba.errors import KernelError
from medmamba.kernels import backend, selective_scan


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    backend._import_failure.cache_clear()
    backend._warn_slow.cache_clear()


def name_of(chosen: backend.Backend) -> str:
    modules = {module: name for name, module in backend.MODULES.items()}
    return modules[chosen.__name__]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["reference", "torch", "native"])
def test_the_environment_forces_a_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "native":
        pytest.importorskip("medmamba.kernels.native")
    monkeypatch.setenv(backend.VARIABLE, name)
    assert name_of(backend.choose(make_arguments(Sizes()))) == name


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "cuda")
    with pytest.raises(KernelError, match="names no backend; give one of"):
        backend.choose(make_arguments(Sizes()))


def test_a_forced_backend_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "torch")
    with pytest.raises(KernelError, match="MEDMAMBA_SCAN=torch cannot run"):
        backend.choose(make_arguments(Sizes(), segment=4))


def test_float64_takes_the_definition() -> None:
    values = torch.zeros(1, 2, 3, dtype=torch.float64)
    projections = torch.zeros(1, 2, 1, dtype=torch.float64)
    assert selective_scan(values, values, -torch.ones(3, 1), projections, projections).dtype == (
        torch.float64
    )


def test_a_missing_kernel_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, backend.MODULES["native"], None)
    arguments = make_arguments(Sizes())
    with caplog.at_level(logging.WARNING):
        assert name_of(backend.choose(arguments)) == "torch"
        backend.choose(arguments)
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "slower" in message
    assert "native: cannot be imported" in message


def test_the_report_tells_every_backend() -> None:
    report = backend.backend_report()
    assert tuple(row.name for row in report) == backend.ORDER
    assert sum(row.chosen for row in report) == 1
    for row in report:
        if row.available:
            assert row.passed, row
            assert row.ns_per_element is not None
        else:
            assert row.reason
            assert not row.passed


def test_the_report_tells_what_the_environment_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.choice_problem() == ""
    monkeypatch.setenv(backend.VARIABLE, "reference")
    chosen = [row for row in backend.backend_report() if row.chosen]
    assert [row.name for row in chosen] == ["reference"]
    assert chosen[0].reason.startswith("forced by MEDMAMBA_SCAN")
    monkeypatch.setenv(backend.VARIABLE, "cuda")
    assert "names no backend" in backend.choice_problem()
    assert not any(row.chosen for row in backend.backend_report())
