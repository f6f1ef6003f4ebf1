"""``python -m trio_supermachine``: the command line."""

from .cli import main

main()
