"""``python -m trio_supermachine.cli``."""

from . import main

main()
