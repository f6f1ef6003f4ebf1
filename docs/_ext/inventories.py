"""Give intersphinx the places of the names of Python and Trio that this documentation uses.

``_inventories/NAME.txt`` begins with the address of a project's documentation. Each further line is
a name, its role in Sphinx (``py:class``), and its page. intersphinx reads compressed inventories,
so each list becomes one in Sphinx's own directory when a build begins. The full inventories, of
some ten thousand names, would have to be fetched for each build.
"""

from __future__ import annotations

import zlib
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

_HEAD = """\
# Sphinx inventory version 2
# Project: {}
# Version:
# The remainder of this file is compressed using zlib.
"""


def _write_inventories(app: Sphinx, config: Config) -> None:
    made = Path(app.doctreedir) / "inventories"
    made.mkdir(parents=True, exist_ok=True)
    for source in sorted(Path(app.confdir, "_inventories").glob("*.txt")):
        address, *lines = source.read_text().splitlines()
        entries = []
        for line in lines:
            name, role, page = line.split()
            entries.append(f"{name} {role} 1 {page} -\n")
        inventory = made / f"{source.stem}.inv"
        head = _HEAD.format(source.stem).encode()
        inventory.write_bytes(head + zlib.compress("".join(entries).encode()))
        config.intersphinx_mapping[source.stem] = (address, str(inventory))


def setup(app: Sphinx) -> dict[str, bool]:
    # Before intersphinx reads its mapping.
    app.connect("config-inited", _write_inventories, priority=100)
    return {"parallel_read_safe": True}
