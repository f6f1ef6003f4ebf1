"""The words on a guest kernel's command line that every engine wants."""

from __future__ import annotations

from typing import Final

COMMON_WORDS: Final = (
    "console=ttyS0",
    "reboot=t",  # a triple fault: every engine leaves at once
    "panic=-1",
    "quiet",
    "8250.nr_uarts=1",
    "random.trust_cpu=on",
    "cryptomgr.notests",
    # The jitter generator times itself for a tenth of a second, and only FIPS mode needs it: the
    # kernel's own generator is seeded by the processor and the virtio device.
    "initcall_blacklist=jent_mod_init",
)
