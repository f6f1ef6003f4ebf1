"""Kernels for guests: one that the caller names, our own small one, or Debian's cloud kernel.

Each is prepared into a directory of its own below ``kernels`` in the data directory: the image
to boot, the few modules that it needs, and for the newest versions of this package's init an
initramfs of both.
"""

from .store import (
    ARCH,
    BootAssets,
    CachedKernel,
    build_small_kernel,
    fetch_stock_kernel,
    list_kernels,
    preferred_kernel,
    prepare_kernel,
)

__all__ = [
    "ARCH",
    "BootAssets",
    "CachedKernel",
    "build_small_kernel",
    "fetch_stock_kernel",
    "list_kernels",
    "preferred_kernel",
    "prepare_kernel",
]
