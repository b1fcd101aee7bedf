"""Networks: one file each, built from a ``NetworkSpec``, found in the ``NETWORKS`` dict.

The dict itself is in ``registry.py``. It is loaded on first use, because it needs torch, while
plans need only the values of ``spec.py``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medmamba.networks.registry import NETWORKS, build_network, check_patch

__all__ = ["NETWORKS", "build_network", "check_patch"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from medmamba.networks import registry

    return getattr(registry, name)
