"""Names and numbers that configurations fall back on; light to import."""

from __future__ import annotations

from typing import Final, Literal

#: The engines that a caller may name; ``"auto"`` takes the best that runs here.
EngineName = Literal["auto", "qemu", "kvm"]

#: The memory of a VM whose image has no baked value, in MiB.
DEFAULT_MEMORY_MIB: Final = 256
#: The number of CPUs of a VM whose image has no baked value.
DEFAULT_VCPUS: Final = 1
