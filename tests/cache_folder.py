"""Own a look into a cache folder from outside: what lies there, and how it is damaged.

Never goes through weightcache: what is on the disk counts.
"""

from __future__ import annotations

from pathlib import Path


def chunk_files(root: Path) -> dict[str, Path]:
    """Return the chunk files by the hex of their digest."""
    return {path.name: path for path in sorted(root.glob("chunks/??/*"))}


def occupied_bytes(root: Path) -> int:
    """Return what the budget counts: the bytes of all chunks and of all models' files."""
    total = 0
    for path in (*root.glob("chunks/??/*"), *root.glob("models/*/files/**/*")):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # evicted meanwhile
            continue
    return total


def staged_files(root: Path) -> list[Path]:
    """Return the files that are being written, or were when their writer died."""
    return sorted(root.glob("staging/*"))


def flip_byte(path: Path, offset: int = -1) -> None:
    """Invert a bit of one byte in place; the middle one unless an offset is given."""
    with path.open("r+b") as file:
        at = path.stat().st_size // 2 if offset < 0 else offset
        file.seek(at)
        [old] = file.read(1)
        file.seek(at)
        file.write(bytes([old ^ 1]))


def snapshot(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return mode, modification time and content of all that lies below a folder."""
    found: dict[str, tuple[int, int, bytes]] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(root))] = (
            status.st_mode,
            status.st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
    return found


def open_below(root: Path) -> list[str]:
    """Return the files below a folder that this process holds open."""
    links = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(link.readlink()))
        except FileNotFoundError:  # closed since
            continue
    return [path for path in links if path.startswith(f"{root}/")]
