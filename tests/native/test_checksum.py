"""What `_engine.checksum` promises: XXH3-64 as the xxhash package computes it, however it is called."""

import ctypes
import random
import subprocess
import sys
from collections.abc import Sequence

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from weightcache import _engine
from weightcache._engine import Memory, checksum

KIB = 1 << 10
BLOCK = KIB
STEP = 256 * KIB
CONTENT = memoryview(random.Random(1).randbytes(4 * STEP + 4 * KIB))

SHORT = range(2201)  # each formula, stripe and block, and a good bit past the second block
EDGES = [64 * 99, *(KIB * count for count in (3, 4, 5, 8, 64, 255)), *(STEP * count for count in (1, 2, 3, 4))]
LONG = sorted({edge + past for edge in EDGES for past in (-65, -64, -63, -1, 0, 1, 2, 63, 64, 65, 1023)})

WAYS = pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])

# A loaded machine is no fault of what is drawn.
examples = settings(deadline=None, max_examples=200)
stretches = st.tuples(st.integers(0, 4 * KIB), st.one_of(st.integers(0, 5000), st.integers(0, 4 * STEP)))
contents = st.one_of(
    st.binary(max_size=5000),
    stretches.map(lambda stretch: bytes(CONTENT[stretch[0] : sum(stretch)])),
    st.builds(lambda value, count: bytes([value]) * count, st.integers(0, 255), st.integers(0, 5000)),
)


def sum_of_pieces(pieces: Sequence[bytes], plain: bool) -> int:
    """Call the kernel itself, which other kernels feed from one buffer that they fill again and again."""
    kernel = ctypes.CDLL(_engine.__file__)
    kernel.wc_checksum_end.restype = ctypes.c_uint64
    state = (ctypes.c_uint64 * 32)()  # more than a struct wc_checksum
    begin = kernel.wc_checksum_begin_plain if plain else kernel.wc_checksum_begin
    begin(state, ctypes.c_size_t(sum(map(len, pieces))))
    for piece in pieces:
        kernel.wc_checksum_add(state, piece, ctypes.c_size_t(len(piece)))
    return int(kernel.wc_checksum_end(state))


@WAYS
def test_every_short_length_agrees_with_xxhash(plain: bool) -> None:
    differing = [n for n in SHORT if checksum(CONTENT[:n], plain=plain) != xxhash.xxh3_64_intdigest(CONTENT[:n])]
    assert differing == []


@WAYS
def test_long_lengths_agree_with_xxhash(plain: bool) -> None:
    differing = [n for n in LONG if checksum(CONTENT[:n], plain=plain) != xxhash.xxh3_64_intdigest(CONTENT[:n])]
    assert differing == []


@WAYS
@examples
@given(content=contents)
def test_any_content_agrees_with_xxhash(plain: bool, content: bytes) -> None:
    assert checksum(content, plain=plain) == xxhash.xxh3_64_intdigest(content)


@WAYS
@pytest.mark.parametrize("nbytes", [3, 240, 241, 1024, 1025, 5000, STEP + 7])
@pytest.mark.parametrize("value", [0x00, 0xFF], ids=["zeroes", "ones"])
def test_carries_and_zeroes_agree_with_xxhash(nbytes: int, value: int, plain: bool) -> None:
    content = bytes([value]) * nbytes
    assert checksum(content, plain=plain) == xxhash.xxh3_64_intdigest(content)


@WAYS
def test_steps_of_one_block_change_nothing_at_any_short_length(plain: bool) -> None:
    differing = [n for n in SHORT if checksum(CONTENT[:n], step=BLOCK, plain=plain) != checksum(CONTENT[:n])]
    assert differing == []


@WAYS
@pytest.mark.parametrize("step", [BLOCK, 3 * BLOCK, 64 * KIB, STEP])
def test_steps_change_nothing_at_long_lengths(step: int, plain: bool) -> None:
    differing = [n for n in LONG if checksum(CONTENT[:n], step=step, plain=plain) != checksum(CONTENT[:n])]
    assert differing == []


@examples
@given(content=contents, blocks=st.integers(1, 300), plain=st.booleans())
def test_any_step_changes_nothing(content: bytes, blocks: int, plain: bool) -> None:
    assert checksum(content, step=blocks * BLOCK, plain=plain) == xxhash.xxh3_64_intdigest(content)


@WAYS
@pytest.mark.parametrize("tail", [0, 1, 2, 63, 64, 65, 127, 128, 1023])
@pytest.mark.parametrize("step", [BLOCK, 2 * BLOCK, STEP])
def test_last_stripe_may_lie_in_two_pieces(step: int, tail: int, plain: bool) -> None:
    content = bytes(CONTENT[: 2 * step + tail])
    pieces = [content[:step], b"", content[step : 2 * step], content[2 * step :]]
    assert sum_of_pieces(pieces, plain) == xxhash.xxh3_64_intdigest(content)


@WAYS
@pytest.mark.parametrize("nbytes", [0, 1, 240, 241])
def test_empty_pieces_around_short_content_change_nothing(nbytes: int, plain: bool) -> None:
    content = bytes(CONTENT[:nbytes])
    assert sum_of_pieces([b"", content, b""], plain) == xxhash.xxh3_64_intdigest(content)


@examples
@given(content=contents)
def test_fast_way_is_bit_identical_to_the_plain_one(content: bytes) -> None:
    assert checksum(content) == checksum(content, plain=True)


@WAYS
@pytest.mark.parametrize("nbytes", [7, 16, 100, 200, 241, 1024, 3000, STEP + 1])
def test_address_changes_nothing(nbytes: int, plain: bool) -> None:
    memory = memoryview(Memory(nbytes + 64))
    found = set()
    for start in range(65):
        memory[start : start + nbytes] = CONTENT[:nbytes]
        found.add(checksum(memory[start : start + nbytes], step=BLOCK, plain=plain))
    assert found == {xxhash.xxh3_64_intdigest(CONTENT[:nbytes])}


@WAYS
@pytest.mark.parametrize("nbytes", [1, 3, 4, 8, 9, 16, 17, 128, 129, 240, 241, 1024, 1025, 4096])
def test_nothing_past_the_end_is_read(nbytes: int, plain: bool) -> None:
    memory = memoryview(Memory(4096))  # a page that nobody may touch follows it
    memory[4096 - nbytes :] = CONTENT[:nbytes]
    assert checksum(memory[4096 - nbytes :], plain=plain) == xxhash.xxh3_64_intdigest(CONTENT[:nbytes])


@pytest.mark.parametrize("nbytes", [1, 16, 128, 240, 1024, 5000])
def test_every_flipped_bit_is_found(nbytes: int) -> None:
    content = bytearray(CONTENT[:nbytes])
    found = {checksum(content)}
    for at in range(nbytes):
        content[at] ^= 1 << at % 8
        found.add(checksum(content))
        content[at] ^= 1 << at % 8
    assert len(found) == nbytes + 1


def test_any_contiguous_buffer_will_do() -> None:
    content = CONTENT[:4096]
    assert checksum(content.cast("Q")) == checksum(bytearray(content)) == checksum(bytes(content))


@pytest.mark.parametrize("step", [-1024, 0, 1, 1023, 1025, 1536])
def test_step_that_is_no_multiple_of_a_block_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"positive multiple of 1024, got {step}"):
        checksum(b"", step=step)


def test_content_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises(BufferError):
        checksum(CONTENT[::2])


def test_content_that_is_no_buffer_is_refused() -> None:
    with pytest.raises(TypeError):
        checksum("text")  # type: ignore[arg-type]


def test_sigint_ends_a_long_sum() -> None:
    script = """if True:
        import mmap, os, signal, threading
        from pathlib import Path
        from weightcache._engine import checksum

        def resident():
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

        def interrupt():
            while resident() < base + (64 << 20):
                pass
            os.kill(os.getpid(), signal.SIGINT)

        fd = os.memfd_create("zeroes")
        os.truncate(fd, 2 << 30)
        content = mmap.mmap(fd, 2 << 30)  # each page becomes resident when it is summed
        base = resident()
        threading.Thread(target=interrupt).start()
        try:
            checksum(content)
        except KeyboardInterrupt:
            print("interrupted", "early" if resident() < base + len(content) // 2 else "late")
    """
    done = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("interrupted early\n", "")
