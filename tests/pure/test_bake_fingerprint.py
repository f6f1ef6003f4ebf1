"""Claims about fingerprints: equal inputs agree anywhere, and any other input differs."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Awaitable, Callable

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_supermachine import ConfigError, ImageConfig, SnapshotResources, Vm
from trio_supermachine.bake.fingerprint import BakeInputs, warmup_identity

TEXT = st.text(st.characters(exclude_characters="\0"), max_size=8)
WORDS = st.lists(TEXT, max_size=3).map(tuple)
COUNT = st.integers(0, 3)

CONFIGS = st.builds(
    ImageConfig,
    env=WORDS,
    entrypoint=WORDS,
    cmd=WORDS,
    workdir=TEXT,
    user=TEXT,
    stop_signal=st.integers(1, 64),
    exposed_ports=WORDS,
    labels=st.dictionaries(TEXT, TEXT, max_size=2),
)
INPUTS = st.builds(
    BakeInputs,
    digest=TEXT,
    layers=WORDS,
    config=CONFIGS,
    memory_mib=COUNT,
    vcpus=COUNT,
    guest_port=st.none() | COUNT,
    kernel=TEXT,
    initramfs=TEXT,
    engine=TEXT,
    host=st.dictionaries(TEXT, TEXT, max_size=2),
    triggers=st.builds(
        SnapshotResources,
        after_ms=st.none() | COUNT,
        at_heartbeat=st.none() | COUNT,
        on_listener=st.booleans(),
        quiesce_ms=COUNT,
    ),
    warmup=st.none() | TEXT,
    format=COUNT,
)


@given(INPUTS, INPUTS)
def test_fingerprints_are_equal_exactly_when_the_inputs_are(a: BakeInputs, b: BakeInputs) -> None:
    assert (a.fingerprint() == b.fingerprint()) == (a == b)


@given(INPUTS, st.data())
def test_every_single_input_counts(inputs: BakeInputs, data: st.DataObject) -> None:
    field = data.draw(st.sampled_from([f.name for f in attrs.fields(BakeInputs)]))
    other = getattr(data.draw(INPUTS), field)
    changed = attrs.evolve(inputs, **{field: other})
    same = getattr(inputs, field) == other
    assert (changed.fingerprint() == inputs.fingerprint()) == same


@given(st.dictionaries(TEXT, TEXT, max_size=4), INPUTS)
def test_the_order_of_the_hosts_facts_does_not_count(
    facts: dict[str, str], inputs: BakeInputs
) -> None:
    backwards = dict(reversed(facts.items()))
    one, other = attrs.evolve(inputs, host=facts), attrs.evolve(inputs, host=backwards)
    assert one.fingerprint() == other.fingerprint()


def compiled(source: str) -> Callable[[Vm], Awaitable[object]]:
    namespace: dict[str, object] = {"__name__": "module"}
    exec(compile(source, "anywhere.py", "exec"), namespace)
    function = namespace["warm"]
    assert callable(function)
    return function


BASE = "async def warm(vm, times=2):\n    await vm.run_process(['curl', 'a'])\n"

SAME = {
    "moved to other lines": "\n\n# a comment\n" + BASE,
    "with other comments": BASE.replace("times=2):", "times=2):  # twice"),
}
OTHER = {
    "another constant": BASE.replace("'a'", "'b'"),
    "another default": BASE.replace("times=2", "times=3"),
    "another type of default": BASE.replace("times=2", "times=2.0"),
    "another call": BASE.replace("run_process", "exec"),
    "another name": BASE.replace("def warm", "def _warm") + "warm = _warm\n",
    "another inner function": BASE + "    f = lambda: 1\n",
    "another operation": BASE + "    return 1 in {1, 2}\n",
}


@pytest.mark.parametrize("source", SAME.values(), ids=SAME)
def test_a_warm_up_is_the_same_wherever_it_is_written(source: str) -> None:
    same = warmup_identity(compiled(source), None)
    assert same == warmup_identity(compiled(BASE), None)


@pytest.mark.parametrize("source", OTHER.values(), ids=OTHER)
def test_a_warm_up_with_another_code_or_name_is_another(source: str) -> None:
    assert warmup_identity(compiled(source), None) != warmup_identity(compiled(BASE), None)


def test_inner_functions_count_by_their_code() -> None:
    def source(constant: int) -> str:
        return f"async def warm(vm):\n    def f():\n        return {constant}\n    return f()\n"

    assert warmup_identity(compiled(source(1)), None) == warmup_identity(compiled(source(1)), None)
    assert warmup_identity(compiled(source(1)), None) != warmup_identity(compiled(source(2)), None)


def make(path: object) -> Callable[[Vm], Awaitable[object]]:
    async def warm(vm: Vm) -> None:
        await vm.run_process(["wget", str(path)])

    return warm


def test_constants_that_a_warm_up_closes_over_count() -> None:
    assert warmup_identity(make("/a"), None) == warmup_identity(make("/a"), None)
    assert warmup_identity(make("/a"), None) != warmup_identity(make("/b"), None)
    # What is no constant counts by its type: it cannot be told whether it is the same.
    assert warmup_identity(make([1]), None) == warmup_identity(make([2]), None)


def test_a_function_that_closes_over_itself_has_an_identity() -> None:
    async def warm(vm: Vm, depth: int = 0) -> None:
        if depth < 3:
            await warm(vm, depth + 1)

    assert warmup_identity(warm, None) == warmup_identity(warm, None)


async def fetch(vm: Vm, path: str) -> None:
    await vm.run_process(["wget", path])


def test_a_partial_counts_with_its_arguments() -> None:
    identities = {
        warmup_identity(warmup, None)
        for warmup in (
            functools.partial(fetch, path="/a"),
            functools.partial(fetch, path="/b"),
            fetch,
        )
    }
    assert len(identities) == 3
    again = warmup_identity(functools.partial(fetch, path="/a"), None)
    assert again in identities


class Warmer:
    def __init__(self, path: str) -> None:
        self.path = path

    async def warm(self, vm: Vm) -> None:
        await vm.run_process(["wget", self.path])

    async def __call__(self, vm: Vm) -> None:
        await self.warm(vm)


def test_what_cannot_be_told_apart_needs_a_tag() -> None:
    assert warmup_identity(Warmer("/a").warm, None) == warmup_identity(Warmer("/b").warm, None)
    with pytest.raises(ConfigError, match="with_warmup_tag"):
        warmup_identity(Warmer("/a"), None)
    assert warmup_identity(Warmer("/a"), "v1") == warmup_identity(fetch, "v1")
    assert warmup_identity(fetch, "v1") != warmup_identity(fetch, "v2")
    assert warmup_identity(None, None) is None


def test_identities_are_the_same_in_every_process() -> None:
    # Where hashes of strings, and so the order of sets, are others.
    program = (
        "from trio_supermachine.bake.fingerprint import warmup_identity\n"
        "async def warm(vm):\n"
        "    return vm in {'a', 'b', 'c', 'd', ('e', 1)}\n"
        "print(warmup_identity(warm, None))\n"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(answers) == 1
