"""Own the disk tier: chunks as files named by their digest, within a byte budget.

Never shows a chunk before it is whole, synced and checked; never truncates one.

    weightcache.json            format version
    chunks/<aa>/<digest>        a chunk, padded with zeros to 4 KiB so that direct reads have no tail case
    staging/                    files being written
    quarantine/                 rotten chunks, the newest few, for a post-mortem
    catalogue/                  see catalogue.py
    leases/, flight, *.lock     see locks.py
    shards/, models/            see records.py
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weightcache import _engine
from weightcache.choosing import ASSUMED_BYTES_PER_S
from weightcache.digest import Digest, checksum
from weightcache.errors import CacheFormatError, CapacityError
from weightcache.files import (
    file_system_of,
    is_network,
    publish,
    publish_bytes,
    remove_dead,
    staged,
    sweep,
    unlock,
    write_past_page_cache,
)
from weightcache.layout import PAGE_NBYTES, pages
from weightcache.ledger import place_of
from weightcache.locks import Flight, Lease, Precedence, exclusive, leased_models
from weightcache.manifest import CHUNK_LIMIT_NBYTES, FORMAT_VERSION, Manifest, Shard
from weightcache.measurements import Measurements
from weightcache.operations import Crew, Failure, HostPlace, Operations, Place, address_of
from weightcache.tiers.catalogue import Catalogue, CatalogueDamagedError, discard
from weightcache.tiers.eviction import HIGH_WATERMARK, LOW_WATERMARK, Resident, Uses, choose_victims, used_again
from weightcache.tiers.records import ModelRecord, Records

log = logging.getLogger(__name__)

AUTO_BUDGET_SHARE = 0.8
N_QUARANTINED = 4
N_GONE = 1000  # models that are not here any more, of which uses are remembered
# Errors of reading that are the file's own: wrong bytes, too few of them, no regular file, a disk that cannot read it.
ROT = frozenset({errno.EBADMSG, errno.ENODATA, errno.EINVAL, errno.ELOOP, errno.EIO, errno.EUCLEAN})


@dataclass(frozen=True, slots=True)
class WantedChunk:
    """A chunk and where it is to go."""

    digest: Digest
    nbytes: int
    place: Place


class DiskTier:
    """The disk tier below one cache folder. Safe to use from threads and processes.

    Args:
        root: The cache folder; made if it is not there.
        budget_bytes: Most bytes of chunks and files; 0 means a share of what the file system has free.

    Raises:
        CacheFormatError: The folder was written by an unknown version; it is left untouched.
        CapacityError: The folder cannot be made or written.
    """

    def __init__(self, root: Path, budget_bytes: int = 0) -> None:
        self.root = root
        self._chunks = root / "chunks"
        self.staging = root / "staging"
        self._bounce = threading.local()
        self._known: dict[Digest, int | None] = {}  # checksums; written under the GIL, one entry at a time
        try:
            self._make_folders()
            self.records = Records(root, self.staging)
            self._catalogue = self._open_catalogue()
            self.budget_bytes = budget_bytes or self._auto_budget()
            if sweep(self.staging):
                self.make_room()  # what the dead had reserved is free again
        except OSError as exc:
            raise CapacityError(
                f"the cache folder {root} cannot be used ({exc.strerror or exc}): set WEIGHTCACHE_DIR to a writable "
                "folder on a local disk, or load with cache='none'",
                path=str(root),
            ) from exc

    def _make_folders(self) -> None:
        marker = self.root / "weightcache.json"
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            version = json.loads(marker.read_bytes()).get("version")
            is_new = False
        except FileNotFoundError:
            version, is_new = FORMAT_VERSION, True
        except (ValueError, AttributeError) as exc:
            raise CacheFormatError(
                f"{marker} is not readable ({exc}): use another cache folder", path=str(marker)
            ) from exc
        if version != FORMAT_VERSION:
            raise CacheFormatError(
                f"the cache folder {self.root} has format version {version!r}, this weightcache knows {FORMAT_VERSION}: "
                "update weightcache or use another folder; nothing was touched",
                path=str(self.root),
            )
        for folder in (self.staging, self.root / "quarantine", self.root / "leases", self._chunks):
            folder.mkdir(mode=0o700, exist_ok=True)
        if is_new:
            if is_network(file_system := file_system_of(self.root)):
                log.warning("the cache folder %s lies on %s: a local disk is faster and safer", self.root, file_system)
            for number in range(256):
                (self._chunks / f"{number:02x}").mkdir(mode=0o700, exist_ok=True)
            publish_bytes(json.dumps({"version": FORMAT_VERSION}).encode(), marker, self.staging)

    def _auto_budget(self) -> int:
        volume = os.statvfs(self.root)
        free = volume.f_bavail * volume.f_frsize
        return int(AUTO_BUDGET_SHARE * (free + max(0, self.used_bytes())))

    # -- chunks (the Tier contract)

    def look(self, digests: Iterable[Digest]) -> set[Digest]:
        found: set[Digest] = set()
        wanted = [digest for digest in digests if digest not in found]
        with self._catalogue.transaction():
            rows = [(digest, self._row(digest)) for digest in wanted]
        for digest, row in rows:
            if row is not None:
                self._known[digest] = row[1]
                found.add(digest)
        return found

    def _row(self, digest: Digest) -> tuple[int, int | None] | None:
        """Return what the catalogue says of a chunk: its bytes, and its checksum where it is known."""
        row = self._catalogue.get(f"chunk:{digest.hex}")
        match row:
            case None:
                return None
            case [int(nbytes), int() | None as expected]:
                return nbytes, expected
        raise self._catalogue.damage(f"chunk:{digest.hex} is no number and checksum")

    def read_into(self, digest: Digest, target: memoryview) -> bool:
        wanted = [WantedChunk(digest, len(target), HostPlace(address_of(target)))]
        return not self.read(wanted, Crew(threads=1), lambda index: None)

    def read(self, wanted: Sequence[WantedChunk], crew: Crew, on_done: Callable[[int], None]) -> list[int]:
        """Bring chunks to their places, each checked, on this thread and the engine's.

        Args:
            wanted: Any number, from any model.
            crew: Who reads.
            on_done: Told, on this thread, the index of each chunk once it is in its place.

        Returns:
            The indexes of chunks that are not here, or were rotten and have been set aside: fetch them again.

        Raises:
            DeviceError, CapacityError: A place cannot be filled.
            Stopped: The crew was told to.
        """
        missed: list[int] = []
        left = [*range(len(wanted))]
        try:
            self.look([each.digest for each in wanted if each.digest not in self._known])
            folder_fd = os.open(self._chunks, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            log.warning("the disk tier %s cannot be read (%s): its chunks are fetched", self.root, exc.strerror or exc)
            return left
        try:
            for index in [index for index in left if self._known.get(wanted[index].digest) is None]:
                left.remove(index)
                if self._read_by_digest(folder_fd, wanted[index], crew):
                    on_done(index)
                else:
                    missed.append(index)
            while left:
                operations = Operations(folder_fd)
                for index in left:
                    each = wanted[index]
                    checksum = self._known.get(each.digest)
                    operations.read_named(_name(each.digest), 0, each.nbytes, each.place, checksum=checksum)

                def tell(done: Sequence[int], left: Sequence[int] = tuple(left)) -> None:
                    for index in done:
                        on_done(left[index])

                failure = operations.run(crew, tell)
                if failure is None:
                    break
                bad = {left[failure.index]}
                left = [each for index, each in enumerate(left) if each not in bad and not operations.is_done(index)]
                if failure.errno == errno.ENOENT:  # where one is lost, more may be: find them all at once
                    bad |= {each for each in left if not self._path(wanted[each].digest).exists()}
                    left = [each for each in left if each not in bad]
                for each in bad:
                    self._set_aside(wanted[each].digest, failure)
                missed += bad
        finally:
            os.close(folder_fd)
        return missed

    def _read_by_digest(self, folder_fd: int, wanted: WantedChunk, crew: Crew) -> bool:
        """Read a chunk whose checksum is not known, and learn it."""
        memory = _engine.Memory(pages(wanted.nbytes))
        content = memoryview(memory)[: wanted.nbytes]
        failure = _read_alone(folder_fd, wanted.digest, content, past_cache=False)
        if failure is None and Digest.of(content) != wanted.digest:
            failure = _read_alone(folder_fd, wanted.digest, content, past_cache=True)
            if failure is None and Digest.of(content) != wanted.digest:
                failure = Failure(0, errno.EBADMSG, 0)
        if failure is not None:
            self._set_aside(wanted.digest, failure)
            return False
        self._known[wanted.digest] = checksum(content)
        with self._catalogue.transaction():  # only what is entered is counted, and it may have been dropped meanwhile
            if self._row(wanted.digest) is not None:
                self._catalogue.set(f"chunk:{wanted.digest.hex}", [len(content), self._known[wanted.digest]])
        operations = Operations()
        operations.copy(memory.address, wanted.nbytes, wanted.place)
        failure = operations.run(crew)
        if failure is not None:
            raise failure.as_error(f"chunk {wanted.digest}")
        return True

    def _set_aside(self, digest: Digest, failure: Failure) -> None:
        """Make a chunk that could not be read a miss from now on, or raise what is not the chunk's fault."""
        if failure.errno == errno.ENOENT:
            self._clear(digest)
            return
        error = failure.as_error(f"chunk {digest}")
        if not isinstance(error, OSError):
            raise error
        if failure.errno not in ROT:
            log.warning("chunk %s cannot be read (%s) and is fetched again", digest, error.strerror)
            return
        if failure.errno != errno.EBADMSG:
            log.warning("chunk %s cannot be read (%s)", digest, error.strerror)
        self.quarantine(digest)

    def write(self, digest: Digest, checksum: int, content: memoryview) -> bool:
        nbytes = pages(len(content))
        if self._holds(digest):
            return True
        with staged(self.staging, nbytes) as (fd, path):
            if not self._reserve(nbytes):
                return False
            is_counted = False
            try:
                stored = self._fill(fd, content, nbytes, checksum)
                if stored and not self._holds(digest):
                    # Names change in transactions alone, so that who drops a chunk sees its file and its row as one.
                    publish(fd, path, self._path(digest), naming=self._catalogue.transaction())
                    is_counted = self._enter(digest, fd, len(content), checksum)
            except OSError:
                is_counted = not path.exists()  # it has its name: whoever clears it away counts it off
                raise
            finally:
                if not is_counted:
                    self._catalogue.add("used_bytes", -nbytes)
        return stored

    def _holds(self, digest: Digest) -> bool:
        """Tell whether a chunk is here, and clear away what is left of one that was lost or never entered."""
        there = self._path(digest).exists()
        if there and self.look([digest]):
            return True
        self._clear(digest)
        return False

    def _clear(self, digest: Digest) -> None:
        """Clear away a row without a file, or a file without a row."""
        path = self._path(digest)
        with self._catalogue.transaction():
            row, nbytes = self._row(digest), _size_of(path)
            if row is not None and not path.exists():
                self._remove(digest, row[0])
            elif row is None and nbytes and remove_dead(path):  # a living writer holds it locked until it is entered
                self._catalogue.add("used_bytes", -nbytes)

    def _fill(self, fd: int, content: memoryview, nbytes: int, expected: int) -> bool:
        """Write padded content into a staged file, unless it no longer has its checksum."""
        if not hasattr(self._bounce, "memory"):
            self._bounce.memory = _engine.Memory(CHUNK_LIMIT_NBYTES)
        # Whole pages go from where they lie, when that is at a page; the rest by a buffer that is.
        n_direct = len(content) // PAGE_NBYTES * PAGE_NBYTES if address_of(content) % PAGE_NBYTES == 0 else 0
        rest = memoryview(self._bounce.memory)[: nbytes - n_direct]
        np.copyto(np.frombuffer(rest, np.uint8)[: len(content) - n_direct], np.frombuffer(content, np.uint8)[n_direct:])
        rest[len(content) - n_direct :] = bytes(nbytes - len(content))
        write_past_page_cache(fd, content[:n_direct], rest)
        # The content's owner may write into it at any time: what is still right afterwards was right meanwhile. Who
        # changes it and changes it back stores rot, which the checksum shows when it is read.
        if checksum(content) != expected:
            log.info("a chunk was written into before it was stored; it is not cached")
            return False
        return True

    def _enter(self, digest: Digest, fd: int, nbytes: int, expected: int) -> bool:
        """Enter a published chunk into the catalogue; tell whether it was not there, so that its bytes are new."""
        with self._catalogue.transaction():
            new = self._row(digest) is None
            self._catalogue.set(f"chunk:{digest.hex}", [nbytes, expected])
            unlock(fd)  # from here on its row speaks for it: see drop
        self._known[digest] = expected
        return new

    def drop(self, digest: Digest) -> None:
        with self._catalogue.transaction():
            row = self._row(digest)
            if row is not None:
                remove_dead(self._path(digest))  # not what a living writer has put there and not entered: he counts it
                self._remove(digest, row[0])
        self._clear(digest)

    def quarantine(self, digest: Digest) -> None:
        """Set a rotten chunk aside: from now on it is a miss."""
        log.warning("chunk %s on disk is rotten: it is set aside and fetched again", digest)
        folder = self.root / "quarantine"
        with self._catalogue.transaction():
            row = self._row(digest)
            if row is not None:
                remove_dead(self._path(digest), keep_as=folder / digest.hex)
                self._remove(digest, row[0])
        self._clear(digest)
        with contextlib.suppress(OSError):  # others tidy up too
            for path in sorted(folder.iterdir(), key=lambda path: path.lstat().st_mtime)[:-N_QUARANTINED]:
                path.unlink()

    def _remove(self, digest: Digest, nbytes: int) -> None:
        """Take a chunk out of the catalogue, in the transaction that its file leaves in: who counts waits for both."""
        self._known.pop(digest, None)
        self._catalogue.delete(f"chunk:{digest.hex}")
        self._catalogue.add("used_bytes", -pages(nbytes))

    def _path(self, digest: Digest) -> Path:
        return self._chunks / digest.hex[:2] / digest.hex

    # -- what is learned of shards

    def recall_shard(self, key: str, *, path: str, prefix: str = "") -> Shard | None:
        """Return the remembered shard with every digest learned so far, or None."""
        shard = self.records.recall_shard(key, path=path, prefix=prefix)
        if shard is None:
            return None
        missing = [index for index, chunk in enumerate(shard.chunks) if chunk.digest is None]
        return shard.with_digests(self.learned(key, missing)) if missing else shard

    def recall_manifest(self, key: str) -> Manifest | None:
        """Return what a model was when it was last described, or None when a part of that is lost."""
        record = self.records.recall_model(key)
        if record is None:
            return None
        shards = [self.recall_shard(shard, path=path, prefix=prefix) for shard, path, prefix in record.shards]
        return Manifest.plain(shard for shard in shards if shard) if all(shards) else None

    def learned(self, key: str, indexes: Iterable[int]) -> dict[int, Digest]:
        """Return the digests of these chunks of a shard, where their bytes have arrived on this node."""
        with self._catalogue.transaction():
            rows = [(index, self._catalogue.get(f"learned:{key}:{index}")) for index in indexes]
        try:
            return {index: Digest.parse(row) for index, row in rows if row is not None}
        except (TypeError, ValueError) as exc:
            raise self._catalogue.damage(f"what was learned of shard {key} is no digest") from exc

    def learn(self, key: str, index: int, digest: Digest) -> None:
        """Note the digest of a chunk that is published."""
        self._catalogue.set(f"learned:{key}:{index}", str(digest))

    def consolidate(self, key: str, shard: Shard) -> None:
        """Enter what was learned of a shard into its record, so that a lost catalogue loses none of it.

        The rows stay: a load that described the shard earlier still asks for them.
        """
        with exclusive(self.root / "records.lock"):
            recorded = self.records.recall_shard(key, path=shard.path) or shard
            missing = [index for index, chunk in enumerate(recorded.chunks) if chunk.digest is None]
            learned = self.learned(key, missing)
            if learned:
                self.records.remember_shard(key, recorded.with_digests(learned))

    def _forget_shard(self, key: str, path: str) -> None:
        shard = self.records.recall_shard(key, path=path)
        self.records.forget_shard(key)
        if shard is not None:
            with self._catalogue.transaction():
                for index in range(len(shard.chunks)):
                    self._catalogue.delete(f"learned:{key}:{index}")

    # -- uses

    def note_use(self, key: str, now_s: float) -> None:
        """Note a use of a model: beside its record, and among its last ones in the catalogue."""
        with self._catalogue.transaction():
            known = self._uses(key)
            record = None if known else self.records.recall_model(key)
            uses = used_again(known or ((record.last_use_s,) if record else ()), now_s)
            if uses != known:
                self._catalogue.set(f"uses:{key}", uses)
        self.records.touch(key, now_s)

    def _uses(self, key: str) -> Uses:
        """Return what the catalogue knows of a model's uses; it outlasts the model's stay."""
        row = self._catalogue.get(f"uses:{key}")
        if row is not None and not (
            isinstance(row, list) and all(isinstance(each, float) and math.isfinite(each) for each in row)
        ):
            raise self._catalogue.damage(f"uses:{key} are no moments")
        return tuple(row or ())

    def _forget_uses(self, here: Container[str]) -> None:
        """Forget the uses of models that left long ago."""
        gone = [key for key in (row.partition(":")[2] for row in self._catalogue.keys("uses:")) if key not in here]
        if len(gone) > N_GONE:
            with self._catalogue.transaction():
                for key in sorted(gone, key=self._uses)[:-N_GONE]:
                    self._catalogue.delete(f"uses:{key}")

    # -- holds

    def lease(self, model: str) -> Lease:
        """Keep a model from eviction until released or until this process ends."""
        return Lease(self.root / "leases", model)

    def leased(self) -> set[str]:
        return leased_models(self.root / "leases")

    def flight(self) -> Flight:
        return Flight(self.root / "flight")

    def precedence(self) -> Precedence:
        return Precedence(self.root / "precedence.lock")

    # -- budget

    def used_bytes(self) -> int:
        return self._catalogue.count("used_bytes")

    @contextlib.contextmanager
    def counting(self, folder: Path) -> Iterator[None]:
        """Count what the block writes into a folder of a model's files towards the budget."""
        before = _tree_bytes(folder)
        try:
            yield
        finally:
            self._catalogue.add("used_bytes", _tree_bytes(folder) - before)

    def _reserve(self, nbytes: int) -> bool:
        """Count the bytes of a staged file towards the budget, making room where they do not fit."""
        with self._catalogue.transaction():
            self._catalogue.add("reserved_bytes", nbytes)
            used = self._catalogue.add("used_bytes", nbytes)
        if used <= HIGH_WATERMARK * self.budget_bytes or self.make_room():
            return True
        self._catalogue.add("used_bytes", -nbytes)
        return False

    def make_room(self) -> bool:
        """Count anew what lies here, and evict until it fits into the budget; tell whether it does."""
        with exclusive(self.root / "evict.lock"):
            before = self._catalogue.count("reserved_bytes")
            # Staged files first: one that is published meanwhile counts twice, but none is missed.
            used = sum(_size_of(path) for path in self.staging.iterdir())
            sizes = {digest: _size_of(path) for digest, path in self._chunk_files()}
            used += sum(sizes.values()) + self._file_bytes()
            if used > HIGH_WATERMARK * self.budget_bytes:
                residents = self._residents()
                owned = frozenset[Digest]().union(*(resident.chunks for resident in residents))
                for digest in sizes.keys() - owned:
                    self.drop(digest)
                    used -= sizes.pop(digest)
                to_free = used - int(LOW_WATERMARK * self.budget_bytes)
                choice = choose_victims(residents, sizes, to_free, time.time())
                used -= self.evict(victim.key for victim in choice.victims)
                with self._catalogue.transaction():
                    for key, uses in choice.bequests.items():
                        self._catalogue.set(f"uses:{key}", uses)
                self._forget_uses({resident.key for resident in residents} - {victim.key for victim in choice.victims})
            with self._catalogue.transaction():
                used += self._catalogue.count("reserved_bytes") - before
                self._catalogue.set("used_bytes", used)
            return used <= HIGH_WATERMARK * self.budget_bytes

    def _residents(self) -> list[Resident]:
        """Return what there is to choose from. A model's bytes come back as fast as its place has shown."""
        leased, measured = self.leased(), Measurements(self.root)
        return [
            Resident(
                key=record.key,
                chunks=frozenset(self.chunks_of(record)),
                last_use_s=record.last_use_s,
                uses=self._uses(record.key),
                held=record.pinned or record.key in leased,
                own_bytes=_tree_bytes(self.records.files_folder(record.key)),
                bytes_per_s=measured.of(place_of(record.uri, record.endpoint)).bytes_per_s or ASSUMED_BYTES_PER_S,
            )
            for record in self.records.models()
        ]

    def chunks_of(self, record: ModelRecord) -> Mapping[Digest, int]:
        """Return the known digests of a model's chunks, with their sizes."""
        shards = (self.recall_shard(key, path=path) for key, path, _ in record.shards)
        return {
            chunk.digest: chunk.nbytes
            for shard in shards
            if shard
            for chunk in shard.chunks
            if chunk.digest is not None
        }

    def total_bytes(self, record: ModelRecord) -> int:
        """Return the size of all files of a model."""
        shards = (self.records.recall_shard(key, path=path) for key, path, _ in record.shards)
        return sum(shard.nbytes for shard in shards if shard)

    def inspect(self, digest: Digest, nbytes: int, *, deep: bool) -> str:
        """Return `sound`, `lost` or `rotten` for a chunk of known size; `deep` recomputes its digest."""
        path = self._path(digest)
        try:
            if path.stat().st_size != pages(nbytes):
                return "rotten"
            if deep:
                content = memoryview(_engine.Memory(nbytes))
                # What the disk holds counts, not what the page cache remembers.
                folder_fd = os.open(self._chunks, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    failure = _read_alone(folder_fd, digest, content, past_cache=True)
                finally:
                    os.close(folder_fd)
                if failure is not None and failure.errno == errno.ENOENT:
                    return "lost"
                if failure is not None or Digest.of(content) != digest:
                    return "rotten"
        except FileNotFoundError:
            return "lost"
        except OSError:
            return "rotten"
        return "sound"

    def evict(self, keys: Iterable[str]) -> int:
        """Remove models: their records, their files and every chunk no other model has. Returns the bytes freed."""
        chosen = set(keys)
        gone = [record for record in self.records.models() if record.key in chosen]
        kept = [record for record in self.records.models() if record.key not in chosen]
        digests = frozenset[Digest]().union(*(self.chunks_of(record) for record in gone))
        digests -= frozenset[Digest]().union(*(self.chunks_of(record) for record in kept))
        kept_shards = {shard for record in kept for shard, _, _ in record.shards}
        freed = 0
        for record in gone:
            log.info("evict %s from disk", record.uri)
            files_bytes = _tree_bytes(self.records.files_folder(record.key))
            self.records.forget_model(record.key)
            self._catalogue.add("used_bytes", -files_bytes)
            freed += files_bytes
            for shard, path, _ in record.shards:
                if shard not in kept_shards:
                    self._forget_shard(shard, path)
        for digest in digests:
            freed += _size_of(self._path(digest))
            self.drop(digest)
        return freed

    def _chunk_files(self) -> Iterator[tuple[Digest, Path]]:
        for path in self._chunks.glob("??/*"):
            if len(path.name) == 64:
                yield Digest(path.name), path

    def chunk_digests(self) -> list[Digest]:
        """Return every chunk that has a file."""
        return [digest for digest, _ in self._chunk_files()]

    def _file_bytes(self) -> int:
        return sum(_tree_bytes(self.records.files_folder(record.key)) for record in self.records.models())

    # -- the catalogue's life

    def _open_catalogue(self) -> Catalogue:
        folder = self.root / "catalogue"
        with contextlib.suppress(CatalogueDamagedError):
            catalogue = Catalogue(folder)
            if self._is_complete(catalogue):
                return catalogue
            catalogue.close()
        with exclusive(self.root / "evict.lock"):  # one rebuilds it, the others find it done
            try:
                catalogue = Catalogue(folder)
                complete = self._is_complete(catalogue)
            except CatalogueDamagedError as exc:
                log.warning("the catalogue is damaged and is rebuilt from the chunks: %s", exc)
                discard(folder)
                catalogue, complete = Catalogue(folder), False
            if not complete:
                self._rebuild(catalogue)
            return catalogue

    def _is_complete(self, catalogue: Catalogue) -> bool:
        return catalogue.count("used_bytes") >= 0 and catalogue.get("complete") is True

    def _rebuild(self, catalogue: Catalogue) -> None:
        """Fill an empty catalogue from the chunk files; their checksums are learned when they are next read."""
        nbytes: dict[Digest, int] = {}
        for record in self.records.models():
            for key, name, _ in record.shards:
                shard = self.records.recall_shard(key, path=name)
                nbytes.update((chunk.digest, chunk.nbytes) for chunk in (shard.chunks if shard else ()) if chunk.digest)
        used = self._file_bytes()
        with catalogue.transaction():
            for digest, path in self._chunk_files():
                if digest in nbytes:
                    used += _size_of(path)
                    catalogue.set(f"chunk:{digest.hex}", [nbytes[digest], None])
                else:
                    path.unlink(missing_ok=True)  # nobody knows its size any more, so nobody can read it
            catalogue.set("used_bytes", used)
            catalogue.set("complete", True)

    def close(self) -> None:
        self._bounce = threading.local()  # the writers' buffers go now, not when the last who knows this tier does
        self._catalogue.close()


def _name(digest: Digest) -> str:
    """Return a chunk's file below the folder of chunks."""
    return f"{digest.hex[:2]}/{digest.hex}"


def _read_alone(folder_fd: int, digest: Digest, target: memoryview, *, past_cache: bool) -> Failure | None:
    """Read a chunk's file unchecked."""
    operations = Operations(folder_fd)
    operations.read_named(_name(digest), 0, len(target), HostPlace(address_of(target)), past_cache=past_cache)
    return operations.run(Crew(threads=1))


def _tree_bytes(folder: Path) -> int:
    return sum(_size_of(path) for path in folder.rglob("*") if path.is_file())


def _size_of(path: Path) -> int:
    """Return a file's size, 0 when it is gone: others evict while we count."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
