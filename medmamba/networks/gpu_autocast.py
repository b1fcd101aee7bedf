"""Autocast as a GPU does it, over CPU tensors without values.

Autocast of a CPU leaves operations in bfloat16 that CUDA's raises to float32, among them the norms
of token networks; their maps then take twice the memory. Estimates for a GPU need CUDA's choice.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

REDUCED = (torch.bfloat16, torch.float16)

FLOAT32 = frozenset(
    (
        *("layer_norm", "group_norm", "interpolate", "softplus", "cosine_similarity"),
        *("exp", "expm1", "log", "log1p", "log2", "log10", "pow", "__pow__", "reciprocal"),
        *("rsqrt", "softmax", "log_softmax", "sum", "prod", "cumsum", "logsumexp"),
    )
)
"""Operations that CUDA's autocast runs in float32 and a CPU's does not (ATen/autocast_mode.h)."""

REDUCED_TOO = frozenset(("avg_pool3d",))
"""Operations that a CPU's autocast runs in float32 and CUDA's does not."""


@contextmanager
def autocast_as_on_gpu(dtype: torch.dtype) -> Iterator[None]:
    """Autocast CPU tensors to ``dtype`` by the rules of CUDA."""
    with torch.autocast("cpu", dtype), _CudaRules():
        yield


class _CudaRules(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        options = dict(kwargs or {})
        if name == "group_norm":
            # CUDA's kernel has no form for channels-last maps and copies them first.
            args = (args[0].contiguous(), *args[1:])
        if torch.is_autocast_enabled("cpu"):
            if name in FLOAT32:
                args = [_raised(value) for value in args]
            elif name in REDUCED_TOO:
                with torch.autocast("cpu", enabled=False):
                    return func(*args, **options)
        return func(*args, **options)


def _raised(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in REDUCED else value
