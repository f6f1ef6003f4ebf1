"""Kernels for guests: a file that the caller names, our small kernel, or Debian's cloud kernel.

A kernel is prepared once, in a directory of its own below ``kernels`` in the data directory. That
has the image to boot, the few modules that a guest needs, and an initramfs of these modules and of
this package's init, for each of the newest versions of init.
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
