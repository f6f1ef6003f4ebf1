"""Requests of execs: the caller's values, checked and converted to those of the wire.

Every exec goes through :func:`exec_request`: those of :meth:`Vm.exec`, of :meth:`Vm.run_process`
and of :class:`ExecBuilder`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from ..agent.wire import ExecFlags, ExecRequest, StagedFile

StrOrBytes: TypeAlias = str | bytes
StrOrBytesPath: TypeAlias = StrOrBytes | os.PathLike[str] | os.PathLike[bytes]
Command: TypeAlias = StrOrBytesPath | Sequence[StrOrBytesPath]
Environment: TypeAlias = Mapping[str, str] | Mapping[bytes, bytes]


def exec_request(
    chain: Sequence[Sequence[StrOrBytes]],
    flags: ExecFlags = ExecFlags.NONE,
    *,
    env: Environment | None = None,
    extra_env: Iterable[StrOrBytes] = (),
    cwd: StrOrBytesPath | None = None,
    user: str | int | None = None,
    winsize: tuple[int, int] | None = None,
    timeout: float | None = None,
    files: Sequence[StagedFile] = (),
    empty_stdin: bool = False,
) -> ExecRequest:
    """Make a request.

    :param chain: the argument vectors, as :func:`command_argv` gives them.
    :param env: the whole environment; ``None`` is the image's.
    :param extra_env: variables to add, as :func:`env_entry` gives them.
    :param timeout: seconds after which the guest kills the process group.
    :param empty_stdin: there is no input, so its end follows at once.
    :raises ValueError: a value does not fit.
    """
    columns, rows = (0, 0) if winsize is None else check_winsize(*winsize)
    if env is not None:
        flags |= ExecFlags.REPLACE_ENV
    return ExecRequest(
        chain=chain,
        flags=flags,
        timeout=timeout,
        columns=columns,
        rows=rows,
        cwd="" if cwd is None else guest_path(cwd),
        user="" if user is None else user_field(user),
        environment=[*(env_entry(key, value) for key, value in (env or {}).items()), *extra_env],
        files=files,
        empty_stdin=empty_stdin,
    )


def command_argv(command: Command, *, shell: bool = False) -> list[StrOrBytes]:
    """Convert a command to an argument vector of the wire.

    :raises TypeError: a string without ``shell``, or a sequence with it.
    :raises ValueError: it is empty, or holds NUL.
    """
    if isinstance(command, (str, bytes, os.PathLike)):
        if not shell:
            raise TypeError("command must be a sequence (not a string or bytes) if shell=False")
        argv: list[StrOrBytes] = ["/bin/sh", "-c", os.fspath(command)]
    elif shell:
        raise TypeError("command must be a string or bytes (not a sequence) if shell=True")
    else:
        argv = [os.fspath(argument) for argument in command]
    if not argv:
        raise ValueError("command is empty; give at least a program")
    for argument in argv:
        check_no_nul(argument)
    return argv


def env_entry(key: StrOrBytes, value: StrOrBytes) -> bytes:
    """Convert a variable to a field of the wire. :raises ValueError: ``=`` in its name, or NUL."""
    try:
        raw_key, raw_value = os.fsencode(key), os.fsencode(value)
    except TypeError:
        raise TypeError(
            f"an environment variable has str or bytes as name and value, not {key!r}: {value!r}"
        ) from None
    if not raw_key or b"=" in raw_key:
        raise ValueError("illegal environment variable name")
    check_no_nul(raw_key)
    check_no_nul(raw_value)
    return raw_key + b"=" + raw_value


def guest_path(path: StrOrBytesPath) -> StrOrBytes:
    """Convert a guest path to a field of the wire. :raises ValueError: it is empty or holds NUL."""
    raw = os.fspath(path)
    if not raw:
        raise ValueError("the path is empty")
    check_no_nul(raw)
    return raw


def user_field(user: str | int) -> str:
    """Convert a user to a field of the wire. :raises ValueError: a negative id, empty, or NUL."""
    text = str(user)
    if not text or (isinstance(user, int) and user < 0):
        raise ValueError(f"{user!r} is not a user")
    check_no_nul(text)
    return text


def check_winsize(columns: int, rows: int) -> tuple[int, int]:
    """Check that a terminal's size fits the wire. :raises ValueError: not in 1..65535."""
    if not (1 <= columns <= 0xFFFF and 1 <= rows <= 0xFFFF):
        raise ValueError(f"a terminal cannot be {columns} by {rows}")
    return columns, rows


def check_mode(mode: int) -> int:
    """Check that ``mode`` is a file mode. :raises ValueError: it is none."""
    if not 0 <= mode <= 0o7777:
        raise ValueError(f"{mode:#o} is not a file mode")
    return mode


def check_no_nul(text: StrOrBytes) -> None:
    """Check that ``text`` can be passed to a program. :raises ValueError: it holds NUL."""
    if b"\0" in text if isinstance(text, bytes) else "\0" in text:
        raise ValueError("embedded null byte")
