"""The typed low-level description of a machine, as the design lays it down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine.config.resources import (
    DEFAULT_CMDLINE,
    DEFAULT_EXEC_GUEST_PORT,
    EndpointResources,
    SnapshotResources,
    VmProfile,
    VmResources,
    VolumeSpec,
    default_cmdline,
)
from trio_supermachine.errors import ConfigError, ResourceError, ResourceErrorKind


def test_the_defaults_describe_a_small_machine_with_nothing_attached() -> None:
    resources = VmResources()
    assert resources.kernel_path is None
    assert resources.initrd_path is None
    assert resources.memory_mib == 256
    assert resources.memory_bytes == 256 * 1024 * 1024
    assert resources.vcpus == 1
    assert resources.profile is None
    assert resources.block_devices == ()
    assert resources.volumes == ()
    assert not resources.is_restore
    assert not resources.cow_restore
    assert resources.snapshot == SnapshotResources()
    assert not resources.snapshot.has_trigger
    assert resources.endpoints == EndpointResources()
    assert resources.endpoints.vsock_mux is None
    assert resources.endpoints.http_port is None
    assert resources.endpoints.vsock_mux_handoff is None
    assert resources.endpoints.vsock_exec is None
    assert resources.endpoints.vsock_exec_guest_port == DEFAULT_EXEC_GUEST_PORT == 1028
    assert resources.balloon_target_pages is None


def test_the_default_command_line_names_the_architectures_console() -> None:
    assert DEFAULT_CMDLINE == "console=ttyAMA0 reboot=t panic=-1"
    assert default_cmdline("aarch64") == default_cmdline("arm64") == DEFAULT_CMDLINE
    assert default_cmdline("x86_64") == "console=ttyS0 reboot=t panic=-1"
    assert VmResources().cmdline == default_cmdline()


@pytest.mark.parametrize(
    ("text", "profile", "vcpus"),
    [
        ("latency", VmProfile.LATENCY, 1),
        ("low-latency", VmProfile.LATENCY, 1),
        ("throughput", VmProfile.THROUGHPUT, 4),
    ],
)
def test_profiles_have_names_and_vcpus(text: str, profile: VmProfile, vcpus: int) -> None:
    parsed = VmProfile.parse(text)
    assert parsed is profile
    assert parsed.default_vcpus == vcpus
    assert VmResources().with_profile(parsed).apply_profile_defaults().vcpus == vcpus


@given(st.text().filter(lambda text: text not in ("latency", "low-latency", "throughput")))
def test_any_other_profile_is_none(text: str) -> None:
    assert VmProfile.parse(text) is None


@pytest.mark.parametrize("text", ["Latency", " latency", "THROUGHPUT", "throughput\n", ""])
def test_profiles_are_not_guessed(text: str) -> None:
    assert VmProfile.parse(text) is None


def test_profile_defaults_leave_the_original_and_a_given_number_of_vcpus_alone() -> None:
    resources = VmResources().with_profile(VmProfile.THROUGHPUT)
    assert resources.apply_profile_defaults().vcpus == 4
    assert resources.vcpus == 1
    assert resources.with_vcpus(2).apply_profile_defaults().vcpus == 2
    assert VmResources().apply_profile_defaults() == VmResources()


VOLUME = VolumeSpec("/data.img", "/data")

SETTERS: list[tuple[Callable[[VmResources], VmResources], Callable[[VmResources], Any], Any]] = [
    (lambda r: r.with_kernel_path("/k"), lambda r: r.kernel_path, Path("/k")),
    (lambda r: r.with_initramfs("/i"), lambda r: r.initrd_path, Path("/i")),
    (lambda r: r.with_cmdline("quiet"), lambda r: r.cmdline, "quiet"),
    (lambda r: r.with_memory_mib(512), lambda r: r.memory_bytes, 512 << 20),
    (lambda r: r.with_profile(VmProfile.LATENCY), lambda r: r.profile, VmProfile.LATENCY),
    (lambda r: r.with_vcpus(3), lambda r: r.vcpus, 3),
    (lambda r: r.with_block_device("/a"), lambda r: r.block_devices, (Path("/a"),)),
    (lambda r: r.with_volume(VOLUME), lambda r: r.volumes, (VOLUME,)),
    (lambda r: r.with_restore("/s"), lambda r: r.is_restore, True),
    (lambda r: r.with_cow_restore(), lambda r: r.cow_restore, True),
    (lambda r: r.with_snapshot_after_ms(9), lambda r: r.snapshot.after_ms, 9),
    (lambda r: r.with_snapshot_after_ms(9, "/o"), lambda r: r.snapshot.out_path, Path("/o")),
    (lambda r: r.with_snapshot_at_heartbeat(2), lambda r: r.snapshot.at_heartbeat, 2),
    (lambda r: r.with_snapshot_on_listener(), lambda r: r.snapshot.on_listener, True),
    (lambda r: r.with_quiesce_ms(7), lambda r: r.snapshot.quiesce_ms, 7),
    (lambda r: r.with_vsock_mux("/m"), lambda r: r.endpoints.vsock_mux, Path("/m")),
    (lambda r: r.with_http_port(8080), lambda r: r.endpoints.http_port, 8080),
    (lambda r: r.with_vsock_mux_handoff("/h"), lambda r: r.endpoints.vsock_mux_handoff, Path("/h")),
    (lambda r: r.with_vsock_exec("/e"), lambda r: r.endpoints.vsock_exec, Path("/e")),
    (lambda r: r.with_vsock_exec_guest_port(5), lambda r: r.endpoints.vsock_exec_guest_port, 5),
]


@pytest.mark.parametrize(("change", "read", "value"), SETTERS)
def test_each_setter_changes_a_copy(
    change: Callable[[VmResources], VmResources],
    read: Callable[[VmResources], Any],
    value: Any,
) -> None:
    original = VmResources.for_kernel("/kernel")
    changed = change(original)
    assert read(changed) == value
    assert original == VmResources.for_kernel("/kernel")
    assert changed != original


@given(st.permutations(SETTERS))
def test_setters_chain_in_any_order(
    setters: list[tuple[Callable[[VmResources], VmResources], Callable[[VmResources], Any], Any]],
) -> None:
    resources = VmResources()
    for change, _, _ in setters:
        resources = change(resources)
    for _, read, value in setters:
        assert read(resources) == value
    resources.validate_for_run()


def test_disks_and_volumes_add_up_in_order() -> None:
    resources = VmResources().with_block_device("/a").with_block_device(Path("/b"))
    assert resources.block_devices == (Path("/a"), Path("/b"))


def test_values_are_frozen() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        VmResources().vcpus = 2  # type: ignore[misc]


def test_a_kernel_makes_a_machine_that_can_run_and_so_does_a_snapshot() -> None:
    booted = VmResources.for_kernel("/k", "/i")
    assert (booted.kernel_path, booted.initrd_path) == (Path("/k"), Path("/i"))
    assert not booted.is_restore
    booted.validate_for_run()
    assert VmResources.for_kernel("/k").initrd_path is None
    restored = VmResources.from_snapshot("/s")
    assert restored.is_restore
    assert restored.kernel_path is None
    restored.validate_for_run()


def test_what_cannot_run_is_refused_in_a_fixed_order() -> None:
    resources = VmResources().with_memory_mib(0).with_vcpus(0).with_snapshot_after_ms(1)
    kinds = []
    repairs: tuple[Callable[[VmResources], VmResources], ...] = (
        lambda r: r.with_memory_mib(1),
        lambda r: r.with_vcpus(1),
        lambda r: r.with_kernel_path("/k"),
        lambda r: r.with_snapshot_after_ms(1, "/out"),
    )
    for repair in repairs:
        with pytest.raises(ResourceError) as caught:
            resources.validate_for_run()
        kinds.append(caught.value.kind)
        resources = repair(resources)
    resources.validate_for_run()
    assert kinds == list(ResourceErrorKind)
    assert [kind.name for kind in kinds] == [
        "ZERO_MEMORY",
        "ZERO_VCPUS",
        "MISSING_KERNEL",
        "SNAPSHOT_TRIGGER_WITHOUT_OUTPUT",
    ]


@pytest.mark.parametrize(
    "trigger",
    [
        lambda r: r.with_snapshot_after_ms(0),
        lambda r: r.with_snapshot_at_heartbeat(1),
        lambda r: r.with_snapshot_on_listener(),
    ],
)
def test_every_trigger_needs_an_output(trigger: Callable[[VmResources], VmResources]) -> None:
    for resources in (VmResources.for_kernel("/k"), VmResources.from_snapshot("/s")):
        with pytest.raises(ResourceError) as caught:
            trigger(resources).validate_for_run()
        assert caught.value.kind is ResourceErrorKind.SNAPSHOT_TRIGGER_WITHOUT_OUTPUT


def test_quiescence_alone_is_no_trigger() -> None:
    VmResources.for_kernel("/k").with_quiesce_ms(5).validate_for_run()


def test_a_volume_has_one_gibibyte_unless_told_otherwise() -> None:
    volume = VolumeSpec("/host.img", "/data")
    assert volume == VolumeSpec(host_path="/host.img", guest_path="/data", size_bytes=1 << 30)
    assert volume.with_size_bytes(4096).size_bytes == 4096
    assert volume.size_bytes == 1 << 30


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: VmResources(memory_mib=-1),
        lambda: VmResources(vcpus=True),
        lambda: VmResources(kernel_path=""),
        lambda: VmResources(kernel_path="a\0b"),
        lambda: VmResources(block_devices="/dev/sda"),
        lambda: VmResources(volumes=["/data"]),  # type: ignore[list-item]
        lambda: VmResources(profile="latency"),  # type: ignore[arg-type]
        lambda: VmResources().with_http_port(65536),
        lambda: VmResources().with_vsock_exec_guest_port(2**32 - 1),
        lambda: VmResources().with_quiesce_ms(-1),
        lambda: VolumeSpec("/x", "relative"),
        lambda: VolumeSpec("/x", "/y", 0),
    ],
)
def test_nonsense_is_refused_where_it_is_written(wrong: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        wrong()
