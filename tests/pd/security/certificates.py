"""An authority for one test, and certificates of it."""

from __future__ import annotations

import ssl
from pathlib import Path

import trustme


class Files:
    """An authority, and what it has signed, as files."""

    def __init__(self, folder: Path, name: str) -> None:
        self.authority = trustme.CA()
        self._folder = folder / name
        self._folder.mkdir()
        self.ca = str(self._folder / "ca.pem")
        self.authority.cert_pem.write_to_path(self.ca)

    def issue(self, name: str, *hosts: str) -> tuple[str, str]:
        """Certificate and key; a second time under one name they are replaced at once."""
        issued = self.authority.issue_cert(*(hosts or ("localhost", "127.0.0.1")))
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        for path, blobs in ((cert, issued.cert_chain_pems), (key, [issued.private_key_pem])):
            new = path.with_suffix(".new")
            new.write_bytes(b"".join(blob.bytes() for blob in blobs))
            new.replace(path)
        return str(cert), str(key)

    def server(self, cert: str, key: str, *, wants_client: bool = False) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        if wants_client:
            context.verify_mode = ssl.CERT_REQUIRED
            self.authority.configure_trust(context)
        return context

    def spoil(self) -> None:
        Path(self.ca).write_text("none")

    def client(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.authority.configure_trust(context)
        return context
