"""Let Sphinx find the sources of public names.

A public class says that its module is the package. Sphinx reads comments of fields, the order of
members and ``@final`` from the source of a class's module, so what it finds in the package's own
source is completed by what it finds in the modules where the public names live.
"""

from __future__ import annotations

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

import trio_supermachine


def _complete_package(app: Sphinx) -> None:
    package = ModuleAnalyzer.for_module(trio_supermachine.__name__)
    package.analyze()
    for name in trio_supermachine._MODULES:
        module = ModuleAnalyzer.for_module(trio_supermachine.__name__ + name)
        module.analyze()
        package.attr_docs |= module.attr_docs
        package.annotations |= module.annotations
        package.finals += module.finals
        package.overloads |= module.overloads
        package.tags |= module.tags
        package.tagorder |= module.tagorder


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", _complete_package)
    return {"parallel_read_safe": True}
