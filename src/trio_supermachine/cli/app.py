"""The command line's grammar."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import click

from .. import _version
from .._util.trace import CATEGORIES, VARIABLE
from ..config.vm import EngineName, VmConfig
from ..errors import NotSupported
from ..images.policy import PullPolicy
from . import options
from .failures import OWN_ERROR, SIGNALLED, CommandNotStarted, complain, report
from .images import bake_command, images_command, prune_command, rmi_command, snapshot_group
from .interrupts import Interrupted, run_until_signal
from .kernel import kernel_group
from .login import login_command, logout_command
from .publish import Publish
from .run import RunOptions, run
from .store import inspect_command, load_command, pull_command, save_command

_Function = TypeVar("_Function", bound=Callable[..., Any])

_USAGE: Final = 2
_SIGINT: Final = 2


def run_app(arguments: Sequence[str]) -> int:
    """Run the command line and give the program's exit code."""
    try:
        return int(app.main(list(arguments), "trio-supermachine", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as exc:
        click.echo(exc.format_message(), err=True)
        return _USAGE
    except click.ClickException as exc:
        context = getattr(exc, "ctx", None)
        name = context.command_path if context is not None else "trio-supermachine"
        message = exc.format_message().rstrip(".")
        complain(f"{message} (see {name} --help)")
        return OWN_ERROR if name.endswith(" run") else _USAGE
    except (click.Abort, KeyboardInterrupt):  # Ctrl-C before anything was started
        return SIGNALLED + _SIGINT
    except Interrupted as exc:
        return SIGNALLED + exc.signum
    except CommandNotStarted as exc:
        report(exc)
        return exc.exit_code
    except Exception as exc:
        report(exc)
        return OWN_ERROR


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=f"{VARIABLE}=all (or some of {', '.join(CATEGORIES)}) shows what happens, on stderr.",
)
@click.version_option(_version.__version__, prog_name="trio-supermachine")
def app() -> None:
    """Run OCI images as microVMs."""


for _command in (
    bake_command,
    pull_command,
    images_command,
    inspect_command,
    rmi_command,
    prune_command,
    save_command,
    load_command,
    login_command,
    logout_command,
):
    app.add_command(_command)
app.add_command(snapshot_group)
app.add_command(kernel_group)


def _refuse(context: click.Context, parameter: click.Parameter, value: object) -> None:
    if value:
        raise NotSupported(parameter.opts[-1])


def _unbuilt(*names: str, **kind: Any) -> Callable[[_Function], _Function]:
    """An option that later versions have: known by name, so that it is never ignored."""
    return click.option(
        *names, callback=_refuse, expose_value=False, help="Not supported by this version.", **kind
    )


@app.command(
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
@click.option("-q", "--quiet", is_flag=True, help="Show no progress on stderr.")
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
    options = RunOptions(
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
    return run_until_signal(partial(run, options))


@app.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor_command(as_json: bool) -> int:
    """Tell whether this host can start VMs, and what to install if it cannot."""
    from .doctor import examine  # which reads what is installed: 30 ms that no other command needs

    diagnosis = run_until_signal(examine)
    if as_json:
        click.echo(json.dumps(diagnosis.as_json(), indent=2))
    else:
        for line in diagnosis.lines():
            click.echo(line)
    return 0 if diagnosis.ok else 1
