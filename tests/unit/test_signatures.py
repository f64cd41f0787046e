"""Signatures: keys as files, what a signature binds, what is refused, and what this node has seen before."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from weightcache.digest import Digest
from weightcache.errors import CapacityError, ConfigError, FormatError, SignatureError
from weightcache.signatures import (
    MAX_SERIAL,
    PublicKey,
    Seen,
    Signature,
    generate,
    load_private,
    public_key,
    sign,
    verify,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

MODEL = "llama-3-8b"
REVISION = Digest.of(b"manifest")
# RFC 8032, section 7.1, test 1.
PRIVATE = Ed25519PrivateKey.from_private_bytes(
    bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
)
KEY = PublicKey("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
OTHER_PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(32))
OTHER_KEY = public_key(OTHER_PRIVATE)
SIGNATURE = sign(PRIVATE, MODEL, REVISION, 3)
N_NOTED = 500
NOTER = """
import sys
from pathlib import Path
from weightcache.errors import SignatureError
from weightcache.signatures import Seen
seen = Seen(Path(sys.argv[1]))
for serial in range(2, int(sys.argv[2])):
    try:
        seen.check_and_note("prod", "llama", "latest", serial)
        seen.check_and_note("prod", "llama", "latest", serial - 1)
    except SignatureError:  # this process noted it, or another a higher one
        continue
    sys.exit(f"{serial} was forgotten")
"""


# -- keys


def test_public_key_is_written_as_it_is_read() -> None:
    assert public_key(PRIVATE) == KEY
    assert PublicKey.parse(str(KEY)) == KEY
    assert str(KEY) == f"ed25519:{KEY.hex}"
    assert KEY.key_id == Digest.of(bytes.fromhex(KEY.hex)).hex[:16]


@pytest.mark.parametrize(
    "text", ["", KEY.hex, f"rsa:{KEY.hex}", f"{KEY}0", str(KEY).upper(), f"{KEY}\n", "ed25519:" + "g" * 64]
)
def test_what_is_no_public_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a public key"):
        PublicKey.parse(text)


def test_generated_key_signs(tmp_path: Path) -> None:
    key = generate(tmp_path / "key.pem")
    assert verify(sign(load_private(tmp_path / "key.pem"), MODEL, REVISION, 1), MODEL, REVISION, [key]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["key.pem"]


def test_g24_private_key_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        generate(tmp_path / "key.pem")
    finally:
        os.umask(before)
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600


def test_private_key_is_a_pem_file_that_others_can_read(tmp_path: Path) -> None:
    key = generate(tmp_path / "key.pem")
    private = serialization.load_pem_private_key((tmp_path / "key.pem").read_bytes(), None)
    assert isinstance(private, Ed25519PrivateKey)
    assert public_key(private) == key


def test_key_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("precious")
    with pytest.raises(ConfigError, match=r"key\.pem exists: a key is never written over"):
        generate(tmp_path / "key.pem")
    assert (tmp_path / "key.pem").read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 1


def test_key_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        generate(tmp_path / "missing" / "key.pem")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_private_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    generate(tmp_path / "key.pem")
    (tmp_path / "key.pem").chmod(mode)
    with pytest.raises(ConfigError, match=f"has the mode {mode:04o}.*expected 0600.*chmod 600"):
        load_private(tmp_path / "key.pem")


def pem(private: PrivateKeyTypes, password: bytes | None = None) -> bytes:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no key",
        pem(PRIVATE)[:60],
        pem(PRIVATE, b"password"),
        pem(X25519PrivateKey.from_private_bytes(bytes(32))),
        PRIVATE.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
    ],
    ids=["empty", "text", "torn", "encrypted", "another algorithm", "public"],
)
def test_what_is_no_private_key_is_refused_without_showing_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key.pem"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_private(path)
    assert str(caught.value) == (
        f"{path} is no private key of Ed25519 in PEM without a password: make one with `weightcache keygen`"
    )


def test_folder_or_nothing_in_place_of_a_private_key_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ConfigError, match="is no private key"):
            load_private(path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_private(tmp_path / "missing")


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.ed25519", None)
    for needs in (
        lambda: generate(tmp_path / "key.pem"),
        lambda: load_private(tmp_path / "key.pem"),
        lambda: verify(SIGNATURE, MODEL, REVISION, [KEY]),
    ):
        with pytest.raises(ConfigError, match=r'pip install "weightcache\[signing\]"'):
            needs()


def test_unsigned_is_refused_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.ed25519", None)
    with pytest.raises(SignatureError):
        verify(None, MODEL, REVISION, [KEY])


# -- signatures


def test_statement_is_these_bytes() -> None:
    statement = (
        f'{{"model":"{MODEL}","revision":"{REVISION}","serial":3,"type":"weightcache signature","version":1}}'.encode()
    )
    assert PRIVATE.sign(statement).hex() == SIGNATURE.hex


def test_signature_gives_its_serial() -> None:
    assert verify(SIGNATURE, MODEL, REVISION, [OTHER_KEY, KEY]) == 3


def test_serial_is_in_range() -> None:
    assert verify(sign(PRIVATE, MODEL, REVISION, MAX_SERIAL), MODEL, REVISION, [KEY]) == MAX_SERIAL
    for serial in (0, -1, MAX_SERIAL + 1):
        with pytest.raises(ConfigError, match=f"the serial {serial} of {MODEL}"):
            sign(PRIVATE, MODEL, REVISION, serial)


def refusal(signature: Signature | None, model: str = MODEL, revision: Digest = REVISION, *trusted: PublicKey) -> str:
    """Return why a signature is refused."""
    with pytest.raises(SignatureError) as caught:
        verify(signature, model, revision, trusted or (KEY,))
    assert str(caught.value).count(str(revision)) == 1
    return str(caught.value.facts["reason"])


def test_g22_unsigned_is_refused() -> None:
    assert refusal(None) == "unsigned"


def test_g22_signature_of_an_untrusted_key_is_refused_and_the_key_named() -> None:
    assert refusal(sign(OTHER_PRIVATE, MODEL, REVISION, 3)) == "untrusted"
    with pytest.raises(SignatureError, match=f"signed by the key {KEY.key_id}.* trusted: {OTHER_KEY.key_id}. If"):
        verify(SIGNATURE, MODEL, REVISION, [OTHER_KEY])
    with pytest.raises(SignatureError, match=f"signed by the key {KEY.key_id}.* trusted: none"):
        verify(SIGNATURE, MODEL, REVISION, [])


def test_g22_signature_of_something_else_is_wrong() -> None:
    assert refusal(SIGNATURE, MODEL, Digest.of(b"another manifest")) == "wrong"
    assert refusal(SIGNATURE, "llama-3-70b") == "wrong"
    assert refusal(dataclasses.replace(SIGNATURE, serial=4)) == "wrong"
    assert refusal(dataclasses.replace(SIGNATURE, hex="0" * 128)) == "wrong"
    assert refusal(dataclasses.replace(SIGNATURE, key_id=OTHER_KEY.key_id), MODEL, REVISION, KEY, OTHER_KEY) == "wrong"


def test_g22_any_flipped_bit_is_wrong() -> None:
    signed = bytes.fromhex(SIGNATURE.hex)
    for bit in range(512):
        flipped = bytearray(signed)
        flipped[bit // 8] ^= 1 << bit % 8
        assert refusal(dataclasses.replace(SIGNATURE, hex=flipped.hex())) == "wrong"


def test_g22_key_that_is_no_point_of_the_curve_verifies_nothing() -> None:
    key = PublicKey("ff" * 32)
    assert refusal(dataclasses.replace(SIGNATURE, key_id=key.key_id), MODEL, REVISION, key) == "wrong"


def test_signature_gives_its_form_back() -> None:
    form = json.loads(json.dumps(SIGNATURE.to_form()))
    assert form == {
        "version": 1,
        "algorithm": "ed25519",
        "key": KEY.key_id,
        "serial": 3,
        "signature": SIGNATURE.hex,
    }
    assert Signature.from_form(form, "a file") == SIGNATURE


FORM = SIGNATURE.to_form()


@pytest.mark.parametrize(
    ("form", "says"),
    [
        (None, "is None: expected version, algorithm, key, serial, signature and nothing else"),
        ([], "is []: expected"),
        ({}, "is {}: expected"),
        (FORM | {"comment": "x" * 10_000}, "and nothing else"),
        ({"version": 1}, "and nothing else"),
        (FORM | {"version": 2}, "has the version 2, which is not valid"),
        (FORM | {"version": True}, "has the version True"),
        (FORM | {"algorithm": "none"}, "has the algorithm 'none'"),
        (FORM | {"key": KEY.key_id[:-1]}, "has the key"),
        (FORM | {"key": KEY.key_id + "\n"}, "has the key"),
        (FORM | {"key": 1}, "has the key 1"),
        (FORM | {"serial": 0}, "has the serial 0"),
        (FORM | {"serial": 1 << 63}, f"has the serial {1 << 63}"),
        (FORM | {"serial": 3.0}, "has the serial 3.0"),
        (FORM | {"serial": True}, "has the serial True"),
        (FORM | {"signature": SIGNATURE.hex.upper()}, "has the signature"),
        (FORM | {"signature": "0" * 1_000_000}, "has the signature"),
    ],
)
def test_form_that_is_wrong_is_an_error(form: object, says: str) -> None:
    with pytest.raises(FormatError) as caught:
        Signature.from_form(form, "a file")
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300


# -- what this node has seen


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_g22_lower_serial_than_was_seen_is_refused(root: Path) -> None:
    Seen(root).check_and_note("prod", MODEL, "v3", 5)
    with pytest.raises(SignatureError) as caught:
        Seen(root).check_and_note("prod", MODEL, "v3", 4)
    assert str(caught.value).startswith(
        f"{MODEL}@v3 of prod was rolled back: its serial is 4, this node has accepted 5. If that is meant, have the "
        "revision signed again"
    )
    assert caught.value.facts == {"reason": "rolled back", "model": MODEL, "tag": "v3", "serial": 4, "seen": 5}


def test_equal_and_higher_serials_are_accepted(root: Path) -> None:
    for serial in (1, 1, 7, 7):
        Seen(root).check_and_note("prod", MODEL, "v3", serial)


def test_refused_serial_is_not_remembered(root: Path) -> None:
    Seen(root).check_and_note("prod", MODEL, "v3", 5)
    for _ in range(2):
        with pytest.raises(SignatureError, match="accepted 5"):
            Seen(root).check_and_note("prod", MODEL, "v3", 4)


@pytest.mark.parametrize("name", [("other", MODEL, "v3"), ("prod", "other", "v3"), ("prod", MODEL, "other")])
def test_stores_models_and_tags_are_remembered_apart(root: Path, name: tuple[str, str, str]) -> None:
    Seen(root).check_and_note("prod", MODEL, "v3", 5)
    Seen(root).check_and_note(*name, 1)


def test_g24_memory_is_its_owners_alone(root: Path) -> None:
    before = os.umask(0)
    try:
        Seen(root).check_and_note("prod", MODEL, "v3", 5)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (root, *root.rglob("*")) if path.is_dir()}
    assert modes == {0o700}
    assert {path.stat().st_mode & 0o777 for path in root.rglob("*") if path.is_file()} == {0o600}


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[" * 50_000, b'{"serial": 9}', b"\xff"], ids=range(6))
def test_damaged_memory_refuses_and_says_what_to_do(root: Path, content: bytes) -> None:
    Seen(root).check_and_note("prod", MODEL, "v3", 5)
    [path] = (root / "trust").iterdir()
    path.write_bytes(content)
    with pytest.raises(SignatureError, match=f"{path}.* is damaged: remove it"):
        Seen(root).check_and_note("prod", MODEL, "v3", 9)
    path.unlink()
    Seen(root).check_and_note("prod", MODEL, "v3", 1)


def test_memory_of_another_name_does_not_pass_for_this(root: Path) -> None:
    Seen(root).check_and_note("prod", MODEL, "v3", 5)
    [path] = (root / "trust").iterdir()
    Seen(root).check_and_note("prod", MODEL, "old", 1)
    [other] = set((root / "trust").iterdir()) - {path}
    path.write_bytes(other.read_bytes())
    with pytest.raises(SignatureError, match="is damaged"):
        Seen(root).check_and_note("prod", MODEL, "v3", 1)


def test_serial_that_cannot_be_remembered_is_not_accepted(root: Path) -> None:
    root.mkdir()
    (root / "trust").write_text("a file")
    with pytest.raises(CapacityError, match="cannot be remembered"):
        Seen(root).check_and_note("prod", MODEL, "v3", 1)


def test_process_forgets_nothing_that_another_noted(root: Path) -> None:
    command = [sys.executable, "-c", NOTER, str(root), str(N_NOTED)]
    noters = [subprocess.Popen(command) for _ in range(3)]
    assert [noter.wait(60) for noter in noters] == [0, 0, 0]
