"""Own the faults of the hostile server, by name: each gets the honest answer and the peer, and writes something else.

Never decides which request gets a fault, nor what a client should make of it: that is the table in test_hostile.py.
"""

from __future__ import annotations

import asyncio
import gzip
import re
from collections.abc import Callable

from hostile import Answer, Fault, Peer
from wire import LAST_CHUNK, chunk

FAULTS: dict[str, Fault] = {}

EXTRA_BYTES = 1024
FLOOD_BYTES = 160 << 20  # what no client may keep of an answer that should be small
PIECE_BYTES = 1 << 20
TICK_S = 0.1
BYTES_PER_TICK = 10  # 100 bytes/s: not silent, and of no use

STATUSES = {
    "400": ("Bad Request", "InvalidRequest"),
    "401": ("Unauthorized", "Unauthorized"),
    "403": ("Forbidden", "AccessDenied"),
    "404": ("Not Found", "NoSuchKey"),
    "408": ("Request Timeout", "RequestTimeout"),
    "412": ("Precondition Failed", "PreconditionFailed"),
    "416": ("Range Not Satisfiable", "InvalidRange"),
    "429": ("Too Many Requests", "TooManyRequests"),
    "500": ("Internal Server Error", "InternalError"),
    "503": ("Service Unavailable", "SlowDown"),
    "504": ("Gateway Timeout", "GatewayTimeout"),
}


def edit(name: str) -> Callable[[Callable[[Answer], None]], None]:
    """Register a change of the honest answer, which is then sent as it is."""

    def register(change: Callable[[Answer], None]) -> None:
        async def fault(answer: Answer, peer: Peer) -> None:
            change(answer)
            await peer.answer(answer)

        FAULTS[name] = fault

    return register


def write(name: str) -> Callable[[Fault], Fault]:
    """Register a fault that writes for itself."""

    def register(fault: Fault) -> Fault:
        FAULTS[name] = fault
        return fault

    return register


def refuse(answer: Answer, status: str, *, retry_after: str | None = None) -> None:
    """Become an S3 error."""
    reason, code = STATUSES[status]
    answer.head.start = f"HTTP/1.1 {status} {reason}"
    for name in ("Content-Range", "ETag"):
        answer.head.remove(name)
    answer.head.set("Content-Type", "application/xml")
    if retry_after:
        answer.head.set("Retry-After", retry_after)
    answer.replace_body(f"<Error><Code>{code}</Code><Message>hostile server</Message></Error>".encode())


for _status in STATUSES:
    edit(_status)(lambda answer, status=_status: refuse(answer, status))  # type: ignore[misc]
edit("429-retry-after-1")(lambda answer: refuse(answer, "429", retry_after="1"))
edit("503-retry-after-1h")(lambda answer: refuse(answer, "503", retry_after="3600"))
edit("503-retry-after-garbage")(lambda answer: refuse(answer, "503", retry_after="-1e999 soon"))


def html_page(answer: Answer, status: str) -> None:
    """Become what a gateway or a captive portal says."""
    answer.head.start = f"HTTP/1.1 {status}"
    answer.head.remove("Content-Range")
    answer.head.set("Content-Type", "text/html")
    answer.replace_body(b"<!DOCTYPE html><html><body><h1>Please log in</h1></body></html>")


edit("502-html")(lambda answer: html_page(answer, "502 Bad Gateway"))
edit("200-html")(lambda answer: html_page(answer, "200 OK"))


@edit("200-whole")
def _(answer: Answer) -> None:
    answer.head.start = "HTTP/1.1 200 OK"
    answer.head.remove("Content-Range")
    answer.replace_body(answer.whole)


@edit("200-range")  # the right bytes, but nothing says so
def _(answer: Answer) -> None:
    answer.head.start = "HTTP/1.1 200 OK"
    answer.head.remove("Content-Range")


@edit("204")
def _(answer: Answer) -> None:
    answer.head.start = "HTTP/1.1 204 No Content"
    answer.head.remove("Content-Length")
    answer.body = b""


# -- redirects


def redirect(answer: Answer, peer: Peer, status: str, host: str = "") -> None:
    """Send the client elsewhere, to the same path."""
    assert peer.exchange is not None
    refuse(answer, "403")
    answer.head.start = f"HTTP/1.1 {status}"
    answer.head.set("Location", (host or peer.trap) + peer.exchange.path)


for _status in ("301 Moved Permanently", "302 Found", "307 Temporary Redirect"):

    @write(f"{_status[:3]}-other-host")
    async def _(answer: Answer, peer: Peer, status: str = _status) -> None:
        redirect(answer, peer, status)
        answer.head.set("x-amz-bucket-region", "eu-north-1")
        await peer.answer(answer)


@edit("302-loop")
def _(answer: Answer) -> None:
    refuse(answer, "403")
    answer.head.start = "HTTP/1.1 302 Found"
    answer.head.set("Location", f"?again={answer.n_before}")


# -- ranges


def content_range(name: str, spelt: Callable[[Answer], str | None]) -> None:
    """Register a 206 of the right bytes whose Content-Range says something else, or is not there."""

    def change(answer: Answer) -> None:
        value = spelt(answer)
        answer.head.remove("Content-Range")
        if value is not None:
            answer.head.set("Content-Range", value)

    edit(name)(change)


content_range("206-no-content-range", lambda answer: None)
content_range("206-wrong-total", lambda a: f"bytes {a.start}-{a.stop - 1}/{len(a.whole) + 1}")
content_range("206-content-range-garbage", lambda a: f"bites {a.start}-{a.stop - 1}/{len(a.whole)}")
content_range("206-content-range-backwards", lambda a: f"bytes {a.stop - 1}-{a.start}/{len(a.whole)}")
content_range("206-content-range-exclusive", lambda a: f"bytes {a.start}-{a.stop}/{len(a.whole)}")
edit("206-shifted-later")(lambda a: a.give(a.start + 1, min(a.stop + 1, len(a.whole))))
edit("206-shifted-earlier")(lambda a: a.give(max(a.start - 1, 0), a.stop - 1))
edit("206-elsewhere")(lambda a: a.give(0, len(a.body)) if a.start else a.give(EXTRA_BYTES, EXTRA_BYTES + a.stop))
edit("206-fewer")(lambda a: a.give(a.start, a.start + len(a.body) // 2))
edit("206-more")(lambda a: a.give(max(a.start - EXTRA_BYTES, 0), min(a.stop + EXTRA_BYTES, len(a.whole))))


@edit("206-multipart")
def _(answer: Answer) -> None:
    part = f"--x\r\nContent-Range: {answer.head.get('Content-Range')}\r\n\r\n".encode()
    answer.head.remove("Content-Range")
    answer.head.set("Content-Type", "multipart/byteranges; boundary=x")
    answer.replace_body(part + answer.body + b"\r\n--x--\r\n")


# -- bodies and their lengths


@write("short")
async def _(answer: Answer, peer: Peer) -> None:
    await peer.send_head(answer)
    await peer.send_body(answer.body[: len(answer.body) // 2])
    await peer.close()


@write("short-reset")
async def _(answer: Answer, peer: Peer) -> None:
    await peer.send_head(answer)
    await peer.send_body(answer.body[: len(answer.body) // 2])
    peer.cut(by_reset=True)


@write("short-without-close-notify")
async def _(answer: Answer, peer: Peer) -> None:
    await peer.send_head(answer)
    await peer.send_body(answer.body[: len(answer.body) // 2])
    peer.cut()


@write("short-without-length")  # only the connection's end says where it ends, and that comes early
async def _(answer: Answer, peer: Peer) -> None:
    answer.head.remove("Content-Length")
    await peer.send_head(answer)
    await peer.send_body(answer.body[: len(answer.body) // 2])
    await peer.close()


@write("long")
async def _(answer: Answer, peer: Peer) -> None:
    answer.body += bytes(EXTRA_BYTES)
    await peer.answer(answer)


@write("long-announced")
async def _(answer: Answer, peer: Peer) -> None:
    answer.replace_body(answer.body + bytes(EXTRA_BYTES))
    await peer.answer(answer)


@write("length-missing")
async def _(answer: Answer, peer: Peer) -> None:
    answer.head.remove("Content-Length")
    await peer.answer(answer)
    await peer.close()


@edit("length-missing-in-head")
def _(answer: Answer) -> None:
    answer.head.remove("Content-Length")


def announced(name: str, spelt: Callable[[int], str], *, ends: bool = False) -> None:
    """Register the right body under another Content-Length; the connection ends behind it where that hides nothing."""

    async def fault(answer: Answer, peer: Peer) -> None:
        answer.head.set("Content-Length", spelt(len(answer.body)))
        await peer.answer(answer)
        if ends:
            await peer.close()

    FAULTS[name] = fault


announced("length-negative", lambda n: f"-{n}")
announced("length-huge", lambda n: str(1 << 62), ends=True)
announced("length-overflowing", lambda n: "9" * 5000, ends=True)
announced("length-garbage", lambda n: f"{n} bytes")
announced("length-plus", lambda n: f"+{n}")
announced("length-list", lambda n: f"{n}, {n + 1}")


@edit("length-twice")
def _(answer: Answer) -> None:
    answer.head.headers.append(("Content-Length", str(len(answer.body) // 2)))


async def send_chunked(answer: Answer, peer: Peer, *, stop: int | None = None) -> None:
    """Send the body in chunked framing, up to `stop` and without an end if one is given."""
    answer.head.set("Transfer-Encoding", "chunked")
    await peer.send_head(answer)
    if answer.method == "HEAD":
        return
    body = answer.body[:stop]
    for start in range(0, len(body), 100_000):
        size_line, piece, line_end = chunk(body[start : start + 100_000])
        await peer.send(size_line)
        await peer.send_body(piece)
        await peer.send(line_end)
    if stop is None:
        await peer.send(LAST_CHUNK)


@write("chunked")
async def _(answer: Answer, peer: Peer) -> None:
    answer.head.remove("Content-Length")
    await send_chunked(answer, peer)


@write("chunked-and-length")
async def _(answer: Answer, peer: Peer) -> None:
    await send_chunked(answer, peer)


@write("chunked-unfinished")
async def _(answer: Answer, peer: Peer) -> None:
    answer.head.remove("Content-Length")
    await send_chunked(answer, peer, stop=len(answer.body) // 2)
    await peer.close()


@write("chunked-garbage")
async def _(answer: Answer, peer: Peer) -> None:
    answer.head.remove("Content-Length")
    await send_chunked(answer, peer, stop=len(answer.body) // 2)
    await peer.send(b"-5\r\nzz\r\n")
    await peer.send_body(answer.body[len(answer.body) // 2 :])
    await peer.close()


@write("chunked-huge")
async def _(answer: Answer, peer: Peer) -> None:
    answer.head.remove("Content-Length")
    answer.head.set("Transfer-Encoding", "chunked")
    await peer.send_head(answer)
    await peer.send(b"f" * 16 + b"\r\n")
    await peer.send_body(answer.body)
    await peer.close()


@edit("gzip")
def _(answer: Answer) -> None:
    answer.head.set("Content-Encoding", "gzip")
    answer.replace_body(gzip.compress(answer.body, 1))


@edit("gzip-announced")  # the right bytes, said to be compressed
def _(answer: Answer) -> None:
    answer.head.set("Content-Encoding", "gzip")


@edit("flipped-bit")
def _(answer: Answer) -> None:
    flipped = bytearray(answer.body)
    flipped[len(flipped) // 2] ^= 1
    answer.body = bytes(flipped)


@write("flood")  # a small answer that does not end, with a status that is to be believed
async def _(answer: Answer, peer: Peer) -> None:
    answer.head.remove("Content-Length")
    await peer.send_head(answer)
    await peer.send_body(answer.body)
    for _piece in range(FLOOD_BYTES // PIECE_BYTES):
        await peer.send_body(b" " * PIECE_BYTES)
    await peer.close()


@write("503-flood")
async def _(answer: Answer, peer: Peer) -> None:
    refuse(answer, "503")
    await FAULTS["flood"](answer, peer)


# -- states


@edit("etag-missing")
def _(answer: Answer) -> None:
    answer.head.remove("ETag")


@edit("etag-other")
def _(answer: Answer) -> None:
    answer.head.set("ETag", f'"{0:032x}"')


@edit("etag-changing")
def _(answer: Answer) -> None:
    answer.head.set("ETag", f'"{answer.n_before + 1:032x}"')


@edit("etag-weak")
def _(answer: Answer) -> None:
    answer.head.set("ETag", f"W/{answer.head.get('ETag')}")


# -- heads


@edit("head-of-1mb")
def _(answer: Answer) -> None:
    answer.head.set("X-Filler", "x" * (1 << 20))


@edit("head-of-10000-fields")
def _(answer: Answer) -> None:
    answer.head.headers += [(f"X-Filler-{number}", "x") for number in range(10_000)]


@write("head-flood")
async def _(answer: Answer, peer: Peer) -> None:
    await peer.send(b"HTTP/1.1 206 Partial Content\r\nX-Filler: ")
    for _piece in range(FLOOD_BYTES // PIECE_BYTES):
        await peer.send(b"x" * PIECE_BYTES)
    await peer.close()


@write("head-drip")
async def _(answer: Answer, peer: Peer) -> None:
    await peer.send(b"HTTP/1.1 206 Partial Content\r\n")
    while not peer.reader.at_eof():
        await peer.send(b"X-A: b\r\n"[:BYTES_PER_TICK])
        await asyncio.sleep(TICK_S)


def said(name: str, raw: bytes) -> None:
    """Register bytes that are sent in place of an answer, before the connection ends."""

    async def fault(answer: Answer, peer: Peer) -> None:
        await peer.send(raw)
        await peer.close()

    FAULTS[name] = fault


said("status-line-garbage", b"HTTP/1.1 two hundred OK\r\nContent-Length: 2\r\n\r\nok")
said("http-0.9", b"<html>just a body</html>")
said("http-2", b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n")
said("binary-garbage", bytes(range(256)) * 64)
said("tls-garbage", b"\x16\x03\x03\x40\x00" + bytes(range(256)) * 64)
said("tls-is-plain-http", b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


@write("head-bare-lf")
async def _(answer: Answer, peer: Peer) -> None:
    await peer.send(answer.head.encode().replace(b"\r\n", b"\n"))
    await peer.send_body(answer.body)
    await peer.close()


@write("100-continue")
async def _(answer: Answer, peer: Peer) -> None:
    await peer.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </>\r\n\r\n")
    await peer.answer(answer)


@write("1xx-flood")
async def _(answer: Answer, peer: Peer) -> None:
    for _batch in range(20):
        await peer.send(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000)
    await peer.close()


@write("1xx-drip")
async def _(answer: Answer, peer: Peer) -> None:
    while not peer.reader.at_eof():
        await peer.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await asyncio.sleep(TICK_S)


# -- connections


@write("closed")
async def _(answer: Answer, peer: Peer) -> None:
    await peer.close()


@write("reset")
async def _(answer: Answer, peer: Peer) -> None:
    peer.cut(by_reset=True)


@write("silent")
async def _(answer: Answer, peer: Peer) -> None:
    await peer.wait_gone()


@write("stall-after-head")
async def _(answer: Answer, peer: Peer) -> None:
    await peer.send_head(answer)
    await peer.wait_gone()


@write("stall-half-way")
async def _(answer: Answer, peer: Peer) -> None:
    await peer.send_head(answer)
    await peer.send_body(answer.body[: len(answer.body) // 2])
    await peer.wait_gone()


@write("trickle")
async def _(answer: Answer, peer: Peer) -> None:
    await peer.send_head(answer)
    for start in range(0, len(answer.body), BYTES_PER_TICK):
        await peer.send_body(answer.body[start : start + BYTES_PER_TICK])
        await asyncio.sleep(TICK_S)


@write("closed-after-answer")  # without a word about it
async def _(answer: Answer, peer: Peer) -> None:
    await peer.answer(answer)
    await peer.close()


@write("answer-behind-the-answer")  # a 206 of zeros for the range that is likely to be asked for next
async def _(answer: Answer, peer: Peer) -> None:
    honest, raw = answer.body, answer.head.encode() + answer.body
    answer.give(answer.stop, min(answer.stop + len(honest), len(answer.whole)))
    peer.writer.write(raw + answer.head.encode() + bytes(len(answer.body)))  # not waited for: the next request is read


# -- listings


def rewrite(name: str, *changes: tuple[str, str]) -> None:
    """Register a listing in which patterns are replaced, in XML and in a page of links alike."""

    def change(answer: Answer) -> None:
        text = answer.body.decode()
        for pattern, replacement in changes:
            text = re.sub(pattern, replacement, text, flags=re.DOTALL)
        answer.replace_body(text.encode())

    edit(name)(change)


def listed(entry: str) -> tuple[str, str]:
    """Return the change that adds one key, spelt as given, to an XML listing."""
    return (
        "</ListBucketResult>",
        f"<Contents><Key>{entry}</Key><ETag>&quot;1&quot;</ETag><Size>9</Size></Contents>\\g<0>",
    )


LOLS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
BOMB = f'<!DOCTYPE x [<!ENTITY l0 "lollollollol">{LOLS}]>'

rewrite("listing-cut", (r"(.*)</ListBucketResult>", r"\1"))
rewrite("listing-not-xml", (".*", "<ListBucketResult><Contents>]]>&&<"))
rewrite("listing-other-xml", (".*", "<Error><Code>Hm</Code></Error>"))
rewrite("listing-bomb", (r"\?>", rf"?>{BOMB}"), listed("model/&l9;"))
rewrite(
    "listing-external-entity",
    (r"\?>", r'?><!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]>'),
    listed("model/&f;"),
)
rewrite(
    "listing-dot-dot",
    listed("model/../../evil.safetensors"),
    ("<ul>", '<ul><a href="..%2f..%2fevil.safetensors">x</a>'),
)
rewrite("listing-absolute", listed("model//etc/evil.safetensors"))
rewrite("listing-other-prefix", listed("elsewhere/evil.safetensors"))
rewrite("listing-nul", listed("model/a%00b"))
rewrite("listing-same-key-twice", (r"<Contents>.*</Contents>", r"\g<0>\g<0>"))
rewrite("listing-cut-short", ("<IsTruncated>false", "<IsTruncated>true"))  # and no token to go on with
rewrite(
    "listing-same-token", ("<IsTruncated>false", "<NextContinuationToken>t</NextContinuationToken><IsTruncated>true")
)
rewrite("listing-empty", (r"<Contents>.*</Contents>", ""), ("<ul>.*</ul>", ""))
rewrite("listing-sizeless", (r"<Size>\d+</Size>", ""))


@edit("listing-endless")  # a new token on each page; a new folder in each folder
def _(answer: Answer) -> None:
    if answer.head.get("Content-Type") == "application/xml":
        token = f"<NextContinuationToken>t{answer.n_before}</NextContinuationToken><IsTruncated>true"
        answer.replace_body(answer.body.decode().replace("<IsTruncated>false", token).encode())
    else:
        answer.head.start = "HTTP/1.1 200 OK"
        answer.head.set("Content-Type", "text/html")
        answer.replace_body(f'<ul><a href="deeper-{answer.n_before}/">x</a></ul>'.encode())


def sized(name: str, spelt: Callable[[int], str]) -> None:
    """Register another size: in a listing's XML, or as the Content-Length of a HEAD."""

    def change(answer: Answer) -> None:
        if answer.method == "HEAD":
            answer.head.set("Content-Length", spelt(len(answer.body)))
        else:
            spell = lambda match: f"<Size>{spelt(int(match[1]))}</Size>"  # noqa: E731
            answer.replace_body(re.sub(r"<Size>(\d+)</Size>", spell, answer.body.decode()).encode())

    edit(name)(change)


sized("size-smaller", lambda n: str(n - 4))
sized("size-larger", lambda n: str(n + 4))
sized("size-zero", lambda n: "0")
sized("size-negative", lambda n: f"-{n}")
sized("size-huge", lambda n: str(1 << 62))
sized("size-overflowing", lambda n: "9" * 5000)
sized("size-garbage", lambda n: f"{n}e3")
sized("size-arabic", lambda n: str(n).translate({48 + digit: 0x0660 + digit for digit in range(10)}))
