"""A Debian with nginx, PostgreSQL, Redis, curl and git, and its bake with all servers up."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from trio_supermachine import Image, Vm

from .debian_image import kept_layout, run

HTTP, POSTGRES, REDIS = 80, 5432, 6379

_PACKAGES = [
    "bind9-dnsutils",
    "busybox-static",
    "ca-certificates",
    "curl",
    "git",
    "libpython3-stdlib",
    "nginx",
    "postgresql",
    "python3-minimal",
    "redis-server",
]
# PostgreSQL does without its compiler, which is larger than all the rest.
_LEFT_OUT = [
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/usr/share/i18n/*",
    "/usr/lib/*/libLLVM*",
    "/usr/lib/*/libz3.so*",
    "/usr/lib/postgresql/*/lib/llvmjit*",
    "/usr/lib/postgresql/*/lib/bitcode/*",
]
_OPTIONS = [
    *(f"--dpkgopt=path-exclude={path}" for path in _LEFT_OUT),
    "--dpkgopt=force-unsafe-io",
    '--aptopt=Apt::Install-Recommends "false"',
    # initdb is for the tests to run, in the guest.
    '--essential-hook=mkdir "$1/etc/postgresql-common" && '
    'echo "create_main_cluster = false" >"$1/etc/postgresql-common/createcluster.conf"',
]

# nginx listens first, which shows on one CPU only: each CPU numbers sockets out of its own
# thousand. The workload ends with all servers if one ends.
_SERVERS = b"""#!/bin/bash
set -eu
export LC_ALL=C PATH=$(echo /usr/lib/postgresql/*/bin):$PATH
nginx -g 'daemon off;' &
while [ ! -e /run/nginx.pid ]; do sleep 0.1; done
redis-server --save '' --bind 127.0.0.1 ::1 &
install -d -o postgres /srv/data /run/postgresql
runuser -u postgres -- initdb --auth=trust --no-sync --encoding=UTF8 /srv/data
runuser -u postgres -- postgres -D /srv/data -c listen_addresses=127.0.0.1,::1 &
wait -n
"""

_SERVED = """
for attempt in {1..300}; do
    if pg_isready -q -h 127.0.0.1 && redis-cli ping && curl -sfo /dev/null http://127.0.0.1; then
        exec psql -qXh 127.0.0.1 -U postgres -c 'SELECT 1'
    fi
    sleep 0.2
done >/dev/null 2>&1
exit 1
"""


async def _all_serve(vm: Vm) -> None:
    await vm.run_process(["bash", "-c", _SERVED])


@pytest.fixture(scope="session")
def network_layout() -> Path:
    """An OCI layout with the tag ``t``."""

    async def prepare() -> Path:
        return await kept_layout(_PACKAGES, _OPTIONS)

    return trio.run(prepare)


@pytest.fixture
async def servers(network_layout: Path) -> Image:
    """The image in which nginx (the first listener), PostgreSQL and Redis serve; baked by the
    first test that wants it, and found by later runs.
    """
    return await (
        Image.builder(f"oci:{network_layout}:t")
        .with_memory_mib(512)
        .with_extra_file("/srv/servers", _SERVERS, 0o755)
        .with_cmd(["/srv/servers"])
        .with_guest_port(HTTP)
        .with_warmup(_all_serve)
        .with_warmup_tag(_SERVED)
        .build()
    )


@pytest.fixture
async def clients(network_layout: Path) -> Image:
    """The image without a workload; baked as :func:`servers` is."""
    return await Image.builder(f"oci:{network_layout}:t").with_cmd([]).build()


@pytest.fixture
async def pgbench(servers: Image, tmp_path: Path) -> Path:
    """PostgreSQL's benchmark for the host, out of the image: its package is the server's, which is
    not for a developer's machine.
    """
    path = "usr/lib/postgresql/*/bin/pgbench"
    await run(["unsquashfs", "-d", str(tmp_path / "root"), str(servers.layers[0]), path])
    (program,) = (tmp_path / "root").glob(path)
    return program
