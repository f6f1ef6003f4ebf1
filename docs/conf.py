"""Sphinx's configuration.

The documentation builds without a network. Links to the documentation of Python and Trio come from
the lists in ``_inventories``, which ``_ext/inventories.py`` turns into the form that intersphinx
reads: a name that is used here and missing there is a warning, and so an error with ``-W``.
"""

import sys
from pathlib import Path

from trio_supermachine import __version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "trio-supermachine"
author = "The trio-supermachine developers"
copyright = author
release = version = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosectionlabel",
    "sphinx.ext.intersphinx",
    "sphinxcontrib_trio",
    "attrs_fields",
    "inventories",
    "public_sources",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {version}"
html_theme_options = {
    "source_repository": "https://github.com/trio-supermachine/trio-supermachine/",
    "source_branch": "main",
    "source_directory": "docs/",
}

autosectionlabel_prefix_document = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 88

# Every reference leads somewhere, but for types that users meet and have no name for.
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"(.*\.)?(StrPath|StrOrBytes|StrOrBytesPath|HasFileno|EngineName|Snapshot)"),
    ("py:class", r"trio_supermachine\.[a-z_]+\..*"),
]
