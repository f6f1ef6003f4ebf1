"""What the command line imports: no more than a command needs, for each module costs time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PACKAGE = "trio_supermachine"
COMPLETION = {
    "_TRIO_SUPERMACHINE_COMPLETE": "bash_complete",
    "COMP_WORDS": "trio-supermachine ru",
    "COMP_CWORD": "1",
}
MAIN = "import sys; sys.argv[0] = 'trio-supermachine'; from trio_supermachine.cli import main; "
#: What ``run`` of a baked image does before its loop runs.
RUN = (
    "import trio_supermachine.cli.app, trio_supermachine.cli.interrupts,"
    " trio_supermachine.cli.publish, trio_supermachine.cli.run; "
)
TELL = "import sys; print(*sys.modules, file=sys.stderr)"


def imported(code: str, *arguments: str, **environment: str) -> set[str]:
    """Run a program in a new interpreter; give the modules that it had imported at its end."""
    done = subprocess.run(
        [sys.executable, "-c", f"try:\n    {code}\nfinally:\n    {TELL}", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def below(modules: set[str], *names: str) -> set[str]:
    """Give those of the modules that are named, or in a package that is."""
    return {m for m in modules if any(m == name or m.startswith(name + ".") for name in names)}


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [(["--help"], {}), (["run", "--help"], {}), (["--version"], {}), ([], COMPLETION)],
    ids=["help", "run-help", "version", "completion"],
)
def test_what_only_speaks_of_the_command_line_loads_no_library(
    arguments: list[str], environment: dict[str, str]
) -> None:
    modules = imported(MAIN + "main()", *arguments, **environment)
    assert f"{PACKAGE}.cli.commands.run" in modules
    assert not below(modules, "trio", "attr", "attrs", "httpx", "dns", "asyncio", "ssl", "rich")
    # Beside the grammar of commands only what that takes its choices and defaults from.
    own = below(modules, PACKAGE) - below(modules, f"{PACKAGE}.cli")
    assert own == {
        PACKAGE,
        *(f"{PACKAGE}.{name}" for name in ("_public", "_util", "_util.trace", "_version")),
        *(f"{PACKAGE}.{name}" for name in ("config", "config.defaults")),
        *(f"{PACKAGE}.{name}" for name in ("images", "images.policy")),
    }


def test_a_run_loads_nothing_of_what_most_runs_do_not_need() -> None:
    modules = imported(RUN)
    assert f"{PACKAGE}.vm.running" in modules
    assert not below(modules, "asyncio", "cffi", "dns", "email", "httpx", "rich", "zstandard")
    rare = (
        *("bake.baking", "bake.extra", "hv.kvm", "images.content", "images.pull", "images.rootfs"),
        *("kernels.debian", "kernels.small", "kernels.stock", "library", "net.dnsmessage"),
        *("net.resolver", "net.tls", "net.udp", "oci.layer", "oci.registry", "oci.squashfs"),
        "pool.core",
    )
    assert not below(modules, *(f"{PACKAGE}.{name}" for name in rare))


def test_importing_the_package_loads_nothing_else() -> None:
    modules = imported(f"import {PACKAGE}; ")
    assert below(modules, PACKAGE) == {PACKAGE, f"{PACKAGE}._version"}
    assert not below(modules, "trio", "attrs")
