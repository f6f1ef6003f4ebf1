"""Public names: where they say that they live, and that values and errors survive pickling."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import attrs
import pytest

import trio_supermachine as public

from ..support.snapshot_files import PAGES, page, write_full

PACKAGE = "trio_supermachine"
CLASSES = {
    name: value for name in public.__all__ if isinstance(value := getattr(public, name), type)
}
ERRORS = {name: cls for name, cls in CLASSES.items() if issubclass(cls, public.SupermachineError)}

_NUMBERS: dict[str, Any] = {field.name: 1 for field in attrs.fields(public.PoolStats)}

#: A value of each frozen class, with something else than the default in it where that is possible.
VALUES: list[Any] = [
    public.AssetPaths(kernel="vmlinuz"),
    public.EgressEvent(
        allowed=False, protocol="dns", address=None, port=53, host="a.example", reason="not listed"
    ),
    public.EgressPolicy.allow(hosts=["*.example"], cidrs=["10.0.0.0/8"]).with_limits(
        bytes_per_second=1000
    ),
    public.EndpointResources(http_port=8080, vsock_mux="mux.sock"),
    public.Image.builder("oci:there").with_env("A", "b").with_extra_file("/a", b"data"),
    public.ExecOutcome(
        returncode=-9,
        stdout=b"out",
        stderr=b"",
        duration=0.5,
        timed_out=True,
        cancelled=False,
        peak_rss_kib=1024,
    ),
    public.ImageConfig(env=("A=b",), cmd=("sh",), labels={"a": "b"}),
    public.LimitStatistics(limit=2.0, in_use=1, holders=1, waiting=0),
    public.MountSpec("/host", "tag", "/guest", symlinks=public.SymlinkPolicy.OPAQUE),
    public.PoolStats(**_NUMBERS),
    public.Progress("download", "sha256:0", 1, None),
    public.SnapshotResources(on_listener=True, out_path="snapshot"),
    public.TlsConfig(certificate="cert.pem", key="key.pem", alpn=("h2",)),
    public.VmConfig(
        memory_mib=64,
        mounts=[public.MountSpec("/host", "tag", "/guest")],
        egress=public.EgressPolicy.deny_all(),
    ),
    public.VmResources(profile=public.VmProfile.LATENCY, volumes=[public.VolumeSpec("/v", "/w")]),
    public.VolumeSpec("/host", "/guest", 4096),
]
#: Frozen classes of which there is no value that could be pickled: they hold a VM or a callback.
HOLDERS = {"ExecBuilder", "PoolBuilder"}
#: Frozen classes that compare by identity.
BY_IDENTITY = {"Image"}
MEMBERS = [member for cls in CLASSES.values() if issubclass(cls, Enum) for member in cls]

#: One of each error, made as the library makes it.
FAILURES: list[public.SupermachineError] = [
    public.AcquireTimeout(1.5),
    public.AdmissionRefused(4096, 1024),
    public.AssetNotFound("sqfstar", "it is not there", remedy="apt-get install squashfs-tools"),
    public.BakeFailed("the workload has ended", console="Oops"),
    public.CaptureFailed("the guest did not come to rest"),
    public.ConfigError("memory_mib must be at least 32, not 1"),
    public.DiskFull("/data/file"),
    public.EngineUnavailable({"qemu": "not installed", "kvm": "no /dev/kvm"}),
    public.ExecEof("the agent left", is_setup_failure=True),
    public.FileTooLarge("/etc/passwd", 10),
    public.ImageCorrupt("oci:there", "a digest differs"),
    public.ImageNotFound("oci:there", "it does not exist"),
    public.NotSupported("volumes"),
    public.ReferenceInvalid("::", "the path is missing"),
    public.RegistryError("it refused", registry="127.0.0.1:5000", status=403),
    public.ResourceError(public.ResourceErrorKind.ZERO_VCPUS, "no vCPUs"),
    public.RestoreTimeout(10.0, console="tail"),
    public.SnapshotIncompatible("/snapshot", "made by another engine"),
    public.SnapshotInvalid("/snapshot", "it is damaged"),
    public.StartTimeout(60.0, console="tail", detail="QEMU 10"),
    public.SupermachineError("something"),
    public.VmExited("reset", "kernel panic", console="tail"),
]


def name_of(value: object) -> str:
    return type(value).__name__


@pytest.mark.parametrize("name", CLASSES)
def test_public_classes_say_that_they_are_of_the_package(name: str) -> None:
    cls = CLASSES[name]
    assert (cls.__module__, cls.__qualname__) == (PACKAGE, name)
    assert repr(cls) in (f"<class '{PACKAGE}.{name}'>", f"<enum '{name}'>")
    for key in vars(cls):
        member = getattr(cls, key)
        if isinstance(member, FunctionType | MethodType) and member.__qualname__.startswith(name):
            assert member.__module__ == PACKAGE
    for key in {*dir(cls)} - {*vars(cls)}:
        member = inspect.getattr_static(cls, key)
        function = member.fget if isinstance(member, property) else member
        if isinstance(function, FunctionType) and not key.startswith("_"):
            owner = function.__qualname__.partition(".")[0]
            assert (function.__module__, owner in CLASSES) in ((PACKAGE, True), ("enum", False))


def test_methods_that_come_from_parts_of_a_class_say_the_class() -> None:
    assert repr(public.Vm.exec).startswith("<function Vm.exec at")
    assert repr(public.PooledVm.ping).startswith("<function Vm.ping at")
    names = [
        (public.Vm.exec, "Vm.exec"),
        (public.PooledVm.read_file, "Vm.read_file"),
        (public.Vm.open_read, "Vm.open_read"),
        (public.Vm.snapshot, "Vm.snapshot"),
        (public.OciImageBuilder.with_env, "OciImageBuilder.with_env"),
        (public.PoolBuilder.min, "PoolBuilder.min"),
    ]
    for method, name in names:
        assert (method.__module__, method.__qualname__) == (PACKAGE, name)
        assert pickle.loads(pickle.dumps(method)) is method
        assert typing.get_type_hints(inspect.unwrap(method))


@pytest.mark.parametrize("name", CLASSES)
def test_types_of_fields_can_be_found_out(name: str) -> None:
    cls = CLASSES[name]
    hints = typing.get_type_hints(cls)
    if attrs.has(cls):
        assert {field.name for field in attrs.fields(cls)} <= hints.keys()


@pytest.mark.parametrize(
    "cls", [public.Image, public.OciImageBuilder, public.Vm, public.Pool, public.PoolBuilder]
)
def test_methods_say_what_each_parameter_means(cls: type) -> None:
    missing = []
    for name in dir(cls):
        method = getattr(cls, name)
        if isinstance(method, FunctionType) and not name.startswith("_"):
            described = re.findall(r":param (\w+): \S", inspect.getdoc(method) or "")
            parameters = [*inspect.signature(method).parameters]
            missing += [f"{name}({key})" for key in parameters if key not in ("self", *described)]
            assert {*described} <= {*parameters}, name
    assert missing == []


def test_the_tables_of_public_names_agree() -> None:
    source = Path(public.__file__).read_text()
    (block,) = [
        statement
        for statement in ast.parse(source).body
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"
    ]
    checked: dict[str, set[str]] = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        module = "." * statement.level + (statement.module or "")
        for alias in statement.names:
            assert alias.asname == alias.name  # so that it counts as exported
            checked.setdefault(module, set()).add(alias.name)
    assert checked == {module: {*names} for module, names in public._MODULES.items()}
    names = [name for names in public._MODULES.values() for name in names]
    assert sorted([*names, "__version__"]) == sorted(public.__all__)
    assert len(set(public.__all__)) == len(public.__all__)
    assert {*public.__all__} <= {*dir(public)}


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=f"module '{PACKAGE}' has no attribute 'Nothing'"):
        public.Nothing  # type: ignore[attr-defined]  # noqa: B018


def test_a_type_checker_knows_the_names_and_no_others(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import trio_supermachine as tsm\nprint(tsm.Vm, tsm.VmConfg)\n")
    # Modules that are not given are not read, so this takes a second.
    words = [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=skip"]
    command = [*words, "--cache-dir", str(tmp_path / "cache"), public.__file__, str(program)]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    errors = [line for line in checked.stdout.splitlines() if "error" in line]
    assert len(errors) == 2, checked
    assert 'Module has no attribute "VmConfg"' in errors[0]
    assert errors[1].startswith("Found 1 error in 1 file")


def test_every_frozen_class_and_every_error_is_tried_below() -> None:
    frozen = {name for name, cls in CLASSES.items() if attrs.has(cls)}
    assert {name_of(value) for value in VALUES} == frozen - HOLDERS - BY_IDENTITY
    assert {name_of(failure) for failure in FAILURES} == ERRORS.keys()


def copies(value: object) -> Iterator[Any]:
    """Give copies by every protocol of pickle, and by the two ways of the copy module."""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        pickled = pickle.dumps(value, protocol)
        if protocol < 2:  # names are plain text there
            internal = re.findall(rb"ctrio_supermachine\.[\w.]+\n(\w+)\n", pickled)
            assert not CLASSES.keys() & {name.decode() for name in internal}
        yield pickle.loads(pickled)
    yield copy.copy(value)
    yield copy.deepcopy(value)


@pytest.mark.parametrize("value", VALUES, ids=name_of)
def test_values_survive_pickling(value: Any) -> None:
    for again in copies(value):
        assert type(again) is type(value)
        assert again == value


@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_members_of_enumerations_survive_pickling(member: object) -> None:
    for again in copies(member):
        assert again is member


async def test_an_image_with_its_snapshot_survives_pickling(tmp_path: Path) -> None:
    layer = tmp_path / "layer.squashfs"
    layer.write_bytes(b"layer")
    await write_full(tmp_path / "snapshot", page(1) * PAGES, layers=(layer,))
    image = await public.Image.from_snapshot(tmp_path / "snapshot")
    assert image.snapshot is not None
    for again in copies(image):
        assert type(again) is public.Image
        assert again.snapshot is not None
        assert again.snapshot.identity == image.snapshot.identity
        assert again.snapshot.memory == image.snapshot.memory
        for field in attrs.fields(public.Image):
            if field.name != "snapshot":  # these compare by identity
                assert getattr(again, field.name) == getattr(image, field.name)


@pytest.mark.parametrize("failure", FAILURES, ids=name_of)
def test_errors_survive_pickling(failure: public.SupermachineError) -> None:
    failure.add_note("in a worker process")
    for again in copies(failure):
        assert type(again) is type(failure)
        assert str(again) == str(failure)
        assert again.args == failure.args
        assert vars(again) == vars(failure)


def test_an_error_of_a_users_own_survives_pickling() -> None:
    for again in copies(OwnError(3)):
        assert (str(again), again.number) == ("number 3", 3)


class OwnError(public.SupermachineError):
    def __init__(self, number: int) -> None:
        super().__init__(f"number {number}")
        self.number = number


@pytest.mark.parametrize("value", [*VALUES, *MEMBERS, *FAILURES], ids=name_of)
def test_reprs_name_no_module(value: object) -> None:
    assert "trio_supermachine." not in repr(value)
