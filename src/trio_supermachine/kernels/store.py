"""The store of prepared kernels, shared by all programs of a user.

A directory below ``kernels`` appears whole, by a rename, under the lock of the store. Only files
``initramfs-*.cpio`` are added to it afterwards. A build of the small kernel takes minutes, so it
has a scratch directory and a lock of its own, and takes the store's lock to install its result.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import lru_cache, partial
from pathlib import Path
from typing import Final, Literal, get_args

import attrs
import trio

from .._util.progress import ProgressCallback
from ..errors import AssetNotFound
from ..guest import init_binary
from ..host.assets import AssetPaths, find_initramfs, find_kernel
from ..host.files import home, new_directory, new_file, offline, sweep
from ..host.locks import locked
from .fragment import fragment_digest, read_fragment
from .image import KernelImage, read_kernel
from .initramfs import LAYOUT, build_initramfs
from .modules import NEEDED, Module, pick_modules
from .versions import version_key

ARCH: Final = "x86_64"

Kind = Literal["small", "stock", "file"]

_FORMAT: Final = 2
_MAX_FILE: Final = 512 << 20
_METADATA: Final = "kernel.json"
#: Initramfs files that are kept with a kernel: one for each version of this package's init.
_INITRAMFS_KEPT: Final = 2


@attrs.frozen(kw_only=True)
class BootAssets:
    """The files that an engine boots, with their digests: ``"sha256:"`` and 64 hex digits."""

    kernel: Path
    initramfs: Path
    release: str
    arch: str
    kernel_digest: str
    initramfs_digest: str


@attrs.frozen(kw_only=True)
class CachedKernel:
    """A prepared kernel.

    :ivar directory: the directory that holds it.
    :ivar origin: the package that it is from, or the name of the file.
    :ivar kind: ``"small"`` for a kernel that this package built, ``"stock"`` for Debian's, and
        ``"file"`` for one that the caller named.
    :ivar fragment: the digest of the configuration of a small kernel.
    """

    directory: Path
    release: str
    origin: str
    kind: Kind
    digest: str
    modules: tuple[str, ...]
    fragment: str | None = None

    @property
    def kernel(self) -> Path:
        """The image to boot."""
        return self.directory / "kernel"

    @property
    def stock(self) -> bool:
        """Whether it is Debian's own."""
        return self.kind == "stock"


async def prepare_kernel(
    assets: AssetPaths | None = None, *, progress: ProgressCallback | None = None
) -> BootAssets:
    """Give a kernel and an initramfs to boot. Make or fetch them if need be.

    The kernel is the first of these:

    #. the file that ``assets`` or ``TRIO_SUPERMACHINE_KERNEL`` names,
    #. the newest small kernel that :func:`build_small_kernel` made with this version's
       configuration,
    #. the newest stock kernel that is here,
    #. the newest one that the host's ``apt-get`` downloads.

    Later calls find all of it prepared. Programs that prepare at once do the work once. Cancelled,
    it removes its half-done work.

    :param progress: is told a download; if it is ``None``, a line on stderr tells it.
    :raises AssetNotFound: a file that was named is not usable, or nothing can be downloaded here.
    """
    explicit = find_kernel(assets)
    if explicit is not None:
        cached = await _prepare_explicit(explicit)
    else:
        cached = await preferred_kernel() or await fetch_stock_kernel(progress=progress)
    initramfs = find_initramfs(assets) or await _prepare_initramfs(cached)
    return BootAssets(
        kernel=cached.kernel,
        initramfs=initramfs,
        release=cached.release,
        arch=ARCH,
        kernel_digest=cached.digest,
        initramfs_digest=f"sha256:{_file_digest(initramfs)}",
    )


async def preferred_kernel() -> CachedKernel | None:
    """Find the kernel that :func:`prepare_kernel` takes when no file is named.

    ``None`` says that it would fetch one.
    """
    kernels = await list_kernels()
    current = _fragment()[1]
    small = [kernel for kernel in kernels if kernel.fragment == current]
    stock = [kernel for kernel in kernels if kernel.stock]
    return next(iter(small + stock), None)


async def fetch_stock_kernel(*, progress: ProgressCallback | None = None) -> CachedKernel:
    """Download and prepare the newest stock kernel, unless a stock kernel is here.

    Cancellation and errors are those of :func:`prepare_kernel`.
    """
    from .stock import stock_kernel  # with apt, for hosts that have no kernel yet

    store = _store()
    async with locked(store / ".lock"):
        if kernels := [kernel for kernel in _list(store) if kernel.stock]:
            return kernels[0]
        await trio.to_thread.run_sync(sweep, store)
        async with stock_kernel(store, progress) as (package, tree):
            return await trio.to_thread.run_sync(_install_stock, store, package, tree)


async def build_small_kernel(
    *, jobs: int | None = None, progress: ProgressCallback | None = None
) -> CachedKernel:
    """Build the small kernel from Debian's ``linux-source`` package, unless the same is here.

    A build takes minutes of all processors, and 1 GB below the data directory meanwhile.
    Afterwards :func:`prepare_kernel` prefers its kernel. A later version of the package is built
    beside it, since bakes refer to the very kernel that they were made with. Programs that build at
    once do the work once. Cancellation kills the compilers and removes the half-done work; after
    this program was killed, the next build removes it.

    :param jobs: the number of compilers to run at once; ``None`` is the number of processors.
    :param progress: is told the phases ``"download"`` (in bytes), ``"unpack"``, and ``"build"``
        (in steps, of which ``total`` is an estimate).
    :raises AssetNotFound: a tool is missing (the message names the packages), or the sources
        cannot be downloaded, do not take the configuration, or fail to compile.
    :raises NotSupported: the host is not an x86-64 one.
    """
    from .small import built_kernel, check_tools, choose_source  # with make, for this call alone

    if offline():
        preferred = await preferred_kernel()
        if preferred is not None and preferred.kind == "small":
            return preferred
    await trio.to_thread.run_sync(check_tools)
    package = await choose_source()
    origin = f"{package.name} {package.version}"
    fragment, digest = _fragment()
    store = _store()
    # Beside the store's own temporary names, which are swept under the store's lock: a build does
    # not hold that one for minutes.
    scratch = store / ".build"
    async with locked(scratch / ".lock"):
        for kernel in _list(store):
            if (kernel.fragment, kernel.origin) == (digest, origin):
                return kernel
        await trio.to_thread.run_sync(sweep, scratch)
        building = built_kernel(package, fragment, scratch, jobs=jobs, progress=progress)
        async with building as path:
            image = read_kernel(path.read_bytes(), str(path))
            directory = store / f"small-{image.release}-{digest}"
            install = partial(
                _install, directory, image, [], origin=origin, kind="small", fragment=digest
            )
            async with locked(store / ".lock"):
                return await trio.to_thread.run_sync(install)


async def list_kernels() -> list[CachedKernel]:
    """List the prepared kernels, the newest release first."""
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
    """Read the kernel in ``directory``; ``None`` if another version of this package made it."""
    try:
        metadata = json.loads((directory / _METADATA).read_bytes())
        if metadata["format"] != _FORMAT:
            return None
        if metadata["modules"] and metadata.get("needed") != list(NEEDED):
            return None
        return CachedKernel(
            directory=directory,
            release=str(metadata["release"]),
            origin=str(metadata["origin"]),
            kind=_kind(metadata["kind"]),
            digest=str(metadata["digest"]),
            modules=tuple(str(name) for name in metadata["modules"]),
            fragment=metadata["fragment"],
        )
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _kind(value: object) -> Kind:
    kind: Kind
    for kind in get_args(Kind):
        if kind == value:
            return kind
    raise ValueError(value)


@lru_cache(maxsize=1)
def _fragment() -> tuple[str, str]:
    """Read the small kernel's configuration, and compute its digest."""
    fragment = read_fragment(ARCH)
    return fragment, fragment_digest(fragment)


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
    return _install(store / image.release, image, modules, origin=package, kind="stock")


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
    # Modules are where an unpacked package has them, or the host. A kernel without any has all that
    # a guest needs built in.
    roots = (path.parent.parent, Path("/"))
    trees = (_module_tree(root, image.release) for root in roots)
    tree = next((tree for tree in trees if tree.is_dir()), None)
    modules = pick_modules(tree) if tree is not None else []
    return _install(directory, image, modules, origin=str(path), kind="file")


def _install(
    directory: Path,
    image: KernelImage,
    modules: list[Module],
    *,
    origin: str,
    kind: Kind,
    fragment: str | None = None,
) -> CachedKernel:
    metadata = {
        "format": _FORMAT,
        "release": image.release,
        "arch": ARCH,
        "origin": origin,
        "kind": kind,
        "form": image.form,
        "digest": f"sha256:{hashlib.sha256(image.data).hexdigest()}",
        "fragment": fragment,
        "modules": [module.name for module in modules],
        "needed": list(NEEDED),
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
    init = init_binary(ARCH)
    path = kernel.directory / f"initramfs-{LAYOUT}-{_file_digest(init)[:16]}.cpio"
    if not path.exists():
        async with locked(_store() / ".lock"):
            if not path.exists():
                await trio.to_thread.run_sync(_make_initramfs, path, kernel, init.read_bytes())
    await trio.lowlevel.checkpoint()
    return path


def _make_initramfs(path: Path, kernel: CachedKernel, init: bytes) -> None:
    sweep(kernel.directory)
    modules = [
        Module(name, _module_file(kernel.directory, name).read_bytes()) for name in kernel.modules
    ]
    with new_file(path) as temporary:
        temporary.write_bytes(build_initramfs(init, modules))
        temporary.chmod(0o644)
    # A program of another version may be about to open its own file: the last but one stays.
    made = sorted(kernel.directory.glob("initramfs-*.cpio"), key=lambda file: file.stat().st_mtime)
    for old in made[:-_INITRAMFS_KEPT]:
        old.unlink()


def _file_digest(path: Path) -> str:
    """Compute a file's SHA-256 in hex. Read the file again only when it has changed."""
    status = path.stat()
    return _digest_of(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=32)
def _digest_of(path: Path, *identity: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
