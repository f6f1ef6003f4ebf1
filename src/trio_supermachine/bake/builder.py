"""The settings of a bake."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, Self

import attrs

from .._public import NoPublicConstructor
from .._util import validators as check
from ..config.defaults import DEFAULT_MEMORY_MIB, DEFAULT_VCPUS, EngineName
from ..config.resources import SnapshotResources
from ..config.vm import MAX_VCPUS, MIN_MEMORY_MIB
from ..errors import ConfigError
from ..images.policy import PullPolicy
from ..images.prepare import check_request
from .store import check_name

if TYPE_CHECKING:
    from .extra import ExtraFile

#: The default bound on the wait for a trigger, in seconds.
TRIGGER_TIMEOUT: Final = 60.0

_MAX_TEXT: Final = 64 * 1024  # bytes; an argument, or a variable with its name


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ConfigError(f"{name} must be text without NUL, not {value!r}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise ConfigError(f"{name} must be proper Unicode, not {value!r}") from None
    if size > _MAX_TEXT:
        raise ConfigError(f"{name} is longer than {_MAX_TEXT} bytes")
    return value


def _words(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name} must be a list of words, not {value!r}")
    return tuple(_text(name, word) for word in value)


@attrs.frozen(kw_only=True)
class BakeSettings:
    """Settings of a bake.

    :ivar triggers: what the capture waits for; the first that comes counts.
    :ivar trigger_timeout: how long to wait for it, in seconds.
    :ivar warmup: is awaited with the VM before the capture; :attr:`tag` tells it from others.
    """

    reference: str
    name: str | None = None
    platform: str | None = None
    memory_mib: int = DEFAULT_MEMORY_MIB
    vcpus: int = DEFAULT_VCPUS
    env: tuple[tuple[str, str], ...] = ()
    cmd: tuple[str, ...] | None = None
    entrypoint: tuple[str, ...] | None = None
    user: str | None = None
    workdir: str | None = None
    guest_port: int | None = None
    files: tuple[ExtraFile, ...] = ()
    pull: PullPolicy = PullPolicy.MISSING
    engine: EngineName = "auto"
    triggers: SnapshotResources = attrs.field(factory=SnapshotResources)
    trigger_timeout: float = TRIGGER_TIMEOUT
    warmup: Callable[[Any], Awaitable[object]] | None = None
    tag: str | None = None

    def __attrs_post_init__(self) -> None:
        check_request(self.reference, self.pull, self.platform, self.engine)


@attrs.frozen(repr=False)
class BakeBuilder(metaclass=NoPublicConstructor):
    """The settings of a bake in the making. Immutable: each method gives a changed copy."""

    _made_by = "Image.builder"

    _settings: BakeSettings

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._settings.reference!r}>"

    def with_name(self, name: str) -> Self:
        """Give the bake a name, which moves to the newest bake that has it.

        :param name: up to 128 letters, digits, dots, hyphens and underscores.
        """
        return self._with(name=check_name(name))

    def with_platform(self, platform: str | None) -> Self:
        """Take this variant of the image, such as ``"linux/arm64"``.

        :param platform: system and architecture; ``None`` is Linux on this machine's architecture.
        """
        return self._with(platform=platform)

    def with_memory_mib(self, memory_mib: int) -> Self:
        """Give the guest this much memory, in MiB, instead of 256.

        :param memory_mib: MiB, at least 32.
        """
        return self._with(memory_mib=check.integer("memory_mib", memory_mib, MIN_MEMORY_MIB))

    def with_vcpus(self, vcpus: int) -> Self:
        """Give the guest this many CPUs, instead of 1.

        :param vcpus: 1 to 16.
        """
        return self._with(vcpus=check.integer("vcpus", vcpus, 1, MAX_VCPUS))

    def with_env(self, key: str, value: str) -> Self:
        """Set a variable in the environment of the workload and of all execs.

        :param key: its name.
        :param value: its value.
        """
        if not _text("the name of a variable", key) or "=" in key:
            raise ConfigError(f"{key!r} is not the name of a variable")
        return self._with(env=(*self._settings.env, (key, _text(key, value))))

    def with_cmd(self, cmd: list[str]) -> Self:
        """Run this command in place of the image's own, after its entrypoint.

        :param cmd: the words of it.
        """
        return self._with(cmd=_words("cmd", cmd))

    def with_entrypoint(self, entrypoint: list[str]) -> Self:
        """Run this entrypoint in place of the image's own; the image's command goes with that.

        :param entrypoint: the words of it.
        """
        return self._with(entrypoint=_words("entrypoint", entrypoint))

    def with_user(self, user: str) -> Self:
        """Run workload and execs as this user: a name or id, with an optional ``:GROUP``.

        :param user: such as ``"app"`` or ``"1234:1234"``.
        """
        return self._with(user=_text("user", user))

    def with_workdir(self, workdir: str) -> Self:
        """Run workload and execs in this directory.

        :param workdir: an absolute path in the guest.
        """
        return self._with(workdir=check.guest_path(workdir))

    def with_guest_port(self, port: int) -> Self:
        """Say that the workload serves a TCP port; the capture waits until it listens.

        :param port: the port, 1 to 65535.
        """
        return self._with(guest_port=check.integer("guest_port", port, 1, 65535))

    def with_extra_file(self, path: check.StrPath, data: bytes, mode: int = 0o644) -> Self:
        """Add a file of root's to the image, before anything runs; a later one of the same path
        replaces it, as it replaces the image's own.

        Directories that the image lacks are made; links on the way are followed.

        :param path: an absolute path in the guest.
        :param data: the file's content.
        :param mode: its permissions, such as ``0o755``.
        """
        from .extra import ExtraFile  # few images have such files

        file = ExtraFile(path, data, mode)
        others = tuple(other for other in self._settings.files if other.path != file.path)
        return self._with(files=(*others, file))

    def with_pull_policy(self, policy: PullPolicy) -> Self:
        """Say when to ask a registry for the image.

        :param policy: :attr:`PullPolicy.MISSING` unless given.
        """
        return self._with(pull=policy)

    def with_engine(self, engine: EngineName) -> Self:
        """Bake on this engine. Only it can restore the snapshot.

        :param engine: ``"qemu"``, ``"kvm"``, or ``"auto"`` for the best that runs here.
        """
        return self._with(engine=engine)

    def with_warmup_tag(self, tag: str | None) -> Self:
        """Tell warm-ups apart by this tag alone.

        Without one it is the qualified name and the code of the warm-up that count, with
        constants and defaults and what it closes over so far as that is constant; not the code
        of functions that it calls, nor files that it reads.

        :param tag: any text, such as a version; ``None`` is no tag.
        """
        return self._with(tag=None if tag is None else _text("a tag", tag))

    def with_snapshot(self, resources: SnapshotResources) -> Self:
        """Say when to capture: at the first of these triggers, and after ``quiesce_ms``.

        Without a trigger an image with a TCP port (exposed, or :meth:`with_guest_port`) is
        captured when something in its guest listens; one with another workload when that
        listens or has ended, or a second after its start, whichever is first; and one without a
        workload at once. ``after_ms`` counts from the start of the workload, ``at_heartbeat``
        counts answers of the agent from then on, ten in a second. The warm-up follows the
        trigger.

        :param resources: the triggers; its ``out_path`` must be left out.
        """
        if not isinstance(resources, SnapshotResources):
            raise ConfigError(f"this must be a SnapshotResources, not {resources!r}")
        if resources.out_path is not None:
            raise ConfigError("a bake has its place in the data directory; leave out_path out")
        return self._with(triggers=resources)

    def with_trigger_timeout(self, seconds: float) -> Self:
        """Wait this long for a trigger before :meth:`build` gives up, instead of 60 seconds.

        :param seconds: above 0; ``math.inf`` is for ever.
        """
        return self._with(trigger_timeout=check.seconds("the timeout", seconds))

    def _with(self, **changes: Any) -> Self:
        return type(self)._create(attrs.evolve(self._settings, **changes))


def settings_of(builder: BakeBuilder) -> BakeSettings:
    """Give the settings that a builder has gathered."""
    return builder._settings
