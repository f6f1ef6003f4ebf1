"""The prepared kernels on this host."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Final

import attrs
import trio

from ..assets import AssetPaths, find_initramfs, find_kernel
from ..errors import AssetNotFound
from ..guest import init_binary
from ..hostfiles import home, locked, new_directory, new_file, sweep
from ..oci.progress import ProgressCallback
from .image import KernelImage, read_kernel
from .initramfs import LAYOUT, build_initramfs
from .modules import Module, pick_modules
from .stock import stock_kernel, version_key

ARCH: Final = "x86_64"

_FORMAT: Final = 1
_MAX_FILE: Final = 512 << 20
_METADATA: Final = "kernel.json"


@attrs.frozen(kw_only=True)
class BootAssets:
    """What an engine boots."""

    kernel: Path
    initramfs: Path
    release: str
    arch: str


@attrs.frozen(kw_only=True)
class CachedKernel:
    """A prepared kernel: the directory that holds it, and where it is from."""

    directory: Path
    release: str
    origin: str
    stock: bool
    modules: tuple[str, ...]

    @property
    def kernel(self) -> Path:
        """The image to boot."""
        return self.directory / "kernel"


async def prepare_kernel(
    assets: AssetPaths | None = None, *, progress: ProgressCallback | None = None
) -> BootAssets:
    """Give a kernel and an initramfs to boot, made or fetched if need be.

    The kernel is the one that ``assets`` or ``TRIO_SUPERMACHINE_KERNEL`` names, else the newest
    stock kernel that is here, else one that the host's ``apt-get`` downloads; without a
    ``progress`` a line on stderr says so. Later calls find all of it prepared. May be cancelled
    at any time: what is half done is removed. Programs that prepare at once do the work once.

    :raises AssetNotFound: a file that was named is not usable, or nothing can be downloaded here.
    """
    explicit = find_kernel(assets)
    if explicit is not None:
        cached = await _prepare_explicit(explicit)
    else:
        kernels = await list_kernels()
        stock = [kernel for kernel in kernels if kernel.stock]
        cached = stock[0] if stock else await fetch_stock_kernel(progress=progress)
    initramfs = find_initramfs(assets) or await _prepare_initramfs(cached)
    return BootAssets(kernel=cached.kernel, initramfs=initramfs, release=cached.release, arch=ARCH)


async def fetch_stock_kernel(*, progress: ProgressCallback | None = None) -> CachedKernel:
    """Download and prepare the newest stock kernel, unless it is here.

    Cancellation and errors are those of :func:`prepare_kernel`.
    """
    store = _store()
    async with locked(store / ".lock"):
        if kernels := [kernel for kernel in _list(store) if kernel.stock]:
            return kernels[0]
        await trio.to_thread.run_sync(sweep, store)
        async with stock_kernel(store, progress) as (package, tree):
            return await trio.to_thread.run_sync(_install_stock, store, package, tree)


async def list_kernels() -> list[CachedKernel]:
    """The prepared kernels, the newest release first."""
    await trio.lowlevel.checkpoint()
    return _list(_store())


def _store() -> Path:
    return home() / "kernels"


def _list(store: Path) -> list[CachedKernel]:
    found = [_load(metadata.parent) for metadata in store.glob(f"[!.]*/{_METADATA}")]
    kernels = [kernel for kernel in found if kernel is not None]
    kernels.sort(key=lambda kernel: version_key(kernel.release), reverse=True)
    return kernels


def _load(directory: Path) -> CachedKernel | None:
    """The kernel in ``directory``; nothing if another version of this package made it."""
    try:
        metadata = json.loads((directory / _METADATA).read_bytes())
        if metadata["format"] != _FORMAT:
            return None
        return CachedKernel(
            directory=directory,
            release=str(metadata["release"]),
            origin=str(metadata["origin"]),
            stock=bool(metadata["stock"]),
            modules=tuple(str(name) for name in metadata["modules"]),
        )
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _install_stock(store: Path, package: str, tree: Path) -> CachedKernel:
    images = list((tree / "boot").glob("vmlinuz-*"))
    if len(images) != 1:
        raise AssetNotFound(
            "kernel",
            f"the package {package} holds {len(images)} kernels",
            remedy="set TRIO_SUPERMACHINE_KERNEL to an x86-64 Linux kernel",
        )
    image = read_kernel(images[0].read_bytes(), package)
    modules = pick_modules(_module_tree(tree, image.release))
    return _install(store / image.release, image, modules, origin=package, stock=True)


def _module_tree(root: Path, release: str) -> Path:
    tree = root / "lib/modules" / release
    return tree if tree.is_dir() else root / "usr/lib/modules" / release


async def _prepare_explicit(path: Path) -> CachedKernel:
    store = _store()
    directory = store / f"file-{_identity(path)}"
    cached = _load(directory)
    if cached is None:
        async with locked(store / ".lock"):
            cached = _load(directory)
            if cached is None:
                cached = await trio.to_thread.run_sync(_install_explicit, directory, path)
    return cached


def _identity(path: Path) -> str:
    status = path.stat()
    found = (str(path.resolve()), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def _install_explicit(directory: Path, path: Path) -> CachedKernel:
    if path.stat().st_size > _MAX_FILE:
        raise AssetNotFound("kernel", f"{path} is too large for a kernel", remedy="name another")
    image = read_kernel(path.read_bytes(), str(path))
    # As an unpacked package has them, or the host. A kernel without modules has all built in.
    roots = (path.parent.parent, Path("/"))
    trees = (_module_tree(root, image.release) for root in roots)
    tree = next((tree for tree in trees if tree.is_dir()), None)
    modules = pick_modules(tree) if tree is not None else []
    return _install(directory, image, modules, origin=str(path), stock=False)


def _install(
    directory: Path, image: KernelImage, modules: list[Module], *, origin: str, stock: bool
) -> CachedKernel:
    metadata = {
        "format": _FORMAT,
        "release": image.release,
        "arch": ARCH,
        "origin": origin,
        "stock": stock,
        "form": image.form,
        "modules": [module.name for module in modules],
    }
    if directory.exists():  # of another version of this package, or damaged
        shutil.rmtree(directory)
    with new_directory(directory) as temporary:
        temporary.chmod(0o755)
        (temporary / "kernel").write_bytes(image.data)
        (temporary / "modules").mkdir()
        for module in modules:
            _module_file(temporary, module.name).write_bytes(module.data)
        (temporary / _METADATA).write_text(json.dumps(metadata, indent=1) + "\n")
    kernel = _load(directory)
    assert kernel is not None
    return kernel


def _module_file(directory: Path, name: str) -> Path:
    return directory / "modules" / f"{name}.ko"


async def _prepare_initramfs(kernel: CachedKernel) -> Path:
    init = init_binary(ARCH).read_bytes()
    digest = hashlib.sha256(init).hexdigest()[:16]
    path = kernel.directory / f"initramfs-{LAYOUT}-{digest}.cpio"
    if not path.exists():
        await trio.to_thread.run_sync(_make_initramfs, path, kernel, init)
    await trio.lowlevel.checkpoint()
    return path


def _make_initramfs(path: Path, kernel: CachedKernel, init: bytes) -> None:
    modules = [
        Module(name, _module_file(kernel.directory, name).read_bytes()) for name in kernel.modules
    ]
    with new_file(path) as temporary:
        temporary.write_bytes(build_initramfs(init, modules))
        temporary.chmod(0o644)
