"""The grammar of ``run``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ...config.defaults import EngineName
from ...images.policy import PullPolicy
from . import options

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _refuse(context: click.Context, parameter: click.Parameter, value: object) -> None:
    if value:
        from ...errors import NotSupported

        raise NotSupported(parameter.opts[-1])


def _unbuilt(*names: str, **kind: Any) -> Callable[[_Function], _Function]:
    """Declare an option that only later versions have, and refuse it by name."""
    return click.option(
        *names, callback=_refuse, expose_value=False, help="Not supported by this version.", **kind
    )


@click.command(
    "run", context_settings={"allow_interspersed_args": False}, options_metavar="[OPTIONS]"
)
@click.option("--memory", type=int, metavar="MIB", help="Guest memory in MiB.  [default: 256]")
@click.option("--vcpus", type=int, metavar="N", help="Virtual CPUs.  [default: 1]")
@options.environment
@options.workdir
@options.user
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Kill the command after this time, counted from its start; the exit code is then 124.",
)
@options.engine
@options.platform
@options.pull
@click.option("--cold", is_flag=True, help="Boot, instead of restoring a snapshot of the image.")
@options.quiet
@click.option("--hostname", metavar="NAME", help="The guest's host name.")
@click.option("-i", "--interactive", is_flag=True, help="Pass stdin on to the command.")
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@_unbuilt("-v", "--volume", multiple=True)
@_unbuilt("--mount", multiple=True)
@_unbuilt("--balloon", is_flag=True)
@click.option(
    "-p",
    "--publish",
    multiple=True,
    metavar="[ADDR:][PORT:]GUESTPORT[/udp]",
    help="Lead a port of the host, of 127.0.0.1 unless ADDR says another, to one of the guest."
    " Without PORT take a free one, and print it on stderr.",
)
@click.option(
    "--egress",
    metavar="POLICY",
    help="What the guest may reach: allow_all, deny_all, deny_private, allowlist:CIDR,... or"
    " denylist:CIDR,...  [default: deny_private]",
)
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
def run_command(
    memory: int | None,
    vcpus: int | None,
    environment: tuple[tuple[str, str], ...],
    workdir: str | None,
    user: str | None,
    timeout: float | None,
    engine: EngineName,
    platform: str | None,
    pull: str,
    cold: bool,
    quiet: bool,
    hostname: str | None,
    interactive: bool,
    tty: bool,
    publish: tuple[str, ...],
    egress: str | None,
    image: str,
    command: tuple[str, ...],
) -> int:
    """Run COMMAND, or the image's own, in a new VM of IMAGE, and end with its exit code.

    IMAGE is a name in a registry ([HOST[:PORT]/]NAME[:TAG][@DIGEST]), oci:DIR[:TAG],
    oci-archive:FILE, docker-archive:FILE, rootfs:DIR or builtin:busybox. COMMAND takes the place
    of the image's command; an entrypoint stays in front of it.

    The first run of an image boots it once and keeps a snapshot, which takes seconds; later runs
    with the same memory and CPUs are restored from that.

    The exit code is the command's, or 128+N if signal N killed it; 124 after --timeout, 125 for
    an error of this program, 126 if the command cannot be executed and 127 if it is not found.
    Ctrl-C kills the command and the VM.
    """
    from ...config.vm import VmConfig
    from ..interrupts import run_until_signal
    from ..publish import Publish
    from ..run import RunOptions, run

    chosen = RunOptions(
        image=image,
        command=command[1:] if command[:1] == ("--",) else command,
        config=VmConfig(
            memory_mib=memory, vcpus=vcpus, engine=engine, hostname=hostname, egress=egress
        ),
        platform=platform,
        pull=PullPolicy(pull),
        cold=cold,
        quiet=quiet,
        environment=environment,
        workdir=workdir,
        user=user,
        timeout=timeout,
        interactive=interactive,
        tty=tty,
        publish=tuple(Publish.parse(text) for text in publish),
    )
    return run_until_signal(run, chosen)
