"""A lone error comes out as itself, a group only when several things failed."""

from __future__ import annotations

import pytest
import trio

from trio_supermachine._util.nursery import open_flat_nursery


async def fail(exc: BaseException) -> None:
    raise exc


async def test_the_bodys_error_is_bare_and_keeps_its_context() -> None:
    error = KeyError("body")
    with pytest.raises(KeyError) as caught:
        async with open_flat_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise error
    assert caught.value is error
    assert error.__context__ is None


async def test_a_group_that_the_body_raised_is_kept_as_it_was() -> None:
    errors = [KeyError(), ValueError()]
    with pytest.raises(ExceptionGroup) as caught:
        async with open_flat_nursery():
            raise ExceptionGroup("mine", errors)
    assert caught.value.message == "mine"
    assert list(caught.value.exceptions) == errors


async def test_a_tasks_lone_error_is_bare() -> None:
    with pytest.raises(ValueError, match="task"):
        async with open_flat_nursery() as nursery:
            nursery.start_soon(fail, ValueError("task"))
            await trio.sleep_forever()


async def test_two_errors_are_a_group() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with open_flat_nursery() as nursery:
            nursery.start_soon(fail, ValueError("task"))
            raise KeyError("body")
    assert {type(exc) for exc in caught.value.exceptions} == {KeyError, ValueError}


async def test_a_cancellation_from_outside_is_caught_by_its_own_scope() -> None:
    with trio.CancelScope() as scope:
        async with open_flat_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_an_error_while_cancelled_from_outside_is_bare() -> None:
    with trio.CancelScope() as scope, pytest.raises(KeyError):
        async with open_flat_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            scope.cancel()
            raise KeyError
