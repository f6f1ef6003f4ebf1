"""What tests share: guests to drive, hosts to reach, images to run, and programs in C."""

from pathlib import Path

#: The sources of programs that run in guests.
GUEST_PROGRAMS = Path(__file__).parent / "guest_programs"
