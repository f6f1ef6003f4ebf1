"""Client of container registries: the pull half of the OCI distribution specification 1.1.

A request passes through these layers, from the top:

#. :mod:`.registry` and :mod:`.blob` know manifests and blobs, and check what comes.
#. :mod:`.attempts` decides whether to ask again (:mod:`.retry`), or to ask the next mirror
   (:mod:`.endpoints`, by :mod:`.registries_conf`).
#. :mod:`.host` authenticates (:mod:`.tokens`, :mod:`.challenge`, :mod:`.credentials`) and follows
   redirects.
#. :mod:`.wire` speaks HTTP by httpx, and turns its exceptions into ours.

Neither a registry nor a server that it redirects to is trusted. Bodies are bounded in size,
redirects and challenges in number, and silence in time. Secrets go to the registry itself and to
the token server that it names, over TLS unless the configuration allows plain HTTP there. Texts of
servers get into messages through :func:`~trio_supermachine.oci.names.show_text` alone.
"""

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
