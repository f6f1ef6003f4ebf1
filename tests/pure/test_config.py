"""How a VM is configured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from trio_supermachine.config.resources import VolumeSpec
from trio_supermachine.config.vm import MountSpec, SymlinkPolicy, VmConfig, refuse_unbuilt
from trio_supermachine.devices.rng import RngDevice
from trio_supermachine.errors import ConfigError, NotSupported
from trio_supermachine.host.assets import AssetPaths
from trio_supermachine.net.policy import EgressPolicy

VOLUME = VolumeSpec("/data.img", "/data")
MOUNT = MountSpec("/src", "src", "/mnt/src")


def test_the_defaults_leave_everything_to_the_image() -> None:
    config = VmConfig()
    assert (config.memory_mib, config.vcpus) == (None, None)
    assert (config.effective_memory_mib, config.effective_vcpus) == (256, 1)
    assert not config.balloon
    assert (config.volumes, config.mounts) == ((), ())
    assert config.assets is None
    assert config.restore_timeout == 10
    assert config.engine == "auto"
    refuse_unbuilt(config)


ASSETS = AssetPaths(kernel=Path("/boot/vmlinuz"))


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        (lambda c: c.with_memory_mib(64), "memory_mib", 64),
        (lambda c: c.with_vcpus(2), "vcpus", 2),
        (lambda c: c.with_balloon(), "balloon", True),
        (lambda c: c.with_volume(VOLUME), "volumes", (VOLUME,)),
        (lambda c: c.with_virtiofs(MOUNT), "mounts", (MOUNT,)),
        (lambda c: c.with_assets(ASSETS), "assets", ASSETS),
        (lambda c: c.with_vsock_mux_dir("/run/x"), "vsock_mux_dir", Path("/run/x")),
        (lambda c: c.with_egress("deny_all"), "egress", EgressPolicy.deny_all()),
        (lambda c: c.with_start_timeout(5), "start_timeout", 5),
        (lambda c: c.with_restore_timeout(5), "restore_timeout", 5),
        (lambda c: c.with_engine("qemu"), "engine", "qemu"),
        (lambda c: c.with_hostname("box-1.example"), "hostname", "box-1.example"),
    ],
)
def test_each_setter_changes_a_copy(
    change: Callable[[VmConfig], VmConfig], field: str, value: Any
) -> None:
    original = VmConfig()
    changed = change(original)
    assert getattr(changed, field) == value
    assert original == VmConfig()
    assert attrs.evolve(original, **{field: value}) == changed


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory_mib": 0},
        {"memory_mib": 31},
        {"memory_mib": "512"},
        {"vcpus": 0},
        {"vcpus": 17},
        {"vcpus": True},
        {"balloon": 1},
        {"volumes": ["/data"]},
        {"mounts": [VOLUME]},
        {"vsock_mux_dir": ""},
        {"vsock_mux_dir": "/run/" + "x" * 100},
        {"egress": object()},
        {"egress": "some"},
        {"start_timeout": 0},
        {"start_timeout": float("nan")},
        {"restore_timeout": -1},
        {"engine": "xen"},
        {"hostname": ""},
        {"hostname": "-a"},
        {"hostname": "a..b"},
        {"hostname": "a b"},
        {"hostname": "a\n"},
        {"hostname": "x" * 65},
    ],
)
def test_nonsense_is_a_value_error_where_it_is_written(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        VmConfig(**wrong)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tag": ""},
        {"tag": "x" * 37},
        {"guest_path": "relative"},
        {"host_path": ""},
        {"symlinks": "opaque"},
        {"readonly": None},
    ],
)
def test_a_mount_checks_its_parts(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        attrs.evolve(MOUNT, **wrong)


def test_a_mount_keeps_symbolic_links_opaque() -> None:
    assert MOUNT.symlinks is SymlinkPolicy.OPAQUE
    assert not MOUNT.readonly


@pytest.mark.parametrize(
    ("feature", "config"),
    [
        ("volumes", VmConfig().with_volume(VOLUME)),
        ("mounts", VmConfig().with_virtiofs(MOUNT)),
        ("balloon", VmConfig().with_balloon()),
    ],
)
def test_what_is_not_built_is_refused_by_name(feature: str, config: VmConfig) -> None:
    with pytest.raises(NotSupported) as caught:
        refuse_unbuilt(config)
    assert caught.value.feature == feature


def test_assets_of_another_type_are_refused_where_they_are_written() -> None:
    with pytest.raises(ConfigError, match="AssetPaths"):
        VmConfig(assets="/boot/vmlinuz")  # type: ignore[arg-type]


def test_devices_are_made_by_callables_and_are_few() -> None:
    with pytest.raises(ConfigError, match="not 5"):
        VmConfig(devices=(5,))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="9 devices"):
        VmConfig(devices=(RngDevice,) * 9)
    assert VmConfig().with_device(RngDevice).devices == (RngDevice,)
