"""Sphinx's configuration."""

from trio_supermachine import __version__

project = "trio-supermachine"
author = "the trio-supermachine contributors"
copyright = author
release = version = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosectionlabel",
    "sphinxcontrib_trio",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {version}"

autosectionlabel_prefix_document = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
