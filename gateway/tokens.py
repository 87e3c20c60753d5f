"""Access tokens: who a client is, signed. JSON Web Tokens (RFC 7519) by RS256, and by no other algorithm.

Whoever holds the public key can verify a token; only who holds the private key can issue one.
"""

from base64 import urlsafe_b64encode
from functools import lru_cache
from hashlib import sha256
from typing import Annotated, Final
from uuid import UUID

import jwt
import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from engine.commands import Role
from engine.limits import INTEGER_MAX, SECOND_MS, TOKEN_LENGTH_MAX

ALGORITHM: Final = "RS256"
ISSUER: Final = "gavel"
AUDIENCE: Final = "gavel"
KEY_BITS: Final = 2_048


class Identity(msgspec.Struct, frozen=True):
    """Who a token speaks for, and until when (milliseconds since the epoch, UTC)."""

    user: UUID
    role: Role
    expires_at: int


class TokenInvalid(Exception):
    """A token that is not accepted; the message is a sentence for people and repeats nothing of the token."""


def make_key_pair() -> tuple[bytes, bytes]:
    """Make a new private and public key, both as PEM."""
    key = rsa.generate_private_key(public_exponent=65_537, key_size=KEY_BITS)
    private_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private_pem, _public_pem(key.public_key())


def issue(private_pem: bytes, user: UUID, role: Role, ttl_s: int, now_ms: int) -> str:
    """Issue a token for `user` that is over `ttl_s` seconds after `now_ms`."""
    key, key_id = _private_key(private_pem)
    now_s = now_ms // SECOND_MS
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": str(user),
        "role": role,
        "iat": now_s,
        "exp": now_s + ttl_s,
    }
    return jwt.encode(claims, key, algorithm=ALGORITHM, headers={"kid": key_id})


class Verifier:
    """Verifies tokens against one public key."""

    def __init__(self, public_pem: bytes) -> None:
        key = serialization.load_pem_public_key(public_pem)
        if not isinstance(key, rsa.RSAPublicKey) or key.key_size < KEY_BITS:
            message = f"tokens are verified with an RSA public key of at least {KEY_BITS} bits"
            raise ValueError(message)
        self._key = key

    def verify(self, token: str, now_ms: int) -> Identity:
        """Return whom the token speaks for at `now_ms`.

        Raises:
            TokenInvalid: it is not ours, not whole, not for us, or over.
        """
        if len(token) > TOKEN_LENGTH_MAX:
            raise TokenInvalid(f"A token has at most {TOKEN_LENGTH_MAX} characters.")
        try:
            # The library would compare times with the machine's clock; ours come as an argument, below.
            claims = jwt.decode(
                token,
                self._key,
                algorithms=[ALGORITHM],
                issuer=ISSUER,
                audience=AUDIENCE,
                options={
                    "require": ["iss", "aud", "sub", "iat", "exp"],
                    "verify_exp": False,
                    "verify_iat": False,
                    "verify_nbf": False,
                },
            )
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            # ValueError and RecursionError: a header or a body that is hostile JSON.
            raise TokenInvalid("The token does not verify.") from error
        try:
            claimed = msgspec.convert(claims, _Claims)
        except msgspec.ValidationError as error:
            raise TokenInvalid("The token verifies, but does not say who its bearer is.") from error
        expires_at = claimed.exp * SECOND_MS
        if now_ms >= expires_at:
            raise TokenInvalid("The token has expired.")
        return Identity(claimed.sub, claimed.role, expires_at)


class _Claims(msgspec.Struct):
    """The claims on which we rely, in the types that `issue` gives them."""

    sub: UUID
    role: Role
    exp: Annotated[int, msgspec.Meta(ge=0, le=INTEGER_MAX // SECOND_MS)]


@lru_cache(maxsize=4)
def _private_key(private_pem: bytes) -> tuple[rsa.RSAPrivateKey, str]:
    """The key and its id. Kept, since reading a private key checks it, which takes longer than signing."""
    key = serialization.load_pem_private_key(private_pem, password=None)
    if not isinstance(key, rsa.RSAPrivateKey):
        message = "tokens are signed with an RSA private key"
        raise TypeError(message)
    return key, _thumbprint(key.public_key())


def _thumbprint(key: rsa.RSAPublicKey) -> str:
    """The key's id, the same for everyone who computes it (RFC 7638)."""
    jwk = RSAAlgorithm.to_jwk(key, as_dict=True)
    canonical = msgspec.json.encode({name: jwk[name] for name in ("e", "kty", "n")})
    return urlsafe_b64encode(sha256(canonical).digest()).rstrip(b"=").decode()


def _public_pem(key: rsa.RSAPublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
