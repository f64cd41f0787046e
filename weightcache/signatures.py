"""Own the signatures of revisions: Ed25519 keys, the statement that is signed, and which serials this node has accepted.

Never trusts a key because a signature names it, and never shows a private one.

A signature binds three things: a model's name, its revision (by the manifest's digest: every byte) and a serial. It does
not bind the store, a tag, a time or the registry's residency policy. Who can write to a store can therefore copy a signed
revision there from any other whose model has the same name, point a tag at any signed revision of the model, or put
an old one back; `Seen` notices the last two where they lower the serial that this node has seen at the tag.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightcache.digest import Digest
from weightcache.errors import CapacityError, ConfigError, FormatError, SignatureError
from weightcache.files import publish_bytes, staged, sync_folder, write_all
from weightcache.locks import exclusive

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ALGORITHM = "ed25519"
VERSION = 1
MAX_SERIAL = (1 << 63) - 1
PRIVATE_LIMIT_NBYTES = 4096  # a PEM file of Ed25519 has 119
_PUBLIC = re.compile(r"ed25519:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class PublicKey:
    """The key that signatures are checked with, written `ed25519:<64 hex digits>`."""

    hex: str

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """Read the written form. Raises ValueError if it is not one."""
        match = _PUBLIC.fullmatch(text)
        if match is None:
            raise ValueError(f"not a public key: {text[:80]!r}, expected ed25519: and 64 hex digits")
        return cls(match[1])

    def __str__(self) -> str:
        return f"{ALGORITHM}:{self.hex}"

    @property
    def key_id(self) -> str:
        """16 hex digits of its digest, by which signatures and messages name it."""
        return Digest.of(bytes.fromhex(self.hex)).hex[:16]


def _is_text(pattern: str) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _is_number(low: int, high: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and low <= value <= high


_FIELDS: Mapping[str, Callable[[object], bool]] = {
    "version": _is_number(VERSION, VERSION),
    "algorithm": _is_text(ALGORITHM),
    "key": _is_text("[0-9a-f]{16}"),
    "serial": _is_number(1, MAX_SERIAL),
    "signature": _is_text("[0-9a-f]{128}"),
}


@dataclass(frozen=True, slots=True)
class Signature:
    """A signature of a revision: the id of the key that made it, the revision's serial, 64 bytes as hex digits."""

    key_id: str
    serial: int
    hex: str

    def to_form(self) -> dict[str, object]:
        """Return the JSON form: some 250 bytes."""
        return {
            "version": VERSION,
            "algorithm": ALGORITHM,
            "key": self.key_id,
            "serial": self.serial,
            "signature": self.hex,
        }

    @classmethod
    def from_form(cls, form: object, source: str) -> Signature:
        """Read the JSON form.

        Args:
            form: From JSON.
            source: Where it stands, for messages.

        Raises:
            FormatError: Anything else, another version among it.
        """
        if not isinstance(form, dict) or form.keys() != _FIELDS.keys():
            raise FormatError(
                f"the signature in {source} is {form!r:.80}: expected {', '.join(_FIELDS)} and nothing else; "
                "sign the revision again, or update weightcache",
                source=source,
            )
        for name, is_valid in _FIELDS.items():
            if not is_valid(form[name]):
                raise FormatError(
                    f"the signature in {source} has the {name} {form[name]!r:.80}, which is not valid: sign the revision "
                    "again, or update weightcache",
                    source=source,
                    field=name,
                )
        return cls(form["key"], form["serial"], form["signature"])


def generate(path: Path) -> PublicKey:
    """Make a key: write the private one as `path` (PEM, PKCS8, not encrypted, 0600), and return the public one.

    Raises:
        ConfigError: Something is there already, or it cannot be written.
    """
    with _needed():
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    private = Ed25519PrivateKey.generate()
    content = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        with staged(path.parent) as (fd, whole):
            write_all(fd, content)
            os.fsync(fd)
            path.hardlink_to(whole)  # unlike a rename it replaces nothing
        sync_folder(path.parent)
    except FileExistsError as exc:
        raise ConfigError(f"{path} exists: a key is never written over; name another file", path=str(path)) from exc
    except OSError as exc:
        raise ConfigError(f"the private key {path} cannot be written: {exc.strerror}", path=str(path)) from exc
    return public_key(private)


def load_private(path: Path) -> Ed25519PrivateKey:
    """Read a private key.

    Raises:
        ConfigError: It cannot be read, is no Ed25519 key in PEM without a password, or others may read it.
    """
    with _needed():
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    try:
        private = serialization.load_pem_private_key(_read_private(path), password=None)
        if not isinstance(private, Ed25519PrivateKey):
            raise TypeError("of another algorithm")
    except OSError as exc:
        raise ConfigError(f"the private key {path} cannot be read: {exc.strerror}", path=str(path)) from exc
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise ConfigError(
            f"{path} is no private key of Ed25519 in PEM without a password: make one with `weightcache keygen`",
            path=str(path),
        ) from exc
    return private


def _read_private(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISREG(mode) and mode & 0o077:
            raise ConfigError(
                f"the private key {path} has the mode {mode & 0o777:04o}, others may read it: expected 0600; run "
                f"chmod 600 {path}, and make a new key if others have had it",
                path=str(path),
            )
        return os.read(fd, PRIVATE_LIMIT_NBYTES) if stat.S_ISREG(mode) else b""
    finally:
        os.close(fd)


def public_key(private: Ed25519PrivateKey) -> PublicKey:
    """Return the public half of a key."""
    return PublicKey(private.public_key().public_bytes_raw().hex())


def sign(private: Ed25519PrivateKey, model: str, revision: Digest, serial: int) -> Signature:
    """Sign a revision of a model.

    Args:
        private: The publisher's key.
        model: Its name in the registry.
        revision: The manifest's digest.
        serial: Higher than that of every revision of the model that was signed before.

    Raises:
        ConfigError: A serial that is out of range.
    """
    if not 1 <= serial <= MAX_SERIAL:
        raise ConfigError(f"the serial {serial} of {model}: expected 1 to {MAX_SERIAL}", serial=serial)
    signed = private.sign(_statement(model, revision, serial))
    return Signature(public_key(private).key_id, serial, signed.hex())


def verify(signature: Signature | None, model: str, revision: Digest, trusted: Sequence[PublicKey]) -> int:
    """Check that a trusted key signed this revision of this model, and return its serial, for `Seen`.

    Raises:
        SignatureError: It is not signed, not by a trusted key, or the signature is of something else.
    """
    subject = f"{model} at {revision}"
    facts = {"model": model, "revision": str(revision)}
    if signature is None:
        raise SignatureError(
            f"{subject} is not signed, and its store is trusted by signatures alone: have its publisher sign it "
            "(`weightcache sign`), or take the trust off the store",
            reason="unsigned",
            **facts,
        )
    keys = [key for key in trusted if key.key_id == signature.key_id]
    if not keys:
        raise SignatureError(
            f"{subject} is signed by the key {signature.key_id}, which is not trusted; trusted: "
            f"{', '.join(key.key_id for key in trusted) or 'none'}. If its owner is known to you, add the key "
            "(`weightcache trust`)",
            reason="untrusted",
            key=signature.key_id,
            **facts,
        )
    statement = _statement(model, revision, signature.serial)
    if not any(_is_signed(statement, bytes.fromhex(signature.hex), key) for key in keys):
        raise SignatureError(
            f"the signature of {subject} is wrong: the key {signature.key_id} did not sign this revision under this "
            f"name with the serial {signature.serial}; somebody changed it, take another replica and tell the publisher",
            reason="wrong",
            key=signature.key_id,
            **facts,
        )
    return signature.serial


def _is_signed(statement: bytes, signed: bytes, key: PublicKey) -> bool:
    with _needed():
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key.hex)).verify(signed, statement)
    except InvalidSignature:
        return False
    return True


def _statement(model: str, revision: Digest, serial: int) -> bytes:
    form = {
        "type": "weightcache signature",
        "version": VERSION,
        "model": model,
        "revision": str(revision),
        "serial": serial,
    }
    return json.dumps(form, sort_keys=True, separators=(",", ":")).encode()


@contextlib.contextmanager
def _needed() -> Iterator[None]:
    try:
        yield
    except ImportError as exc:
        raise ConfigError('signatures need the package cryptography: pip install "weightcache[signing]"') from exc


class Seen:
    """This node's memory of the highest serial that it accepted at a tag. Safe to use from threads and processes.

    It is a memory and no proof: a cache folder that is new, or was emptied, accepts what comes first.

        trust/<key>.json        store, model, tag and serial; the key is their digest's
        trust.lock              held while one is changed

    Args:
        root: The cache folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def check_and_note(self, store: str, model: str, tag: str, serial: int) -> None:
        """Accept a serial and remember it, unless a higher one was accepted before.

        Args:
            store: Its name in the configuration, or its URL; equal replicas share one.
            model: Its name in the store.
            tag: The name that the revision was found under.
            serial: What `verify` returned: one that is not verified must not get here.

        Raises:
            SignatureError: A higher serial was accepted before, or what is remembered is damaged.
            CapacityError: It cannot be remembered, so the next roll-back would not be noticed.
        """
        name = [store, model, tag]
        path = self._root / "trust" / f"{Digest.of(json.dumps(name).encode()).hex[:32]}.json"
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self._root / "staging", path.parent):
                folder.mkdir(mode=0o700, exist_ok=True)
            with exclusive(self._root / "trust.lock"):
                seen = _recall(path, name)
                if serial > seen:
                    content = json.dumps({"name": name, "serial": serial}).encode()
                    publish_bytes(content, path, self._root / "staging")
        except OSError as exc:
            raise CapacityError(
                f"the serial of {model}@{tag} cannot be remembered in {path} ({exc.strerror}): make the cache folder "
                "writable, a roll-back would go unnoticed",
                path=str(path),
            ) from exc
        if serial < seen:
            raise SignatureError(
                f"{model}@{tag} of {store} was rolled back: its serial is {serial}, this node has accepted {seen}. If "
                "that is meant, have the revision signed again (`weightcache sign`), which gives it a higher serial",
                reason="rolled back",
                model=model,
                tag=tag,
                serial=serial,
                seen=seen,
            )


def _recall(path: Path, name: list[str]) -> int:
    """Return the serial that was accepted last, 0 for none."""
    try:
        form = json.loads(path.read_bytes())
    except FileNotFoundError:
        return 0
    except (ValueError, RecursionError):
        form = None
    serial: Any = form.get("serial") if isinstance(form, dict) and form.get("name") == name else None
    if not _FIELDS["serial"](serial):
        raise SignatureError(
            f"{path}, the memory of what was accepted as {name[1]}@{name[2]} of {name[0]}, is damaged: remove it to "
            "accept what the store has now",
            path=str(path),
            reason="damaged",
        )
    return int(serial)
