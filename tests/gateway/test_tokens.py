import hmac
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from hashlib import sha256
from typing import Any
from uuid import UUID

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from engine.limits import TOKEN_LENGTH_MAX
from gateway.tokens import Identity, TokenInvalid, Verifier, issue, make_key_pair

USER = UUID("22222222-2222-4222-8222-222222222222")
NOW = 1_700_000_000_000
PRIVATE, PUBLIC = make_key_pair()
VERIFIER = Verifier(PUBLIC)


def part(value: object) -> str:
    return urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def signed(**changes: Any) -> str:
    """A token signed with the right key, with other claims; a claim that is None is left out."""
    claims = {"iss": "gavel", "aud": "gavel", "sub": str(USER), "role": "viewer", "iat": 1, "exp": NOW // 1000 + 60}
    claims = {name: value for name, value in (claims | changes).items() if value is not None}
    # Not by `jwt.encode`, which itself refuses some of these claims.
    message = f"{part({'alg': 'RS256', 'typ': 'JWT'})}.{part(claims)}"
    key = jwt.get_algorithm_by_name("RS256")
    signature = key.sign(message.encode(), key.prepare_key(PRIVATE))
    return f"{message}.{urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def test_a_token_says_who_its_bearer_is_until_it_is_over() -> None:
    token = issue(PRIVATE, USER, "maker", 60, NOW)

    assert VERIFIER.verify(token, NOW) == Identity(USER, "maker", NOW + 60_000)
    assert VERIFIER.verify(token, NOW + 59_999) == Identity(USER, "maker", NOW + 60_000)
    with pytest.raises(TokenInvalid, match="expired"):
        VERIFIER.verify(token, NOW + 60_000)


def test_time_is_what_the_argument_says() -> None:
    in_1971 = 31_536_000_000
    in_2200 = 7_258_118_400_000

    for now in (in_1971, in_2200):
        assert VERIFIER.verify(issue(PRIVATE, USER, "viewer", 60, now), now).expires_at == now + 60_000


def test_the_header_names_the_key_by_its_thumbprint() -> None:
    header = jwt.get_unverified_header(issue(PRIVATE, USER, "viewer", 60, NOW))
    jwk = jwt.get_algorithm_by_name("RS256").to_jwk(serialization.load_pem_public_key(PUBLIC), as_dict=True)
    canonical = f'{{"e":"{jwk["e"]}","kty":"RSA","n":"{jwk["n"]}"}}'

    assert header["alg"] == "RS256"
    assert urlsafe_b64decode(header["kid"] + "=") == sha256(canonical.encode()).digest()


def test_what_the_helper_signs_is_accepted_unchanged() -> None:
    assert VERIFIER.verify(signed(), NOW).user == USER


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "somebody"},
        {"aud": "another"},
        {"iss": None},
        {"aud": None},
        {"sub": None},
        {"role": None},
        {"iat": None},
        {"exp": None},
        {"sub": "anna"},
        {"sub": 7},
        {"role": "owner"},
        {"role": ["admin"]},
        {"exp": "soon"},
        {"exp": True},
        {"exp": 1e12},
        {"exp": 10**30},
        {"exp": -1},
    ],
)
def test_claims_that_are_not_ours_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(TokenInvalid):
        VERIFIER.verify(signed(**changes), NOW)


def test_only_our_key_and_only_our_algorithm_count() -> None:
    token = issue(PRIVATE, USER, "admin", 60, NOW)
    header, body, signature = token.split(".")
    none = f"{part({'alg': 'none'})}.{body}."
    by_public_key = f"{part({'alg': 'HS256'})}.{body}"
    mac = hmac.digest(PUBLIC, by_public_key.encode(), "sha256")
    by_public_key += "." + urlsafe_b64encode(mac).rstrip(b"=").decode()
    others_private, _ = make_key_pair()
    changed = "A" if body[20] != "A" else "B"
    refused = [
        none,
        by_public_key,
        f"{part({'alg': 'RS512'})}.{body}.{signature}",
        f"{part({'alg': 'HS256'})}.{body}.{signature}",
        issue(others_private, USER, "admin", 60, NOW),
        f"{header}.{body[:20]}{changed}{body[21:]}.{signature}",
        f"{header}.{body}.",
        f"{header}.{body}",
        "",
        "é.é.é",
        # Brackets enough to exhaust a reader that recurses
        urlsafe_b64encode(b"[" * 3_000).decode().rstrip("=")[:4_000] + ".e30.e30",
        token + "A" * TOKEN_LENGTH_MAX,
    ]

    for bad in refused:
        with pytest.raises(TokenInvalid):
            VERIFIER.verify(bad, NOW)


@given(st.text(max_size=200) | st.binary(max_size=150).map(lambda raw: urlsafe_b64encode(raw).decode() + ".e30.e30"))
def test_no_text_does_more_than_be_refused(text: str) -> None:
    with pytest.raises(TokenInvalid):
        VERIFIER.verify(text, NOW)


def test_keys_of_another_kind_are_refused_at_the_start() -> None:
    elliptic = ec.generate_private_key(ec.SECP256R1())
    short = rsa.generate_private_key(public_exponent=65_537, key_size=1_024)  # noqa: S505
    for key in (elliptic.public_key(), short.public_key()):
        pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        with pytest.raises(ValueError, match="RSA"):
            Verifier(pem)
    pem = elliptic.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with pytest.raises(TypeError, match="RSA"):
        issue(pem, USER, "viewer", 60, NOW)
