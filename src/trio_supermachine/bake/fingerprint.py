"""Fingerprints: one digest over everything that a bake depends on."""

from __future__ import annotations

import functools
import hashlib
import json
import types
from collections.abc import Mapping
from typing import Any

import attrs

from ..config.resources import SnapshotResources
from ..errors import ConfigError
from ..oci.config import ImageConfig

#: Changes whenever a bake of the same inputs would come out differently.
VERSION = 1


@attrs.frozen(kw_only=True)
class BakeInputs:
    """Everything that a baked snapshot depends on. A name is not among it."""

    #: The digest of the image, and those of the files of its layers, extra files included.
    digest: str
    layers: tuple[str, ...]
    #: How the workload is run, after the builder's changes.
    config: ImageConfig
    memory_mib: int
    vcpus: int
    guest_port: int | None
    kernel: str
    initramfs: str
    engine: str
    #: What the engine says of itself and of the host that a restore depends on.
    host: Mapping[str, str] = attrs.field(factory=dict)
    triggers: SnapshotResources = attrs.field(factory=SnapshotResources)
    #: What :func:`warmup_identity` says.
    warmup: str | None = None
    #: The version of the snapshot format.
    format: int

    def fingerprint(self) -> str:
        """64 hexadecimal digits, the same for equal inputs in any process on any host."""
        document = {
            "version": VERSION,
            "format": self.format,
            "digest": self.digest,
            "layers": list(self.layers),
            "config": self.config.to_json(),
            "memory_mib": self.memory_mib,
            "vcpus": self.vcpus,
            "guest_port": self.guest_port,
            "kernel": self.kernel,
            "initramfs": self.initramfs,
            "engine": self.engine,
            "host": dict(self.host),
            "triggers": [
                self.triggers.after_ms,
                self.triggers.at_heartbeat,
                self.triggers.on_listener,
                self.triggers.quiesce_ms,
            ],
            "warmup": self.warmup,
        }
        return _digest(document)


def warmup_identity(warmup: object, tag: str | None) -> str | None:
    """Identify a warm-up: by its tag, or without one by its name and code.

    The code is that of the function and of those defined in it, with constants, defaults and
    what it closes over, so far as that is constant or a function too; not that of functions
    that it calls, and not where it is written. A :func:`functools.partial` counts with its
    arguments, and a bound method without its object.

    :raises ConfigError: this is no function, and there is no tag.
    """
    if tag is not None:
        return "tag:" + tag
    if warmup is None:
        return None
    return "code:" + _digest(_callable(warmup))


def _callable(value: Any) -> list[object]:
    if isinstance(value, functools.partial):
        arguments = [_value(item) for item in value.args]
        keywords = sorted((key, _value(item)) for key, item in value.keywords.items())
        return ["partial", _callable(value.func), arguments, [list(pair) for pair in keywords]]
    if isinstance(value, types.MethodType):
        value = value.__func__
    if not isinstance(value, types.FunctionType):
        raise ConfigError(f"what {value!r} does cannot be told; give it a with_warmup_tag")
    return _function(value, frozenset())


def _function(function: types.FunctionType, above: frozenset[int]) -> list[object]:
    if id(function) in above:  # it closes over itself
        return ["recursion"]
    above |= {id(function)}
    cells: list[object] = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            cells.append([name, _value(cell.cell_contents, above)])
        except ValueError:  # not assigned yet
            cells.append([name, ["empty"]])
    return [
        "function",
        f"{function.__module__}.{function.__qualname__}",
        _code(function.__code__),
        [_value(item, above) for item in function.__defaults__ or ()],
        [[k, _value(v, above)] for k, v in sorted((function.__kwdefaults__ or {}).items())],
        cells,
    ]


def _code(code: types.CodeType) -> list[object]:
    return [
        code.co_code.hex(),
        code.co_exceptiontable.hex(),
        [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags],
        list(code.co_names),
        list(code.co_varnames),
        [_value(constant) for constant in code.co_consts],
    ]


def _value(value: object, above: frozenset[int] = frozenset()) -> list[object]:
    """Describe a value to digest it: a constant wholly, anything else by its type alone."""
    kind = type(value).__name__
    match value:
        case types.CodeType():
            return ["code", _code(value)]
        case types.FunctionType():
            return _function(value, above)
        case tuple():
            return [kind, [_value(item, above) for item in value]]
        case frozenset():
            return [kind, sorted((_value(item, above) for item in value), key=json.dumps)]
        case bytes():
            return [kind, value.hex()]
        case None | bool() | int() | float() | complex() | str():
            return [kind, repr(value)]
        case _ if value is Ellipsis:
            return ["..."]
        case _:
            return ["other", type(value).__module__, type(value).__qualname__]


def _digest(document: object) -> str:
    encoded = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(encoded.encode()).hexdigest()
