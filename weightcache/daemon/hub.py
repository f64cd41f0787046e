"""Own the Hugging Face Hub that unmodified stacks are pointed at: models of this node's configuration, under the Hub's API.

Never answers who came by another name (DNS rebinding), never writes, and opens no path that a request names: files are looked
up among those of a model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from weightcache import registries
from weightcache.config import read_settings
from weightcache.daemon import hubwire
from weightcache.daemon.hubwire import MAIN, Kind, Question
from weightcache.daemon.listening import Listener, is_named_so, listen
from weightcache.daemon.settings import COMMIT, HubSettings, check_model, read_address, read_endpoint, read_repo
from weightcache.daemon.shelf import Shelf
from weightcache.digest import Digest
from weightcache.errors import (
    ConfigError,
    ModelNotFoundError,
    OriginError,
    UriError,
    WeightcacheError,
)
from weightcache.reading import N_COMMIT_DIGITS, ModelFile, OpenModel
from weightcache.session import Request
from weightcache.uri import Name

if TYPE_CHECKING:
    from aiohttp import web

log = logging.getLogger(__name__)

N_BODIES = 16  # sent at the same time; others wait, for less than their clients' patience of 10 s
N_AHEAD = 4  # groups of 16 MiB held for each of them: 1 GiB in all
N_THREADS = N_BODIES + 8
STALL_S = 60.0  # so long a client may take nothing before it is cut off
N_COMMITS = 1000  # that are remembered beside the present ones
HEADERS = {"Cache-Control": "no-cache", "Server": "weightcache", "X-Content-Type-Options": "nosniff"}
STATUS = {
    "not-found": HTTPStatus.NOT_FOUND,
    "access-denied": HTTPStatus.FORBIDDEN,
    "residency": HTTPStatus.FORBIDDEN,
    "signature": HTTPStatus.FORBIDDEN,
    "offline": HTTPStatus.SERVICE_UNAVAILABLE,
    "capacity": HTTPStatus.SERVICE_UNAVAILABLE,
    "deadline": HTTPStatus.GATEWAY_TIMEOUT,
}


class _Refusal(Exception):
    """What is answered instead: a status, the Hub's code for it, and why."""

    def __init__(self, status: HTTPStatus, code: str, message: str, commit: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code} if code else {}
        if commit:  # by which a client remembers that there is no such file
            self.headers["X-Repo-Commit"] = commit


class Hub:
    """The Hub as it answers.

    Args:
        settings: Which repositories there are.
        may_attach: Whether a node daemon may be asked for what it has in host memory; it itself may not.
    """

    def __init__(self, settings: HubSettings, *, may_attach: bool) -> None:
        self.settings = settings
        self._may_attach = may_attach
        self._threads = ThreadPoolExecutor(N_THREADS, "weightcache-hub")
        self._shelf = Shelf(self._open_now, self._on_thread)
        self._commits: dict[tuple[str, str], str] = {}  # the URI that a repository's commit was told for
        self._bodies = asyncio.Semaphore(N_BODIES)
        self._listener: Listener | None = None

    async def serve(self, address: tuple[str, int]) -> int:
        """Serve on this loop until it is closed; port 0 takes a free one. Returns the port.

        Raises:
            ConfigError: aiohttp is not installed, or nobody can listen there.
        """

        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            try:
                if not is_named_so(request.headers.getall("Host", []), address[0]):
                    what = "not by this name: ask for localhost, or for the address that is listened at"
                    raise _Refusal(HTTPStatus.MISDIRECTED_REQUEST, "", what)
                return await self._answer(request)
            except _Refusal as refusal:
                return _refuse(refusal)
            except WeightcacheError as exc:
                log.warning("%s: %s", request.path[:200], exc)
                is_passing = isinstance(exc, OriginError)
                status = STATUS.get(exc.code, HTTPStatus.BAD_GATEWAY if is_passing else HTTPStatus.UNPROCESSABLE_ENTITY)
                return _refuse(_Refusal(status, "RepoNotFound" if exc.code == "not-found" else "", str(exc)))

        self._listener = await listen("the Hub face", address, answer)
        return self._listener.port

    async def close(self) -> None:
        """Stop listening, and close all connections and models. May be called twice."""
        if self._listener is not None:
            await self._listener.close()
        await self._shelf.close()
        self._threads.shutdown(wait=False)

    # -- what is asked

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        raw_path = request.raw_path.partition("?")[0]
        if raw_path == "/api/whoami-v2":
            raise _Refusal(
                HTTPStatus.UNAUTHORIZED, "", "nobody is known here, and nobody needs to be: leave the token out"
            )
        question = hubwire.read_question(raw_path)
        if question is None:
            raise _Refusal(
                HTTPStatus.NOT_FOUND, "RepoNotFound", "this Hub has models alone, and answers what reads them"
            )
        allowed = ("POST",) if question.kind is Kind.PATHS else ("GET", "HEAD")
        if request.method not in allowed:
            raise _Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "", f"nothing is written here: ask by {' or '.join(allowed)}")
        async with self._find(question) as (model, commit):
            if question.kind is Kind.FILE:
                return await self._send(request, question, model, commit)
            return _json(await self._tell(request, question, model, commit), commit)

    async def _tell(
        self, request: web.BaseRequest, question: Question, model: OpenModel, commit: str
    ) -> dict[str, Any] | list[dict[str, Any]]:
        files = model.listing.files
        if question.kind is Kind.INFO:
            return hubwire.info_form(question.repo, commit, files, with_sizes="blobs" in request.query)
        if question.kind is Kind.REFS:
            return hubwire.refs_form(commit, await self._tags(question.repo, model.name))
        if question.kind is Kind.PATHS:
            return hubwire.paths_form(files, hubwire.read_paths(await request.read(), request.content_type))
        recursive = request.query.get("recursive", "").lower() in ("true", "1")
        found = hubwire.tree_form(files, question.path, recursive=recursive)
        if found is None:
            raise _no_entry(question, commit)
        return found

    async def _send(
        self, request: web.BaseRequest, question: Question, model: OpenModel, commit: str
    ) -> web.StreamResponse:
        """Send a file, or the range of it that is asked for."""
        from aiohttp import web

        file = next((file for file in model.listing.files if file.path == question.path), None)
        if file is None:
            raise _no_entry(question, commit)
        headers = HEADERS | _headers_of(file, commit)
        try:
            # What was begun of another state must not be gone on with.
            is_same = request.headers.get("If-Range", headers["ETag"]) == headers["ETag"]
            asked = hubwire.read_range(request.headers.get("Range") if is_same else None, file.nbytes)
        except hubwire.UnsatisfiableRange:
            unsatisfied = {"Content-Range": f"bytes */{file.nbytes}"}
            return web.Response(status=HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, headers=headers | unsatisfied)
        start, stop = asked or (0, file.nbytes)
        if asked is not None:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.nbytes}"
        status = HTTPStatus.OK if asked is None else HTTPStatus.PARTIAL_CONTENT
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = stop - start
        response.content_type = "application/octet-stream"
        if request.method == "HEAD":
            await response.prepare(request)
            return response
        async with self._bodies:
            await self._send_body(request, response, model.read(file.path, start, stop, N_AHEAD))
        return response

    async def _send_body(
        self, request: web.BaseRequest, response: web.StreamResponse, pieces: Generator[memoryview, None, None]
    ) -> None:
        taking = threading.Lock()  # when this is cancelled, a thread may still be taking a piece

        def take() -> memoryview | None:
            with taking:
                return next(pieces, None)

        def end() -> None:
            with taking:
                pieces.close()

        try:
            piece = await self._on_thread(take)  # what fails at once is told by a status
            await response.prepare(request)
            while piece is not None:
                async with asyncio.timeout(STALL_S):
                    await response.write(piece)
                piece = await self._on_thread(take)
            await response.write_eof()
        except ConnectionError:
            log.debug("%s: the client left", request.path[:200])
        except (WeightcacheError, TimeoutError) as exc:
            if not response.prepared:
                raise
            log.warning("%s breaks off: %s", request.path[:200], exc or "the client takes nothing")
            if request.transport is not None:
                request.transport.abort()  # it must not be taken for whole
        finally:
            await self._on_thread(end)

    # -- models

    @contextlib.asynccontextmanager
    async def _find(self, question: Question) -> AsyncIterator[tuple[OpenModel, str]]:
        """Yield the model that a question is about, and its commit. Raises _Refusal."""
        repo, revision = question.repo, question.revision
        uri = self.settings.uri_of(repo)
        is_ours = bool(uri)
        if not is_ours and not self.settings.upstream:
            raise _Refusal(HTTPStatus.NOT_FOUND, "RepoNotFound", f"no repository {repo}: it is not among [hub.models]")
        uri = uri or f"hf://{repo}"
        async with self._shelf.open(uri) as model:
            commit = model.listing.commit
            self._note(repo, commit, uri)
            if revision in (MAIN, commit):
                yield model, commit
                return
            name = model.name
        other = self._commits.get((repo, revision)) or await self._uri_of_revision(
            name, repo, revision, is_ours=is_ours
        )
        try:
            async with self._shelf.open(other) as model:
                commit = model.listing.commit
                if COMMIT.fullmatch(revision) and is_ours and commit != revision:
                    raise _no_revision(question)
                # A client that names a commit of the upstream must find it again under that name.
                commit = revision if COMMIT.fullmatch(revision) else commit
                self._note(repo, commit, other)
                yield model, commit
        except (ModelNotFoundError, UriError) as exc:
            raise _no_revision(question) from exc

    async def _uri_of_revision(self, name: Name, repo: str, revision: str, *, is_ours: bool) -> str:
        """Return the URI of a state of a repository that is not its present one. Raises _Refusal."""
        if not hubwire.REVISION.fullmatch(revision):
            raise _no_revision(Question(Kind.INFO, repo, revision))
        if not is_ours:
            return f"hf://{repo}@{revision}"
        if not name.model:
            raise _no_revision(Question(Kind.INFO, repo, revision))
        if not COMMIT.fullmatch(revision):
            return f"{name.root}/{name.model}@{revision}"
        rows = await self._on_thread(registries.revisions, f"{name.root}/{name.model}", {})
        for row in rows:
            if Digest.parse(row.revision).hex.startswith(revision):
                return f"{name.root}/{name.model}@{row.revision}"
        raise _no_revision(Question(Kind.INFO, repo, revision))

    async def _tags(self, repo: str, name: Name) -> list[tuple[str, str]]:
        """Return the tags of a model of a registry, with their commits; none of other models."""
        if not name.model:
            return []
        try:
            rows = await self._on_thread(registries.tags, f"{name.root}/{name.model}", {})
        except WeightcacheError as exc:  # some places cannot be listed: a client needs its branch nevertheless
            log.warning("the tags of %s are not told: %s", repo, exc)
            return []
        return [(row.tag, Digest.parse(row.revision).hex[:N_COMMIT_DIGITS]) for row in rows]

    def _note(self, repo: str, commit: str, uri: str) -> None:
        self._commits.pop((repo, commit), None)
        self._commits[repo, commit] = uri
        while len(self._commits) > N_COMMITS:
            del self._commits[next(iter(self._commits))]

    def _open_now(self, uri: str) -> OpenModel:
        options = {"endpoint": self.settings.upstream} if uri.startswith("hf://") and self.settings.upstream else {}
        return OpenModel(Request(uri, storage_options=options), may_attach=self._may_attach)

    async def _on_thread(self, work: Callable[..., Any], *arguments: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)


def _headers_of(file: ModelFile, commit: str) -> dict[str, str]:
    return {
        "Accept-Ranges": "bytes",
        "ETag": f'"{file.identity}"',
        "X-Linked-Etag": f'"{file.identity}"',
        "X-Linked-Size": str(file.nbytes),
        "X-Repo-Commit": commit,
    }


def _no_entry(question: Question, commit: str) -> _Refusal:
    return _Refusal(HTTPStatus.NOT_FOUND, "EntryNotFound", f"{question.repo} has no {question.path[:200]!r}", commit)


def _no_revision(question: Question) -> _Refusal:
    what = (
        f"{question.repo} has no revision {question.revision[:100]!r}: it has main, and tags where it is in a registry"
    )
    return _Refusal(HTTPStatus.NOT_FOUND, "RevisionNotFound", what)


def _json(form: object, commit: str) -> web.Response:
    from aiohttp import web

    return web.json_response(form, headers=HEADERS | {"X-Repo-Commit": commit})


def _refuse(refusal: _Refusal) -> web.Response:
    from aiohttp import web

    line = "".join(char if " " <= char <= "~" else " " for char in str(refusal))[:1000]
    headers = HEADERS | refusal.headers | {"X-Error-Message": line}
    return web.json_response({"error": line}, status=refusal.status, headers=headers)


def serve(
    models: Mapping[str, str],
    address: str | None,
    upstream: str | None,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until SIGTERM or SIGINT; see `weightcache.serve_hub`."""
    import uvloop

    settings = read_settings().hub or HubSettings()
    try:
        given = {read_repo(repo): check_model(repo, uri) for repo, uri in models.items()}
        at = settings.address if address is None else read_address(address)
        above = settings.upstream if upstream is None else read_endpoint(upstream)
    except ValueError as exc:
        raise ConfigError(f"the Hub face expects {exc}") from exc
    if at is None:
        raise ConfigError("the Hub face needs an address: set one in [hub], or pass it")
    settings = replace(settings, models={**settings.models, **given}, upstream=above)
    if not settings.models and not above:
        raise ConfigError(
            "the Hub face has no repository: name models (--model ORG/NAME=URI, or [hub.models]) or an upstream"
        )

    async def run() -> None:
        ended, loop = asyncio.Event(), asyncio.get_running_loop()
        hub = Hub(settings, may_attach=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
        port = await hub.serve(at)
        try:
            url = f"http://{f'[{at[0]}]' if ':' in at[0] else at[0]}:{port}"
            log.info("the Hub face answers at %s", url)
            on_ready(url)
            await ended.wait()
        finally:
            await hub.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
