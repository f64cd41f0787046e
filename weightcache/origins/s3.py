"""Own S3 and everything that speaks it: AWS, Tigris, R2, GCS interoperability, MinIO, SeaweedFS.

Never carries a body: that is plane.py's. Credentials, endpoints, signing, addressing and listing are aiobotocore's, by
way of s3fs's options; one presigned GET of an object serves all its ranges, for Range is no part of a signature.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import botocore.session
from aiobotocore.session import AioSession
from botocore import exceptions
from botocore.configprovider import ConfiguredEndpointProvider
from s3fs import S3FileSystem

from weightcache.errors import (
    AccessDeniedError,
    ConfigError,
    FormatError,
    ModelNotFoundError,
    OriginError,
    TransientOriginError,
    nearest,
)
from weightcache.ledger import Ledger
from weightcache.origins.answers import Answer, http_time, is_part, refusal
from weightcache.origins.base import Small, Stat
from weightcache.origins.clock import sign_with_skew
from weightcache.origins.listing import Page, parse_page
from weightcache.origins.pace import Throttle
from weightcache.origins.plane import REFUSAL_NBYTES, Plane, Wiring

log = logging.getLogger(__name__)

# Newer AWS SDKs send checksum headers that some S3-compatible stores refuse; retries are resilient.py's alone.
CLIENT_CONFIG = {
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    "signature_version": "s3v4",  # presigned URLs too, whose default is the old version 2
    "retries": {"total_max_attempts": 1, "mode": "standard"},
}
# What S3's codes mean where the status alone does not say it.
_STATUS_OF = {
    "NoSuchKey": 404,
    "NoSuchBucket": 404,
    "NotFound": 404,
    "AccessDenied": 403,
    "InvalidAccessKeyId": 403,
    "SignatureDoesNotMatch": 403,
    "ExpiredToken": 403,
    "InvalidToken": 403,
    "RequestTimeTooSkewed": 403,
    "PreconditionFailed": 412,
    "RequestTimeout": 408,
    "SlowDown": 503,
    "Throttling": 503,
    "RequestLimitExceeded": 503,
    "ConditionalRequestConflict": 500,  # of two writes at the same moment: worth another try
    "OperationAborted": 500,
}
_OUT_OF_TIME = {"ExpiredToken", "TokenRefreshRequired", "RequestExpired", "RequestTimeTooSkewed"}
_OUT_OF_TIME_WORDS = re.compile("expired|not (yet )?valid yet|not ready|not yet valid", re.IGNORECASE)
UNKNOWN_OPTIONS = ("s3_additional_kwargs", "version_aware")  # of s3fs, and a setting is a demand
KNOWN_OPTIONS = (
    *("anon", "client_kwargs", "config_kwargs", "endpoint_url", "key", "profile", "requester_pays", "secret", "token"),
    # Of s3fs and fsspec, for what is not done here.
    *("asynchronous", "cache_regions", "default_block_size", "default_cache_type", "default_fill_cache", "loop"),
    *("fixed_upload_size", "listings_expiry_time", "local_expiry_check", "max_concurrency", "max_paths", "password"),
    *("session", "skip_instance_cache", "use_listings_cache", "use_ssl", "username"),
)
N_PAGES = 100  # of a listing, 1,000 objects each, at most
PAGE_NBYTES = 4 << 20
SIGNED_FOR_S = 3600
# A signature is used again for so long. Credentials that end within 15 minutes are refreshed by aiobotocore when it signs.
SIGNED_ANEW_S = 60.0
LEAST_SKEW_S = 60.0  # a smaller difference of the clocks is no reason to refuse
LARGEST_SKEW_S = 100 * 365 * 86400.0  # a machine without a battery begins in 1970

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
            ignored = (storage_options.get("config_kwargs") or {}).get("ignore_configured_endpoint_urls")
            if ignored is None:
                ignored = session.get_config_variable("ignore_configured_endpoint_urls")
            if not ignored:
                configured = ConfiguredEndpointProvider(session.full_config, session.get_scoped_config(), "s3")
                given = configured.provide()
        # From here on: of a service that gives credentials.
        except (exceptions.HTTPClientError, exceptions.ConnectionError) as exc:
            raise TransientOriginError(f"{type(exc).__name__}: {exc}") from exc
        except (exceptions.BotoCoreError, exceptions.ClientError) as exc:
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
        wiring: How hosts are reached; certificates and proxies of the options and the AWS configuration come before.
        throttle: The bandwidth this process may use.
        file: The one object of the prefix that counts, if one was named.
    """

    def __init__(
        self,
        uri: str,
        storage_options: Mapping[str, Any],
        wiring: Wiring,
        throttle: Throttle,
        file: str | None = None,
    ) -> None:
        self._uri = uri
        self._bucket, self._prefix = _split(uri.removeprefix("s3://"))
        self._file = file
        self._options = dict(storage_options)
        for name in UNKNOWN_OPTIONS:
            if self._options.get(name):
                raise ConfigError(f"storage_options[{name!r}] is not known to weightcache: leave it out", uri=uri)
        for name in self._options.keys() - {*KNOWN_OPTIONS, *UNKNOWN_OPTIONS}:
            if hint := nearest(name, KNOWN_OPTIONS):  # spelled wrongly, it would be another place or another identity
                raise ConfigError(f"storage_options[{name!r}] is not known to s3fs or weightcache{hint}", uri=uri)
        self._wiring = wiring
        self._throttle = throttle
        self._opening = asyncio.Lock()
        self._client: Any = None
        self._plane: Plane | None = None
        self._signed: dict[str, tuple[str, float]] = {}  # by name: the URL, and the loop time until which it is used
        self._payer = {"RequestPayer": "requester"} if self._options.get("requester_pays") else {}
        self._headers = {"x-amz-request-payer": "requester"} if self._payer else {}  # as the signature demands
        self._skew_s = 0.0
        self._region: str | None = None  # where the bucket turned out to be
        self.ledger = Ledger()

    @property
    def ledgers(self) -> Sequence[Ledger]:
        return [self.ledger]

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def _name(self) -> str:
        return f"{self._uri}/{self._file}" if self._file else self._uri

    async def list(self) -> Sequence[Stat]:
        base = f"{self._prefix}/" if self._prefix else ""
        if self._file is not None:
            answer = await self._ask("HEAD", "head_object", {"Key": base + self._file})
            etag = answer.get("etag")
            if answer.content_length is None or not etag:
                raise TransientOriginError(f"{self._name}: the server says neither size nor ETag")
            return [Stat(self._file, answer.content_length, etag)]
        found: list[Stat] = []
        async for page in self._pages(base):
            for each in page.objects:
                name = each.path.removeprefix(base)
                if not each.path.startswith(base):
                    raise OriginError(f"asked for {self._uri}/, the server lists {each.path[:200]!r}", uri=self._uri)
                if name and not name.endswith("/"):  # folder markers
                    found.append(Stat(name, each.nbytes, each.etag))
        if not found:
            raise ModelNotFoundError(
                f"nothing below {self._uri}/: expected a folder with safetensors; check the bucket and the prefix",
                uri=self._uri,
            )
        return found

    async def _pages(self, prefix: str, n_pages: int = N_PAGES) -> AsyncIterator[Page]:
        token: dict[str, str] = {}
        seen: set[str] = set()
        for _ in range(n_pages):
            answer = await self._ask("GET", "list_objects_v2", {"Prefix": prefix, **token}, PAGE_NBYTES)
            if len(answer.body) > PAGE_NBYTES:
                raise OriginError(f"a page of the listing of {self._uri}/ has more than {PAGE_NBYTES} bytes")
            page = parse_page(answer.body)
            yield page
            if page.next_token is None:
                return
            if page.next_token in seen:
                raise OriginError(
                    f"the listing of {self._uri}/ goes round in circles: look at the server", uri=self._uri
                )
            seen.add(page.next_token)
            token = {"ContinuationToken": page.next_token}
        raise OriginError(f"the listing of {self._uri}/ has more than {n_pages} pages: name the model's own folder")

    async def _ask(
        self,
        method: str,
        operation: str,
        parameters: Mapping[str, str],
        limit_nbytes: int = REFUSAL_NBYTES,
        *,
        headers: Mapping[str, str] = MappingProxyType({}),
        body: bytes | memoryview = b"",
        name: str = "",
    ) -> Answer:
        """Ask for what does not go into views, and return the answer if it is none that refuses.

        Args:
            limit_nbytes: Most of its body that is read.
            headers: Beside those of every request; not signed.
            body: What is sent.
            name: The object that is meant, for errors.
        """
        async with self._asking() as (client, plane):
            url = await client.generate_presigned_url(
                operation, Params={"Bucket": self._bucket, **self._payer, **parameters}, ExpiresIn=SIGNED_FOR_S
            )
        answer = await plane.request(
            method,
            url,
            {**self._headers, **headers},
            lambda answer: False,
            limit_nbytes=limit_nbytes,
            is_listing=operation not in ("head_object", "get_object"),
            body=body,
        )
        if answer.status >= 300:
            raise await self._refusal(answer, name, is_fresh=True)
        return answer

    async def read_into(self, stat: Stat, start: int, views: Sequence[memoryview]) -> None:
        stop = start + sum(len(view) for view in views)
        if start == stop:
            return
        async with self._asking() as (client, plane):
            url, is_fresh = await self._sign(client, stat.path)
        answer = await plane.request(
            "GET",
            url,
            {
                **self._headers,
                "Range": f"bytes={start}-{stop - 1}",
                **({"If-Match": stat.etag} if stat.etag else {}),
            },
            lambda answer: is_part(answer, stat, start, stop, answer.get("etag")),
            views,
        )
        if answer.status >= 300:
            is_current = self._signed.get(stat.path, ("", 0.0))[0] == url  # else another read signed anew meanwhile
            if is_current and not is_fresh:
                del self._signed[stat.path]
            raise await self._refusal(answer, stat.path, is_fresh=is_current and is_fresh)

    async def get(self, name: str, limit_nbytes: int) -> Small:
        answer = await self._ask("GET", "get_object", {"Key": self._key(name)}, limit_nbytes, name=name)
        if len(answer.body) > limit_nbytes:
            raise FormatError(f"{self._uri}/{name} has more than {limit_nbytes} bytes")
        return Small(answer.body, answer.get("etag") or "")

    async def check_unchanged(self, stats: Sequence[Stat]) -> None:
        pass  # every read demands the state's ETag

    def drop(self) -> None:
        if self._plane is not None:
            self._plane.drop()

    async def close(self) -> None:
        client, self._client = self._client, None
        plane, self._plane = self._plane, None
        if plane is not None:
            await plane.close()
        if client is not None:
            await client.close()

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    async def _sign(self, client: Any, name: str) -> tuple[str, bool]:
        """Return a URL that gives an object for a while, and whether it was signed just now."""
        now = asyncio.get_running_loop().time()
        url, until = self._signed.get(name, ("", 0.0))
        if now < until:
            return url, False
        url = await client.generate_presigned_url(
            "get_object", Params={"Bucket": self._bucket, "Key": self._key(name), **self._payer}, ExpiresIn=SIGNED_FOR_S
        )
        self._signed[name] = url, now + SIGNED_ANEW_S
        return url, True

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[tuple[Any, Plane]]:
        """Give the client, to sign by, and the plane; and translate what goes wrong with the former."""
        try:
            yield await self._connected()
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
        ) as exc:
            raise ConfigError(f"the S3 settings for {self._uri} cannot be used: {exc}", uri=self._uri) from exc
        except (ValueError, TypeError) as exc:
            raise ConfigError(f"the S3 settings for {self._uri} cannot be used: {exc}", uri=self._uri) from exc
        except (exceptions.BotoCoreError, exceptions.ClientError) as exc:  # of a service that gives credentials
            raise OriginError(f"{self._uri}: {exc}", uri=self._uri) from exc
        except (OSError, RuntimeError) as exc:  # of a credential_process that is not there, or gives what has expired
            raise AccessDeniedError(
                f"no credentials for {self._uri} ({type(exc).__name__}: {exc}): check credential_process and this clock",
                uri=self._uri,
            ) from exc

    async def _connected(self) -> tuple[Any, Plane]:
        async with self._opening:
            if self._client is None or self._plane is None:
                options = dict(self._options)
                options["config_kwargs"] = {
                    "connect_timeout": self._wiring.patience_s,
                    "read_timeout": self._wiring.patience_s,
                    **CLIENT_CONFIG,
                    **(options.get("config_kwargs") or {}),
                }
                if self._region is not None:
                    options["client_kwargs"] = {**(options.get("client_kwargs") or {}), "region_name": self._region}
                options.setdefault("session", _session(options.pop("profile", None)))
                filesystem = S3FileSystem(
                    asynchronous=True, loop=asyncio.get_running_loop(), skip_instance_cache=True, **options
                )
                self._plane = self._plane or Plane(
                    self._uri, _wired(self._wiring, options), self.ledger, self._throttle
                )
                self._client = await filesystem.set_session()
                if self._skew_s:
                    sign_with_skew(self._client, self._skew_s)
            return self._client, self._plane

    async def _refusal(self, answer: Answer, name: str = "", *, is_fresh: bool) -> Exception:
        """Return the error that an answer means; `is_fresh` says that its request was signed just before."""
        code, message = _words_of(answer)
        status, uri = answer.status, self._uri
        if status >= 400:
            status = _STATUS_OF.get(code, status)
        if code == "NoSuchBucket":
            return ModelNotFoundError(
                f"no bucket {self._bucket!r} ({code}, {status}): check the name and the endpoint",
                uri=uri,
                status=status,
            )
        if status == 404:
            uri = f"{uri}/{name}" if name else self._name
        elif status in (401, 403) and (not code or code in _OUT_OF_TIME or _OUT_OF_TIME_WORDS.search(message)):
            # Without a code, as HEAD is answered, this may be it.
            if self._correct_skew(answer) or not is_fresh:
                return TransientOriginError(f"a signature out of time ({code or status})", status=status)
        elif await self._moved(answer):
            return TransientOriginError(f"the bucket lies in another region ({code})", status=status)
        elif status == 400:
            code = f"{code}: {message}"
        return refusal(status, uri, code, answer.retry_after_s)

    async def _moved(self, answer: Answer) -> bool:
        """Connect anew to the region that the bucket is in, if the answer names another; tell whether. Once an origin."""
        if answer.status not in (301, 307, 400) or self._region is not None:
            return False
        named = re.search(rb"<Region>([^<]{1,80})</Region>", answer.body)
        region = answer.get("x-amz-bucket-region") or (named[1].decode("utf-8", "replace") if named else "")
        if not re.fullmatch(r"[a-z0-9-]{1,40}", region):
            return False
        self._wiring.check_region(region)
        self._region = region
        self._signed.clear()
        client, self._client = self._client, None
        if client is not None:
            await client.close()
        return True

    def _correct_skew(self, answer: Answer) -> bool:
        """Sign by the server's clock from now on, if ours differs; tell whether that is news. Once an origin."""
        sent = http_time(answer.get("date") or "")
        if sent is None or self._skew_s:
            return False
        skew_s = sent - time.time()
        if not LEAST_SKEW_S <= abs(skew_s) <= LARGEST_SKEW_S:
            return False
        log.warning(
            "this machine's clock differs from %s by %.0f s: requests are signed by the latter", self._uri, skew_s
        )
        self._skew_s = skew_s
        self._signed.clear()
        sign_with_skew(self._client, skew_s)
        return True


def _split(place: str) -> tuple[str, str]:
    """Return bucket and prefix; the ARN of an access point is a bucket that has a slash."""
    arn = re.match(r"arn:[^/]*:accesspoint/[^/]+", place)
    bucket = arn[0] if arn else place.partition("/")[0]
    return bucket, place[len(bucket) :].removeprefix("/")


def _wired(wiring: Wiring, options: Mapping[str, Any]) -> Wiring:
    """Return how hosts are reached with what S3's own options say of certificates and proxies."""
    verify = (options.get("client_kwargs") or {}).get("verify")
    if verify is None:
        verify = options["session"].get_config_variable("ca_bundle")
    proxies = options["config_kwargs"].get("proxies", wiring.proxies)
    return replace(wiring, verify=wiring.verify if verify is None else verify, proxies=proxies)


def _words_of(answer: Answer) -> tuple[str, str]:
    """Return code and message of S3's error document, empty where there is none."""
    text = answer.body.decode("utf-8", "replace")
    code = re.search(r"<Code>([^<]{1,80})</Code>", text)
    message = re.search(r"<Message>([^<]{1,400})", text)
    return code[1] if code else "", message[1] if message else ""
