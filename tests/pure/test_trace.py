"""Diagnostic messages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from trio_supermachine._util import trace


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    trace.configure("")


def test_nothing_is_shown_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    trace.configure("")
    trace.trace("vm", "hello")
    assert not trace.enabled("vm")
    assert capsys.readouterr().err == ""


def test_only_the_named_categories_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    trace.configure(" vm , exec ,")
    trace.trace("vm", "%s of %d", "one", 2)
    trace.trace("qemu", "hidden")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("vm     one of 2")


def test_all_switches_every_category_on() -> None:
    trace.configure("all")
    assert all(trace.enabled(category) for category in trace.CATEGORIES)


def test_a_misspelt_category_is_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    trace.configure("vm,vn")
    assert trace.enabled("vm")
    said = capsys.readouterr().err
    assert "unknown vn" in said
    assert "exec" in said


def test_a_guests_text_cannot_drive_the_readers_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trace.configure("all")
    trace.trace("oci", "%s", "a\x1b[2Jb\nc\r\x9bd")
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "\x9b" not in said
    assert said.count("\n") == 1
