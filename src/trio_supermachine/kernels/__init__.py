"""Kernels for guests: one that the caller names, or Debian's cloud kernel, fetched once.

Each is prepared into a directory of its own below ``kernels`` in the data directory: the image
to boot, the few modules that it needs, and for every version of this package's init an
initramfs of both.
"""

from .store import BootAssets, CachedKernel, fetch_stock_kernel, list_kernels, prepare_kernel

__all__ = [
    "BootAssets",
    "CachedKernel",
    "fetch_stock_kernel",
    "list_kernels",
    "prepare_kernel",
]
