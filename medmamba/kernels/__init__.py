"""The selective scan on whatever this machine has: one operator, several backends, scan orders.

Imports torch before the native extension, so that both share one OpenMP runtime.
"""

from medmamba.kernels.multi import selective_scan_multi
from medmamba.kernels.operator import selective_scan, selective_scan_fn
from medmamba.kernels.scan_order import SCAN_ORDERS, ScanOrder

__all__ = [
    "SCAN_ORDERS",
    "ScanOrder",
    "selective_scan",
    "selective_scan_fn",
    "selective_scan_multi",
]
