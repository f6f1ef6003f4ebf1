"""A token server as docker-registry wants one; run by the fixtures of ``registry_server``.

    python token_server.py PORT DIRECTORY

DIRECTORY has ``cert.pem`` and ``key.pem``. Users who give no password may read repositories below
``public/``, the one user all of them. Identity tokens are taken by POST.
"""

from __future__ import annotations

import base64
import json
import secrets
import ssl
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

USER, PASSWORD = "reader", "secret"
IDENTITY = "an-identity-token"


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Signer:
    """Signs tokens by a key whose certificate goes along."""

    def __init__(self, directory: Path) -> None:
        chain = x509.load_pem_x509_certificates((directory / "cert.pem").read_bytes())
        key = serialization.load_pem_private_key((directory / "key.pem").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key
        self._chain = [
            base64.b64encode(cert.public_bytes(serialization.Encoding.DER)).decode()
            for cert in chain
        ]

    def token(self, subject: str, service: str, access: list[dict[str, Any]]) -> str:
        now = int(time.time())
        claims = {
            "iss": "token_server",
            "sub": subject,
            "aud": service,
            "iat": now,
            "nbf": now - 60,
            "exp": now + 300,
            "jti": secrets.token_hex(8),
            "access": access,
        }
        header = {"typ": "JWT", "alg": "ES256", "x5c": self._chain}
        signed = ".".join(_text(json.dumps(part).encode()) for part in (header, claims))
        r, s = decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_text(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


class Handler(BaseHTTPRequestHandler):
    signer: Signer
    timeout = 10

    def do_GET(self) -> None:
        given = self.headers.get("Authorization")
        wanted = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if given not in (None, wanted):
            return self._answer(401, {"errors": [{"message": "wrong user or password"}]})
        return self._grant(parse_qs(urlsplit(self.path).query), known=given is not None)

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        known = form.get("refresh_token") == [IDENTITY]
        if form.get("grant_type") != ["refresh_token"] or not known:
            return self._answer(401, {"errors": [{"message": "unknown identity"}]})
        return self._grant(form, known=True)

    def _grant(self, asked: dict[str, list[str]], *, known: bool) -> None:
        access = []
        for scope in " ".join(asked.get("scope", [])).split():
            kind, name, actions = scope.split(":")
            allowed = known or name.startswith("public/")
            granted = [a for a in actions.split(",") if a == "pull" and allowed]
            access.append({"type": kind, "name": name, "actions": granted})
        service = asked.get("service", [""])[0]
        token = self.signer.token(USER if known else "", service, access)
        key = "access_token" if self.command == "POST" else "token"
        self._answer(200, {key: token, "expires_in": 300})

    def _answer(self, status: int, document: object) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main(port: str, directory: str) -> None:
    Handler.signer = Signer(Path(directory))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(Path(directory, "cert.pem"), Path(directory, "key.pem"))
    with HTTPServer(("127.0.0.1", int(port)), Handler) as server:
        # The handshake is the connection's own affair, whose timeout it then has.
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
