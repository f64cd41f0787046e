"""Own plain web folders: http and https, listed by their links, or where there are none by the names checkpoints use.

Never carries a body: that is plane.py's.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

from weightcache.errors import (
    AccessDeniedError,
    ConfigError,
    FormatError,
    ModelNotFoundError,
    OriginChangedError,
    OriginError,
    TransientOriginError,
    nearest,
)
from weightcache.ledger import Ledger
from weightcache.manifest import check_paths
from weightcache.origins.answers import Answer, is_part, refusal
from weightcache.origins.base import Small, Stat
from weightcache.origins.pace import Throttle
from weightcache.origins.plane import Plane, Wiring
from weightcache.runtime import all_of

Listed = list[Stat]  # `list` is a method below
OPTIONS = ("headers", "verify", "proxies")
# Each request has its own.
OUR_HEADERS = (
    "accept-encoding",
    "connection",
    "content-length",
    "host",
    "if-match",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "range",
    "transfer-encoding",
)
INDEX = "model.safetensors.index.json"
# Asked for by name where a server lists nothing.
WELL_KNOWN = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
SAFE = "/%:@!$&'()*+,;=~"  # what a path may hold as it is, escapes included
PAGE_NBYTES = 4 << 20  # of one folder's page, most that is read
N_LISTED = 10_000  # files below one folder, at most
N_FOLDERS = 100
N_ASKED = 16  # files looked at together


class WebOrigin:
    """A folder behind a web server.

    Args:
        uri: Its URL.
        storage_options: `headers` (sent to the folder's own host alone), `verify` (the file of a certificate authority,
            or False), `proxies` (by scheme).
        wiring: How hosts are reached, where the options do not say it.
        throttle: The bandwidth this process may use.
        file: The one file of the folder that counts, if one was named.

    Raises:
        ConfigError: Options that mean nothing here.
    """

    def __init__(
        self,
        uri: str,
        storage_options: Mapping[str, Any],
        wiring: Wiring,
        throttle: Throttle,
        file: str | None = None,
    ) -> None:
        for name in storage_options:
            if name not in OPTIONS:
                raise ConfigError(
                    f"storage_options[{name!r}] means nothing for {urlsplit(uri).scheme}: expected some of "
                    f"{', '.join(OPTIONS)}{nearest(name, OPTIONS)}"
                )
        self._uri = uri
        parts = urlsplit(uri)
        self._address = urlunsplit(parts._replace(path=quote(parts.path, safe=SAFE)))
        self._file = file
        self._headers = _checked(storage_options.get("headers") or {})
        self.ledger = Ledger()
        verify, proxies = storage_options.get("verify"), storage_options.get("proxies")
        wiring = replace(
            wiring,
            verify=wiring.verify if verify is None else verify,
            proxies=wiring.proxies if proxies is None else proxies,
        )
        self._plane = Plane(uri, wiring, self.ledger, throttle)
        self._asking = asyncio.Semaphore(N_ASKED)

    @property
    def ledgers(self) -> Sequence[Ledger]:
        return [self.ledger]

    @property
    def uri(self) -> str:
        return self._uri

    async def list(self) -> Sequence[Stat]:
        names = [self._file] if self._file is not None else sorted(await self._linked())
        found, denied = await self._look_at(names)
        if not found and self._file is None:
            found, denied = await self._look_at(WELL_KNOWN)
            if any(stat.path == INDEX for stat in found):
                more, _ = await self._look_at(await self._shards_named())
                found += [stat for stat in more if stat not in found]
        if not found and denied is not None:
            raise denied
        if not found:
            raise ModelNotFoundError(
                f"nothing at {self._uri}: expected a folder with safetensors; check the name", uri=self._uri
            )
        return found

    async def read_into(self, stat: Stat, start: int, views: Sequence[memoryview]) -> None:
        stop = start + sum(len(view) for view in views)
        if start == stop:
            return
        headers = {**self._headers, "Range": f"bytes={start}-{stop - 1}"}
        if stat.etag.startswith('"'):
            headers["If-Match"] = stat.etag
        elif stat.etag and not _is_tag(stat.etag):
            headers["If-Unmodified-Since"] = stat.etag
        answer = await self._plane.request(
            "GET",
            self._url(stat.path),
            headers,
            lambda answer: is_part(
                answer, stat, start, stop, answer.get("etag" if _is_tag(stat.etag) else "last-modified")
            ),
            views,
        )
        if answer.status >= 300:
            raise self._refusal(answer, stat.path)

    async def get(self, name: str, limit_nbytes: int) -> Small:
        url = self._url(name)
        answer = await self._plane.request("GET", url, self._headers, _is_no_data, limit_nbytes=limit_nbytes)
        if answer.status >= 300:
            raise self._refusal(answer, name)
        if len(answer.body) > limit_nbytes:
            raise FormatError(f"{url} has more than {limit_nbytes} bytes")
        return Small(answer.body, answer.get("etag") or "")

    async def check_unchanged(self, stats: Sequence[Stat]) -> None:
        """Look at those again whose state no request can name."""
        unnamed = [stat for stat in stats if not stat.etag]
        found, _ = await self._look_at([stat.path for stat in unnamed])
        for stat in unnamed:
            if stat not in found:
                raise OriginChangedError(
                    f"{self._uri}/{stat.path} changed while it was read; load again when its writer is done"
                )

    def drop(self) -> None:
        self._plane.drop()

    async def close(self) -> None:
        await self._plane.close()

    # -- listing

    async def _linked(self) -> set[str]:
        """Return the names of all files that the folder's pages link to; none where it has no page."""
        names: set[str] = set()
        folders, seen = [""], {""}
        while folders:
            folder = folders.pop()
            for link in await self._links(folder):
                if link.endswith("/") and link not in seen:
                    seen.add(link)
                    folders.append(link)
                elif not link.endswith("/"):
                    names.add(link)
            if len(names) > N_LISTED or len(seen) > N_FOLDERS:
                raise OriginError(
                    f"{self._uri} lists more than {N_LISTED} files or {N_FOLDERS} folders: name the model's own folder",
                    uri=self._uri,
                )
        return names

    async def _links(self, folder: str) -> set[str]:
        """Return what one page links to below the folder."""
        url = self._url(folder)
        answer = await self._plane.request(
            "GET", url, self._headers, _is_no_data, limit_nbytes=PAGE_NBYTES, is_listing=True
        )
        if len(answer.body) > PAGE_NBYTES:
            raise OriginError(f"the page of {url} has more than {PAGE_NBYTES} bytes: name the model's own folder")
        if answer.status >= 300:
            if answer.status in (404, 403, 405, 410) and not folder:
                return set()
            raise self._refusal(answer, folder)
        base = urlsplit(self._url(""))
        top, found = unquote(base.path), set()
        for href in _hrefs(answer.body.decode("utf-8", "replace")):
            try:
                link = urlsplit(urljoin(url, href))
            except ValueError:
                continue
            path = unquote(link.path)
            if (link.scheme, link.netloc) == (base.scheme, base.netloc) and path.startswith(top):
                found.add(path.removeprefix(top))
        return found - {"", folder}

    async def _look_at(self, names: Iterable[str]) -> tuple[Listed, AccessDeniedError | None]:
        """Ask for size and state of each file; those that are not there are left out."""
        denied: list[AccessDeniedError] = []

        async def look(name: str) -> Stat | None:
            async with self._asking:
                answer = await self._plane.request("HEAD", self._url(name), self._headers, _is_no_data)
            if answer.status < 300:
                return self._stat(name, answer)
            error = self._refusal(answer, name)
            if isinstance(error, AccessDeniedError):
                denied.append(error)  # stores that list nothing say so of what is not there, too
            elif not isinstance(error, ModelNotFoundError):
                raise error
            return None

        found = await all_of(look(name) for name in names)
        return [stat for stat in found if stat is not None], denied[0] if denied else None

    def _stat(self, name: str, answer: Answer) -> Stat:
        nbytes = answer.content_length
        if answer.status != 200 or nbytes is None or answer.get("transfer-encoding"):
            raise ModelNotFoundError(
                f"{self._uri}/{name}: the server does not say its size (Content-Length), so no range of it can be "
                "planned; serve it from a server that does",
                uri=self._uri,
            )
        return Stat(name, nbytes, answer.get("etag") or answer.get("last-modified") or "")

    async def _shards_named(self) -> Sequence[str]:
        """Return the files that an index names, if it is one; what is wrong with it, checkpoint.py says."""
        answer = await self._plane.request(
            "GET", self._url(INDEX), self._headers, _is_no_data, limit_nbytes=PAGE_NBYTES
        )
        try:
            named = sorted({str(name) for name in json.loads(answer.body)["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return []
        check_paths(named)
        return named

    def _url(self, name: str) -> str:
        return f"{self._address}/{quote(name)}"

    def _refusal(self, answer: Answer, name: str) -> Exception:
        return refusal(answer.status, f"{self._uri}/{name}".rstrip("/"), "", answer.retry_after_s)


def _checked(headers: Mapping[str, str]) -> Mapping[str, str]:
    """Return headers that can be sent. Raises ConfigError, which never repeats a value: it may be a secret."""
    for name, value in headers.items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", str(name)) or str(name).lower() in OUR_HEADERS:
            raise ConfigError(
                f"storage_options['headers'] has {str(name)!r:.80}: expected the name of a header of your own"
            )
        if not re.fullmatch(r"[!-~]([ \t!-~]*[!-~])?|", str(value)):
            raise ConfigError(
                f"storage_options['headers'][{name!r}] cannot be sent: expected printable ASCII, without a line end or "
                "space around it"
            )
    return {str(name): str(value) for name, value in headers.items()}


def _is_no_data(answer: Answer) -> bool:
    if answer.status < 300 and (answer.get("content-encoding") or "identity").lower() != "identity":
        raise TransientOriginError(f"asked for a plain page, got one in {answer.get('content-encoding')!r:.40}")
    return False


def _is_tag(state: str) -> bool:
    return state.startswith(('"', 'W/"'))


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def _hrefs(page: str) -> list[str]:
    parser = _Links()
    try:
        parser.feed(page)
    except AssertionError:  # how Python 3.11 takes "<![x["
        pass
    return parser.found
