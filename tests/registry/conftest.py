"""Registries for the tests beside this, and what these push there.

The registries last a session; what has been pushed to one, all of them serve.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..support.image_files import Layout
from ..support.registry_server import RegistryPlace, RegistryServer


@pytest.fixture(scope="session")
def registry_place(tmp_path_factory: pytest.TempPathFactory) -> RegistryPlace:
    return RegistryPlace.new(tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="session")
def registry(registry_place: RegistryPlace) -> Iterator[RegistryServer]:
    with registry_place.plain() as server:
        yield server


@pytest.fixture(scope="session")
def tls_registry(registry_place: RegistryPlace) -> Iterator[RegistryServer]:
    with registry_place.tls() as server:
        yield server


@pytest.fixture(scope="session")
def basic_registry(registry_place: RegistryPlace) -> Iterator[RegistryServer]:
    with registry_place.basic() as server:
        yield server


@pytest.fixture(scope="session")
def token_registry(registry_place: RegistryPlace) -> Iterator[RegistryServer]:
    with registry_place.token() as server:
        yield server


@pytest.fixture(scope="session")
def registries(
    registry: RegistryServer,
    tls_registry: RegistryServer,
    basic_registry: RegistryServer,
    token_registry: RegistryServer,
) -> dict[str, RegistryServer]:
    """All registries, by name; for tests that go through them."""
    return {
        "plain": registry,
        "tls": tls_registry,
        "basic": basic_registry,
        "token": token_registry,
    }


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of the test's own, and no credentials or settings of whoever runs the tests."""
    home = tmp_path / "home"
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.delenv("TRIO_SUPERMACHINE_OFFLINE", raising=False)
    return home


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture
def push(registry: RegistryServer, layout: Layout) -> Callable[..., str]:
    """Push layers as an image, of a new name unless one is given; give its reference."""

    def push(*tars: bytes, name: str | None = None, **options: object) -> str:
        name = name or f"test/{os.urandom(6).hex()}:latest"
        layout.write(layout.manifest(list(tars), **options))  # type: ignore[arg-type]
        return registry.push(f"oci:{layout.path}", name)

    return push
