"""The command line: its commands, and the exit codes of the program.

The grammar of each command is in ``commands/``, and imports nothing that ``--help`` and completion
do not need. What a command does is in a module beside this one, which it imports when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import click

from .. import _version
from .._util.trace import CATEGORIES, VARIABLE
from .commands.bake import bake_command
from .commands.doctor import doctor_command
from .commands.images import images_command, prune_command, rmi_command
from .commands.kernel import kernel_group
from .commands.login import login_command, logout_command
from .commands.run import run_command
from .commands.snapshot import snapshot_group
from .commands.store import inspect_command, load_command, pull_command, save_command
from .exits import OWN_ERROR, SIGNALLED, EarlyExit, complain

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
    except EarlyExit as exc:
        if message := str(exc):
            complain(message)
        return exc.exit_code
    except Exception as exc:
        from .failures import report

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
    run_command,
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
    snapshot_group,
    kernel_group,
    doctor_command,
):
    app.add_command(_command)
