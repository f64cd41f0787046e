"""Own the data plane: kept connections to the hosts of one origin, plain and TLS, direct and through proxies.

Never signs, never retries, and never dials a host that neither the origin nor the configuration names.
"""

from __future__ import annotations

import asyncio
import base64
import re
import socket
import ssl
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from weightcache._version import __version__
from weightcache.errors import AccessDeniedError, ConfigError, OriginError, TransientOriginError, WeightcacheError
from weightcache.ledger import Ledger
from weightcache.origins.answers import Answer
from weightcache.origins.connection import ClosedIdleError, Connection, Judge
from weightcache.origins.pace import Throttle

N_REDIRECTS = 5
REFUSAL_NBYTES = 64 << 10  # of an error's body, most that is read
LONGEST_DIAL_S = 3.0  # to one address, where there are more
WATCH_S = 0.1
# What may go to a host that the origin did not name.
PLAIN_HEADERS = ("range", "if-match", "if-unmodified-since")
REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True, slots=True)
class Host:
    """A host as it is dialled."""

    scheme: str
    name: str
    port: int

    @property
    def authority(self) -> str:
        """What requests name as Host, and errors name it by."""
        name = f"[{self.name}]" if ":" in self.name else self.name
        return name if self.port == (443 if self.scheme == "https" else 80) else f"{name}:{self.port}"


@dataclass(frozen=True, slots=True)
class Wiring:
    """How hosts are reached.

    Attributes:
        patience_s: Longest silence on a connection, and longest time to get one.
        verify: Whether certificates are checked, or the file or folder of those that are trusted.
        proxies: By scheme, `http://[user:password@]host:port`; None means as the environment says.
        redirect_hosts: Hosts beside the origin's own that redirects may lead to; they get no credentials.
        check_redirect: Raises what forbids bytes to come from such a host.
        check_region: Raises what forbids bytes to come from a region that S3 leads to.
    """

    patience_s: float
    verify: bool | str | Path = True
    proxies: Mapping[str, str] | None = None
    redirect_hosts: Collection[str] = ()
    check_redirect: Callable[[Host], object] = lambda host: None
    check_region: Callable[[str], object] = lambda region: None


@lru_cache(maxsize=8)
def _tls(verify: bool | str) -> ssl.SSLContext:
    """Make a TLS context; reading the trusted certificates takes some 20 ms."""
    try:
        if not isinstance(verify, str):
            context = ssl.create_default_context()
        else:
            is_folder = Path(verify).is_dir()
            context = ssl.create_default_context(
                cafile=None if is_folder else verify, capath=verify if is_folder else None
            )
    except OSError as exc:
        raise ConfigError(f"the certificates in {verify} cannot be read ({exc.strerror or exc})") from exc
    if verify is False:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    return context


class Plane:
    """Connections to the hosts of one origin. All methods run on the loop thread, and may run concurrently.

    Args:
        uri: The origin's name, for errors.
        wiring: How hosts are reached.
        ledger: Where requests and bytes of bodies are counted.
        throttle: The bandwidth this process may use.
    """

    def __init__(self, uri: str, wiring: Wiring, ledger: Ledger, throttle: Throttle) -> None:
        self._uri = uri
        self._wiring = wiring
        self._ledger = ledger
        self._throttle = throttle
        self._idle: dict[Host, list[Connection]] = {}
        self._busy: set[Connection] = set()
        self._dialling: set[asyncio.Timeout] = set()
        self._watch: asyncio.TimerHandle | None = None
        self._addresses: dict[tuple[str, int], list[tuple[int, Any]]] = {}
        self._failed: set[tuple[int, Any]] = set()
        self._n_dialled = 0
        self._is_closed = False

    async def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        judge: Judge,
        views: Sequence[memoryview] = (),
        limit_nbytes: int = REFUSAL_NBYTES,
        *,
        is_listing: bool = False,
        body: bytes | memoryview = b"",
    ) -> Answer:
        """Ask a URL, following redirects to hosts that are allowed; see Connection.exchange.

        What writes goes to the first host alone. `is_listing` is said of what stores price like a listing: writes, too.

        Raises:
            TransientOriginError: A failure that is worth another attempt.
            OriginError: A host that is not trusted, or may not be dialled.
        """
        first = host_of(url)
        for _ in range(N_REDIRECTS + 1):
            answer = await self._ask(method, url, headers, judge, views, limit_nbytes, is_listing, body)
            location = answer.get("location") if answer.status in REDIRECTS else None
            if location is None or answer.get("x-amz-bucket-region"):  # S3's way to name a region is s3.py's to take
                return answer
            url, headers = self._redirected(first, url, location, headers)
            if method not in ("GET", "HEAD") and host_of(url) != first:
                raise OriginError(
                    f"{self._uri}: {first.authority} redirects a write to another host: name that as endpoint"
                )
        raise OriginError(
            f"{self._uri}: {first.authority} redirects more than {N_REDIRECTS} times: look at the server's configuration"
        )

    def _redirected(
        self, first: Host, url: str, location: str, headers: Mapping[str, str]
    ) -> tuple[str, Mapping[str, str]]:
        """Return where a redirect leads, and the headers that may go along."""
        try:
            url = urljoin(url, quote(location.encode("latin-1"), safe=string.punctuation))
            host = host_of(url)
        except (ValueError, ConfigError):
            raise OriginError(f"{self._uri}: {first.authority} redirects to what is no URL of a host") from None
        if first.scheme == "https" and host.scheme != "https":
            raise OriginError(
                f"{self._uri}: {first.authority} redirects to {host.authority} without TLS, which is not followed"
            )
        if host.name == first.name and (host.port == first.port or host.scheme != first.scheme):
            return url, headers
        if not {host.name, host.authority} & {each.lower() for each in self._wiring.redirect_hosts}:
            raise OriginError(
                f"{self._uri}: {first.authority} redirects to {host.authority}, which is not configured: name it in "
                "redirect_hosts if bytes may come from there",
                host=host.name,
            )
        self._wiring.check_redirect(host)
        return url, {name: value for name, value in headers.items() if name.lower() in PLAIN_HEADERS}

    async def _ask(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        judge: Judge,
        views: Sequence[memoryview],
        limit_nbytes: int,
        is_listing: bool,
        body: bytes | memoryview,
    ) -> Answer:
        host = host_of(url)
        proxy = self._proxy_for(host)
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        ours = {"User-Agent": f"weightcache/{__version__}", "Accept": "*/*", "Accept-Encoding": "identity"}
        if body or method == "PUT":
            ours["Content-Length"] = str(len(body))
        theirs = {name.lower() for name in headers}
        given = [*((name, value) for name, value in ours.items() if name.lower() not in theirs), *headers.items()]
        if proxy is not None and host.scheme == "http":
            target = f"http://{host.authority}{target}"
            given += _authorization(proxy)
        if self._is_closed:
            raise TransientOriginError(f"the connections to {host.authority} were closed")
        connection = self._take_idle(host) or await self._dial(host, proxy)
        if self._is_closed or not connection.is_idle:
            connection.abort()
            raise TransientOriginError(f"the connection to {host.authority} was closed at once")
        self._busy.add(connection)
        self._begin_watch()
        if is_listing:
            self._ledger.n_lists += 1
        else:
            self._ledger.n_gets += 1
        try:
            answer = await connection.exchange(method, target, given, views, judge, limit_nbytes, body)
        except ClosedIdleError:
            for kept in self._idle.pop(host, ()):  # as old, and likely to be closed, too
                kept.abort()
            raise
        finally:
            self._busy.discard(connection)
        if connection.is_idle:  # never so after close()
            self._idle.setdefault(host, []).append(connection)
        if proxy is not None and host.scheme == "http" and answer.status in (407, 502, 504):
            raise self._refused_by_proxy(host, proxy, answer.status)
        return answer

    def _take_idle(self, host: Host) -> Connection | None:
        kept = self._idle.get(host, [])
        while kept:
            connection = kept.pop()
            if connection.is_idle:
                return connection
        return None

    def drop(self) -> None:
        """Break off what is under way; it fails like a broken connection, with what had come."""
        for connection in list(self._busy):
            connection.fail(TransientOriginError("left for a faster replica", is_left=True))
        for patience in self._dialling:
            if not patience.expired():
                patience.reschedule(0.0)  # which is over

    async def close(self) -> None:
        """Close all connections; what is under way fails. May be called twice."""
        self._is_closed = True
        connections = [*self._busy, *(connection for kept in self._idle.values() for connection in kept)]
        self._idle.clear()
        for connection in connections:
            connection.abort()
        for connection in connections:
            await connection.wait_closed()
        if self._watch is not None:
            self._watch.cancel()

    # -- stalls

    def _begin_watch(self) -> None:
        if self._watch is None:
            self._watch = asyncio.get_running_loop().call_later(WATCH_S, self._look)

    def _look(self) -> None:
        self._watch = None
        now = asyncio.get_running_loop().time()
        for connection in list(self._busy):
            connection.check_progress(now, self._wiring.patience_s)
        if self._busy:
            self._begin_watch()

    # -- dialling

    def _proxy_for(self, host: Host) -> str | None:
        """Return the URL of the proxy to a host, if there is one. Raises ConfigError."""
        given = self._wiring.proxies
        if given is None:
            if proxy_bypass(f"{host.name}:{host.port}"):
                return None
            given = getproxies()
        proxy = given.get(host.scheme) or given.get("all")
        if not proxy:
            return None
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        if not proxy.startswith("http://"):
            raise ConfigError(
                f"{self._uri}: the proxy for {host.scheme} has scheme {proxy.partition(':')[0]!r}: expected http"
            )
        return proxy

    def _refused_by_proxy(self, host: Host, proxy: str, status: int) -> WeightcacheError:
        """Return the error for a status that is the proxy's own."""
        what = f"the proxy {host_of(proxy).authority} to {host.authority}"
        if status == 407:
            return AccessDeniedError(
                f"{self._uri}: {what} wants other credentials ({status}): name it as http://user:password@host:port",
                uri=self._uri,
                status=status,
            )
        return TransientOriginError(f"{what} answered {status}", status=status)

    async def _dial(self, host: Host, proxy: str | None) -> Connection:
        """Open a connection, through a proxy where there is one."""
        loop = asyncio.get_running_loop()
        what = host.authority if proxy is None else f"{host.authority} through the proxy {host_of(proxy).authority}"
        sock: socket.socket | None = None
        patience, began = asyncio.timeout(self._wiring.patience_s), loop.time()
        self._dialling.add(patience)
        try:
            async with patience:
                near = host if proxy is None else host_of(proxy)
                sock = await self._connect(near)
                if proxy is not None and host.scheme == "https":
                    status = await _tunnel(sock, host, proxy)
                    if status != 200:
                        raise self._refused_by_proxy(host, proxy, status)
                verify = self._wiring.verify
                tls = _tls(verify if isinstance(verify, bool) else str(verify)) if host.scheme == "https" else None
                _, connection = await loop.create_connection(
                    lambda: Connection(host.authority, self._received, self._throttle.piece_nbytes),
                    sock=sock,
                    ssl=tls,
                    server_hostname=host.name if tls else None,
                )
                return connection
        except ssl.SSLCertVerificationError as exc:
            _close(sock)
            raise OriginError(
                f"{self._uri}: the certificate of {host.authority} is not trusted ({exc.verify_message}): give the file of its "
                "authority by storage_options (verify), or AWS_CA_BUNDLE or SSL_CERT_FILE"
            ) from exc
        except TimeoutError as exc:
            _close(sock)
            raise TransientOriginError(f"no connection to {what} in {loop.time() - began:.1f} s") from exc
        except UnicodeError as exc:
            raise ConfigError(f"{self._uri}: {what} is no name of a host") from exc
        except (OSError, ssl.SSLError, EOFError) as exc:
            _close(sock)
            raise TransientOriginError(f"no connection to {what}: {type(exc).__name__}: {exc}") from exc
        except BaseException:
            _close(sock)
            raise
        finally:
            self._dialling.discard(patience)

    async def _connect(self, host: Host) -> socket.socket:
        """Connect to one of a host's addresses; connections are spread over them, and the next is tried after a failure."""
        loop = asyncio.get_running_loop()
        key = (host.name, host.port)
        if key not in self._addresses:
            found = await loop.getaddrinfo(host.name, host.port, type=socket.SOCK_STREAM)
            self._addresses[key] = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
        # Those that failed come last; the others take turns.
        failed = [each for each in self._addresses[key] if each in self._failed]
        fine = [each for each in self._addresses[key] if each not in self._failed]
        turn = self._n_dialled % max(1, len(fine))
        self._n_dialled += 1
        addresses = [*fine[turn:], *fine[:turn], *failed]
        failure: Exception = OSError(f"{host.name} has no address")
        for number, (family, address) in enumerate(addresses):
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                async with asyncio.timeout(LONGEST_DIAL_S if number + 1 < len(addresses) else None):
                    await loop.sock_connect(sock, address)
                return sock
            except (OSError, TimeoutError) as exc:
                sock.close()
                failure = exc
                self._failed.add((family, address))
            except BaseException:
                sock.close()
                raise
        self._addresses.pop(key, None)  # the name may mean other addresses by now
        raise failure

    def _received(self, nbytes: int) -> float:
        self._ledger.received_bytes += nbytes
        return self._throttle.pause_s(nbytes)


async def _tunnel(sock: socket.socket, host: Host, proxy: str) -> int:
    """Have a proxy connect a socket on to a host; return its status. Raises OSError."""
    loop = asyncio.get_running_loop()
    target = f"{host.name}:{host.port}" if ":" not in host.name else f"[{host.name}]:{host.port}"
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    lines += [f"{name}: {value}" for name, value in _authorization(proxy)]
    await loop.sock_sendall(sock, ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        piece = await loop.sock_recv(sock, 1)  # what follows is the host's, not the proxy's
        if not piece or len(answer) > 8192:
            raise OSError("the proxy did not answer CONNECT")
        answer += piece
    status = answer.split(b" ", 2)[1:2]
    if not status or not re.fullmatch(rb"\d{3}", status[0]):
        raise OSError("the proxy's answer to CONNECT is not HTTP")
    return int(status[0])


def _authorization(proxy: str) -> list[tuple[str, str]]:
    parts = urlsplit(proxy)
    if parts.username is None:
        return []
    given = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return [("Proxy-Authorization", "Basic " + base64.b64encode(given.encode()).decode())]


def host_of(url: str) -> Host:
    """Return whom a URL names. Raises ConfigError, which does not repeat it: it may hold a password."""
    try:
        parts = urlsplit(url)
        scheme, name, port = parts.scheme, parts.hostname, parts.port
    except ValueError:
        raise ConfigError("expected a URL of http or https, got one whose host or port cannot be read") from None
    if scheme not in ("http", "https") or not name:
        raise ConfigError(f"expected a URL of http or https with a host, got scheme {scheme!r}")
    return Host(scheme, name, port or (443 if scheme == "https" else 80))


def _close(sock: socket.socket | None) -> None:
    if sock is not None:
        sock.close()
