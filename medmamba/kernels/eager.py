"""Whether a call is plain eager code, which may go past torch's dispatcher.

The dispatcher hands a Python kernel its arguments twice over, forwards and backwards, and on caches
that a scan has just filled that takes as long as a scan of a thousand tokens. It serves whoever
wants to see the operator as one: compilers, exporters, modes, transforms, profilers and subclasses.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

_OWN = frozenset((Tensor, Parameter, type(None)))


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
    )
    return not seen and _OWN.issuperset(map(type, tensors))
