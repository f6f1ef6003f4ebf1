"""The calls of a VM that pause it, let it run again, and stop it."""

from __future__ import annotations

from .running import RunningVm


class GuestLife:
    """The calls of :class:`Vm` that pause it, let it run again, and stop it."""

    _running: RunningVm

    async def ping(self) -> None:
        """Return when the guest's agent has answered.

        :raises VmExited: the VM has ended.
        """
        await self._running.ping()

    async def pause(self) -> None:
        """Stop the guest's CPUs. Idempotent. Calls to the guest wait until :meth:`resume`.

        A call that is made after this and cancelled before the resume does nothing in the guest.
        A capture that is under way is waited for: it has to thaw the guest's programs. Cancelled
        during that wait, it leaves the guest running.

        :raises VmExited: the VM has ended.
        """
        await self._running.pause()

    async def resume(self) -> None:
        """Let the guest's CPUs run again, and set its clock. Idempotent.

        Cancelled, it may leave the guest running with a clock that is late by the pause; another
        call sets that.

        :raises VmExited: the VM has ended.
        """
        await self._running.resume()

    async def stop(self, grace: float = 5.0) -> None:
        """Shut the guest down in order: stop signals, at most ``grace`` seconds, sync, the end.

        A guest that has not got as far by then is killed, and so is one whose agent does not
        answer. When this returns the machine has ended. The block goes on, but calls to the
        guest raise :exc:`VmExited`. Cancelled, it kills the machine.

        :param grace: seconds, 0 to 3600.
        :raises ValueError: ``grace`` is out of range.
        """
        if not 0 <= grace <= 3600:
            raise ValueError("grace must be 0 to 3600 seconds")
        await self._running.stop(grace)
