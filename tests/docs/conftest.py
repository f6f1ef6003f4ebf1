"""Fixtures for the tests beside this."""

from ..support.doc_images import surroundings
from ..support.network_images import network_layout

__all__ = ["network_layout", "surroundings"]
