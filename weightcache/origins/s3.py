"""Own S3 and everything that speaks it: AWS, Tigris, R2, GCS interoperability, MinIO, SeaweedFS.

Never gathers a body: bytes go from the socket's buffers into the image piece by piece, every response checked
against what was asked. Credentials, endpoints, signing and addressing are aiobotocore's, by way of s3fs's options.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import botocore.session
from aiobotocore.session import AioSession
from botocore import exceptions
from botocore.configprovider import ConfiguredEndpointProvider
from s3fs import S3FileSystem

from weightcache.errors import (
    AccessDeniedError,
    ConfigError,
    ModelNotFoundError,
    OriginChangedError,
    OriginError,
    TransientOriginError,
)
from weightcache.origins.base import Stat

# Newer AWS SDKs send checksum headers that some S3-compatible stores refuse; retries are resilient.py's alone.
CLIENT_CONFIG = {
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    "retries": {"total_max_attempts": 1, "mode": "standard"},
}
_NOT_FOUND = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
_DENIED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_CHANGED = {"412", "PreconditionFailed"}


_service_descriptions: Any = None


def _session(profile: str | None) -> AioSession:
    """Make a session that shares nothing with others but botocore's parsed service descriptions: 90 ms a load."""
    global _service_descriptions
    session = AioSession(profile=profile)
    if _service_descriptions is None:
        _service_descriptions = session.get_component("data_loader")
    else:
        session.register_component("data_loader", _service_descriptions)
    return session


def endpoint_of(storage_options: Mapping[str, Any]) -> str:
    """Return where S3 is by options, environment or configuration files; empty for AWS. Does not dial.

    Raises:
        ConfigError: It holds credentials, or the profile is unknown.
    """
    given = storage_options.get("endpoint_url") or (storage_options.get("client_kwargs") or {}).get("endpoint_url")
    if not given:
        try:
            session = botocore.session.Session(profile=storage_options.get("profile"))
            configured = ConfiguredEndpointProvider(session.full_config, session.get_scoped_config(), "s3")
            given = configured.provide()
        except exceptions.BotoCoreError as exc:
            raise ConfigError(f"the AWS configuration cannot be used: {exc}") from exc
    endpoint = str(given or "").rstrip("/")
    if "@" in endpoint:
        raise ConfigError("the S3 endpoint holds credentials: they end up in logs; use the standard credential chain")
    return endpoint


class S3Origin:
    """A prefix of a bucket.

    Args:
        uri: `s3://bucket/prefix`.
        storage_options: As s3fs takes them (key, secret, token, profile, anon, endpoint_url, client_kwargs,
            config_kwargs, …); what is absent comes from the standard credential chain.
        connections: Size of the connection pool.
        timeout_s: Longest silence on a connection.
        file: The one object of the prefix that counts, if one was named.
    """

    def __init__(
        self,
        uri: str,
        storage_options: Mapping[str, Any],
        connections: int,
        timeout_s: float,
        file: str | None = None,
    ) -> None:
        self._uri = uri
        self._bucket, _, self._prefix = uri.removeprefix("s3://").partition("/")
        self._file = file
        self._options = dict(storage_options)
        self._connections = connections
        self._timeout_s = timeout_s
        self._opening = asyncio.Lock()
        self._client: Any = None

    @property
    def uri(self) -> str:
        return self._uri

    async def list(self) -> Sequence[Stat]:
        base = f"{self._prefix}/" if self._prefix else ""
        found: list[Stat] = []
        async with self._asking() as client:
            if self._file is not None:
                head = await client.head_object(Bucket=self._bucket, Key=base + self._file)
                return [Stat(self._file, head["ContentLength"], head["ETag"])]
            async for page in client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=base):
                for entry in page.get("Contents", ()):
                    name = entry["Key"][len(base) :]
                    if name and not name.endswith("/"):  # folder markers
                        found.append(Stat(name, entry["Size"], entry["ETag"]))
        if not found:
            raise ModelNotFoundError(
                f"nothing below {self._uri}/: expected a folder with safetensors; check the bucket and the prefix",
                uri=self._uri,
            )
        return found

    async def read_into(self, stat: Stat, start: int, views: Sequence[memoryview]) -> None:
        stop = start + sum(len(view) for view in views)
        key = f"{self._prefix}/{stat.path}" if self._prefix else stat.path
        async with self._asking() as client:
            answer = await client.get_object(
                Bucket=self._bucket,
                Key=key,
                Range=f"bytes={start}-{stop - 1}",  # the one place where a range becomes HTTP's inclusive form
                IfMatch=stat.etag,
            )
            async with answer["Body"] as body:
                _check_range(answer, start, stop, stat)
                await _fill(body.raw_stream.content, views, stop - start)

    async def check_unchanged(self, stats: Sequence[Stat]) -> None:
        pass  # every read demands the state's ETag

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[Any]:
        """Give the client, and translate what goes wrong with it."""
        try:
            yield await self._connected()
        except exceptions.ClientError as exc:
            raise self._refusal(exc) from exc
        except (
            exceptions.NoCredentialsError,
            exceptions.CredentialRetrievalError,
            exceptions.TokenRetrievalError,
        ) as exc:
            raise AccessDeniedError(
                f"no credentials for {self._uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or "
                "storage_options={'anon': True} for a public bucket",
                uri=self._uri,
            ) from exc
        except (
            exceptions.ProfileNotFound,
            exceptions.ParamValidationError,
            exceptions.InvalidConfigError,
            exceptions.PartialCredentialsError,
            ValueError,
            TypeError,
        ) as exc:
            raise ConfigError(f"the S3 settings for {self._uri} cannot be used: {exc}", uri=self._uri) from exc
        except (exceptions.HTTPClientError, exceptions.ConnectionError, aiohttp.ClientError, OSError, EOFError) as exc:
            raise TransientOriginError(f"{type(exc).__name__}: {exc}") from exc
        except exceptions.BotoCoreError as exc:
            raise OriginError(f"{self._uri}: {exc}", uri=self._uri) from exc

    async def _connected(self) -> Any:
        async with self._opening:
            if self._client is None:
                options = dict(self._options)
                options["config_kwargs"] = {
                    "max_pool_connections": self._connections,
                    "connect_timeout": self._timeout_s,
                    "read_timeout": self._timeout_s,
                    **CLIENT_CONFIG,
                    **options.get("config_kwargs", {}),
                }
                options.setdefault("session", _session(options.pop("profile", None)))
                filesystem = S3FileSystem(
                    asynchronous=True, loop=asyncio.get_running_loop(), skip_instance_cache=True, **options
                )
                self._client = await filesystem.set_session()
        return self._client

    def _refusal(self, exc: Any) -> Exception:
        error = exc.response.get("Error", {})
        code = str(error.get("Code", ""))
        status = int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code in _NOT_FOUND or status == 404:
            what = f"nothing at {self._uri}" + (f"/{self._file}" if self._file else "")
            if code == "NoSuchBucket":
                what = f"no bucket {self._bucket!r}"
            return ModelNotFoundError(f"{what} ({code}): check the name and the endpoint", uri=self._uri, status=status)
        if code in _CHANGED or status == 412:
            return OriginChangedError(
                f"an object below {self._uri} changed since the model was described; load again when its writer is done",
                uri=self._uri,
            )
        if code in _DENIED or status in (401, 403):
            return AccessDeniedError(
                f"{self._uri} refused these credentials ({code or status}): check the key, its permissions and the endpoint",
                uri=self._uri,
                status=status,
            )
        if status >= 500 or status in (408, 429) or code in ("SlowDown", "RequestTimeout", "InternalError"):
            return TransientOriginError(f"{code or 'error'} ({status})", status=status)
        return OriginError(
            f"{self._uri} answered {code} ({status}): {str(error.get('Message', ''))[:200]}", status=status
        )


def _check_range(answer: Mapping[str, Any], start: int, stop: int, stat: Stat) -> None:
    status = answer["ResponseMetadata"]["HTTPStatusCode"]
    got = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.get("ContentRange") or "")
    whole = status == 200 and start == 0 and stop == stat.nbytes  # a range of everything may be answered so
    if not whole and (
        status != 206 or got is None or (int(got[1]), int(got[2]) + 1, int(got[3])) != (start, stop, stat.nbytes)
    ):
        raise TransientOriginError(
            f"asked for [{start}, {stop}) of {stat.nbytes} bytes, the server answered {status} with range "
            f"{answer.get('ContentRange')!r}"
        )
    if answer.get("ContentLength") != stop - start or answer.get("ContentEncoding"):
        raise TransientOriginError(
            f"asked for {stop - start} bytes, the server announced {answer.get('ContentLength')} "
            f"(encoding {answer.get('ContentEncoding')!r})"
        )
    if answer.get("ETag") != stat.etag:
        raise OriginChangedError(f"{stat.path} has ETag {answer.get('ETag')}, expected {stat.etag}; load again")


async def _fill(stream: Any, views: Sequence[memoryview], nbytes: int) -> None:
    remaining = nbytes
    waiting = iter(views)
    view = memoryview(b"")
    while piece := await stream.readany():
        if len(piece) > remaining:
            raise TransientOriginError(f"the body is longer than the {nbytes} bytes announced")
        remaining -= len(piece)
        rest = memoryview(piece)
        while rest:
            if not view:
                view = next(waiting)
            n_taken = min(len(view), len(rest))
            view[:n_taken] = rest[:n_taken]
            view, rest = view[n_taken:], rest[n_taken:]
    if remaining:
        raise TransientOriginError(f"the body ended {remaining} bytes before the {nbytes} announced")
