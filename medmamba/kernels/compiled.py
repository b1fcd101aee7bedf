"""Compiled kernels that have no twin on a GPU: when they may run, and where they are."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from medmamba.kernels.backend import forced_backend
from medmamba.kernels.placement import is_fake, on_cpu

COMPILED_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def compiled(name: str, x: Tensor) -> ModuleType | None:
    """Return the module of this package that hands tensors to a compiled kernel.

    None where the kernel cannot take ``x``, another backend of the scan is forced, or the
    extension is missing, as the scan's backend says then.
    """
    fits = on_cpu(x) and not is_fake(x) and x.dtype in COMPILED_TYPES
    return _load(name) if fits and forced_backend() in ("", "native") else None


@functools.cache
def _load(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"medmamba.kernels.{name}")
    except ImportError:
        return None
