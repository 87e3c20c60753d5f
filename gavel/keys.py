"""The key pair that signs access tokens, and the cluster's secret: made in the data folder on first start.

Each is one file, so that it is there as a whole or not at all, and whoever starts second reads what the first one made.
"""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from gateway.tokens import make_key_pair
from gavel.errors import CommandError

KEYS_FILE: Final = "signing_keys.pem"
SECRET_FILE: Final = "cluster_secret"  # noqa: S105 - its name only
SECRET_BYTES: Final = 32
_PUBLIC_BEGINS: Final = b"-----BEGIN PUBLIC KEY-----"


@dataclass(frozen=True)
class KeyPair:
    """Two keys as PEM: the private one issues access tokens, the public one verifies them."""

    private_pem: bytes
    public_pem: bytes

    def __repr__(self) -> str:
        return "KeyPair(…)"


def ensure_keys(data_dir: Path) -> KeyPair:
    """The key pair of this data folder, made if there is none yet. Raises `CommandError`."""
    path = _folder(data_dir) / KEYS_FILE
    try:
        if not path.exists():
            create(path, b"".join(make_key_pair()))
    except OSError as error:
        raise _unusable(data_dir, error) from error
    return read_keys(data_dir)


def read_keys(data_dir: Path) -> KeyPair:
    """The key pair of a data folder in which an engine has run, for those that talk to it. Raises `CommandError`."""
    path = _folder(data_dir) / KEYS_FILE
    try:
        pem = path.read_bytes()
    except FileNotFoundError:
        raise CommandError(
            f"There are no keys in {data_dir}; start `gavel up` once, or name its folder with --data-dir."
        ) from None
    except OSError as error:
        raise _unusable(data_dir, error) from error
    private_pem, begins, rest = pem.partition(_PUBLIC_BEGINS)
    if b"PRIVATE KEY" not in private_pem or not begins:
        raise CommandError(f"{path} holds no key pair; put the right file there, or remove it to have a new one made.")
    return KeyPair(private_pem, begins + rest)


def ensure_secret(data_dir: Path, given: SecretStr | None = None) -> bytes:
    """The cluster's secret: the given one, or the data folder's, made if there is none yet. Raises `CommandError`."""
    if given is not None:
        return given.get_secret_value().encode()
    path = secret_path(data_dir)
    try:
        if not path.exists():
            create(path, secrets.token_hex(SECRET_BYTES).encode())
        secret = path.read_bytes()
    except OSError as error:
        raise _unusable(data_dir, error) from error
    if len(secret) < SECRET_BYTES:
        raise CommandError(f"{path} is too short for a secret; remove it to have a new one made.")
    return secret


def copy_keys(data_dir: Path, target_dir: Path) -> None:
    """Copy the key pair to another data folder, or to a backup. Raises `OSError`."""
    create(_folder(target_dir) / KEYS_FILE, (_folder(data_dir) / KEYS_FILE).read_bytes())


def secret_path(data_dir: Path) -> Path:
    """The file of the cluster's secret, where none is given."""
    return _folder(data_dir) / SECRET_FILE


def create(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, as a whole; one that is there already stays as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The folder is ours alone, whatever the umask or an earlier hand made of it.
    path.parent.chmod(0o700)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            # Unlike a rename, a link never replaces: of two that start at once, one wins.
            path.hardlink_to(temporary)
        except FileExistsError:
            return
    finally:
        temporary.unlink()
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _folder(data_dir: Path) -> Path:
    # Not the data folder itself: the embedded Postgres lies there too, and may run as another user.
    return data_dir / "keys"


def _unusable(data_dir: Path, error: OSError) -> CommandError:
    return CommandError(
        f"The keys in {data_dir} cannot be used ({error.strerror}); give this user the folder, or another --data-dir."
    )
