"""Which device and which number format a run uses, and why; how the process uses memory."""

import contextlib
import ctypes
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from medmamba.errors import EnvironmentFault, UsageError
from medmamba.training.team import local_rank, world_size

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""

NATIVE_BF16_CAPABILITY = (8, 0)
"""First CUDA compute capability with bfloat16 matrix units (Ampere)."""


def resolve_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>`` into a device that exists.

    Among processes that ``torchrun`` started, each takes the GPU of its own number.

    Raises:
        UsageError: no such name.
        EnvironmentFault: torch cannot use that device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world_size() > 1:
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"device '{name}' does not exist. Use auto, cpu, cuda or cuda:<index>."
        ) from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise EnvironmentFault(
                f"device '{name}': torch finds {count} CUDA devices here. Use --device cpu.",
                code="E_DEVICE",
            )
    return device


def has_native_bf16(device: torch.device) -> bool:
    """Tell whether bfloat16 products run in hardware there; emulated ones are slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= NATIVE_BF16_CAPABILITY
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose_precision(device: torch.device, requested: str) -> str:
    """Return ``bf16``, ``fp16`` or ``fp32``; ``auto`` takes the fastest that is native.

    Raises:
        UsageError: no such precision, or fp16 on a CPU, where products of it are emulated.
    """
    if requested not in PRECISIONS:
        raise UsageError(f"precision '{requested}' does not exist. Use {', '.join(PRECISIONS)}.")
    if requested == "auto":
        if has_native_bf16(device):
            return "bf16"
        return "fp16" if device.type == "cuda" else "fp32"
    if requested == "fp16" and device.type != "cuda":
        raise UsageError("precision 'fp16' needs a CUDA device. Use bf16 or fp32 on a CPU.")
    if requested == "bf16" and not has_native_bf16(device):
        logger.warning("bf16 is not native on %s: it will be slower than fp32", device)
    return requested


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the autocast context of a precision; it does nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[precision])


@contextlib.contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Make torch refuse algorithms whose results vary, for the time of the block."""
    before = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    if enabled:
        # cuBLAS reads it when it is first used; without it torch refuses its products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled or before)
    # Patches all have one size, so that the search for the fastest convolution pays.
    torch.backends.cudnn.benchmark = not enabled
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark


def keep_freed_memory(*, block_bytes: int = 2**30, total_bytes: int = 2**31 - 1) -> None:
    """Let glibc keep large freed blocks instead of returning them to the system.

    Each step frees and takes the same activations again; with the default settings every one of
    their pages is faulted in anew, a tenth of a step in fp32. Other C libraries are left alone.

    Args:
        block_bytes: larger blocks go back to the system all the same.
        total_bytes: about the most that is kept.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    # Older versions allow no more than half a heap, 32 MiB.
    if not library.mallopt(M_MMAP_THRESHOLD, block_bytes):
        library.mallopt(M_MMAP_THRESHOLD, 2**25)
    library.mallopt(M_TRIM_THRESHOLD, total_bytes)


def describe_cpu() -> str:
    """Say what the CPU offers in one line."""
    capability = torch.backends.cpu.get_cpu_capability()
    native = "native bf16" if has_native_bf16(torch.device("cpu")) else "no native bf16"
    return f"{capability}, {native}, {torch.get_num_threads()} threads"
