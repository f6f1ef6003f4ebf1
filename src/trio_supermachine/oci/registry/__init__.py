"""A client of container registries: the pull half of the OCI distribution specification 1.1."""

from .credentials import Credentials, erase_credentials, find_credentials, store_credentials
from .registry import Document, Registry, check_credentials, open_registry
from .settings import RegistrySettings

__all__ = [
    "Credentials",
    "Document",
    "Registry",
    "RegistrySettings",
    "check_credentials",
    "erase_credentials",
    "find_credentials",
    "open_registry",
    "store_credentials",
]
