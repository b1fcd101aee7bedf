"""Plain eager calls, which may go past torch's dispatcher and need not be looked at twice.

The dispatcher hands a Python kernel its arguments twice over, forwards and backwards, and on caches
that a scan has just filled that takes as long as a scan of a thousand tokens. It serves whoever
wants to see the operator as one: compilers, exporters, modes, transforms, profilers and subclasses.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_OWN = frozenset((Tensor, Parameter, type(None)))
_MOST_KINDS = 4096  # remembered at a time
_kinds: set[tuple[object, ...]] = set()


def is_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether nobody but autograd takes part in what is done with these tensors.

    Args:
        tensors: every tensor of the call; fake, functional and other subclasses are not plain.
    """
    if torch.compiler.is_compiling():
        return False
    seen = (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )
    return not seen and _OWN.issuperset(map(type, tensors))


def once_per_kind(tensors: Sequence[Tensor | None], check: Callable[[], None]) -> None:
    """Check tensors of such shapes, strides, types and devices unless some have passed before.

    Args:
        tensors: plain ones; whatever the check depends on follows from the four.
        check: raises where they cannot be used, which is not remembered.
    """
    kind = tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors])
    if kind in _kinds:
        return
    check()
    if len(_kinds) >= _MOST_KINDS:
        _kinds.clear()
    _kinds.add(kind)
