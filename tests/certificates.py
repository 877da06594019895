"""An authority of the tests' own, and what it certifies: made by the command openssl."""

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest


class Authority:
    """Certificates for 127.0.0.1 and localhost, for two days; all of its files lie in `directory`."""

    def __init__(self, directory: Path) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("there is no openssl to make certificates with")
        directory.mkdir(parents=True)
        self._directory = directory
        self.cert, self._key = directory / "ca.pem", directory / "ca.key"
        self._openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"),
            *("-subj", "/CN=an authority", "-keyout", str(self._key), "-out", str(self.cert)),
        )

    def issue(self, name: str) -> tuple[Path, Path]:
        """A certificate and its key."""
        cert, key, request = (self._directory / f"{name}.{end}" for end in ("pem", "key", "csr"))
        extensions = self._directory / "extensions"
        extensions.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        self._openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}"),
            *("-keyout", str(key), "-out", str(request)),
        )
        self._openssl(
            *("x509", "-req", "-in", str(request), "-CA", str(self.cert), "-CAkey", str(self._key), "-CAcreateserial"),
            *("-days", "2", "-extfile", str(extensions), "-out", str(cert)),
        )
        return cert, key

    def locked(self, key: Path) -> Path:
        """The same key under a passphrase."""
        locked = key.with_suffix(".locked")
        self._openssl("ec", "-in", str(key), "-aes128", "-passout", "pass:secret", "-out", str(locked))
        return locked

    def context(self) -> ssl.SSLContext:
        """What a client trusts that trusts this authority alone."""
        return ssl.create_default_context(cafile=str(self.cert))

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)
