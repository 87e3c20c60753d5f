"""The certificate for TLS at the door, tried out before anything starts."""

import ssl
from pathlib import Path

from gavel.settings import SettingsError


def check_certificate(certificate: Path | None, key: Path | None) -> None:
    """See that a gateway can use both. Raises `SettingsError`."""
    if certificate is None and key is None:
        return
    if certificate is None or key is None:
        given, missing = ("CERTIFICATE", "KEY") if key is None else ("KEY", "CERTIFICATE")
        raise SettingsError(f"GAVEL_TLS_{given} is set and GAVEL_TLS_{missing} is not; set both, or none for no TLS.")
    for name, path in (("CERTIFICATE", certificate), ("KEY", key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise SettingsError(
                f"GAVEL_TLS_{name} {path} cannot be read ({error.strerror}); give this user the file."
            ) from error
    try:
        # With an empty passphrase, a key that has one is refused; without one it would be asked for at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise SettingsError(
            f"GAVEL_TLS_CERTIFICATE and GAVEL_TLS_KEY cannot be used ({reason}); they should be a certificate and its "
            "own private key, without a passphrase, as PEM."
        ) from error
