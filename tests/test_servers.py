"""The test servers do what they say, as seen by clients that are not ours."""

from __future__ import annotations

import http.client
import os
import random
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import fsspec
import models
import pytest
import servers
from botocore.exceptions import ClientError, ResponseStreamingError
from proxy import EXTRA_BYTES, STATUS_WORDS
from servers import Bucket, HttpServer, Proxy, S3Server
from wire import Request

BODY = random.Random(7).randbytes(1_000_001)
MIDDLE = len(BODY) // 2


class Client(http.client.HTTPConnection):
    """An HTTP client that fails early instead of waiting."""

    def __init__(self, address: str, timeout_s: float = 10.0) -> None:
        super().__init__(address, timeout=timeout_s)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, path: str, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
        """Send a request and read the head of its answer."""
        self.request(method, path, headers={name.replace("_", "-"): text for name, text in headers.items()})
        return self.getresponse()


@pytest.fixture
def files(tmp_path: Path, http_folder: Callable[[Path], HttpServer]) -> HttpServer:
    """An HTTP server of one file, /weights.bin."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "weights.bin").write_bytes(BODY)
    return http_folder(tmp_path / "files")


@pytest.fixture
def faulty(files: HttpServer) -> Iterator[Proxy]:
    """A proxy before the HTTP server."""
    with Proxy(files.address) as proxy:
        yield proxy


@pytest.fixture
def client(faulty: Proxy) -> Iterator[Client]:
    """A connection to the proxy."""
    with Client(faulty.address) as client:
        yield client


def wait_until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Poll a condition until it holds."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s"
        time.sleep(0.005)


def read_until_broken(response: http.client.HTTPResponse) -> tuple[bytes, Exception | None]:
    """Read a body piece by piece; return what came and the error that ended it, if one did."""
    content = b""
    try:
        while piece := response.read1(65536):
            content += piece
    except OSError as exc:
        return content, exc
    return content, None


# S3Server


def test_s3_answers_ranges_with_content_range(bucket: Bucket) -> None:
    bucket.put("a/weights", BODY)
    answer = bucket.client.get_object(Bucket=bucket.name, Key="a/weights", Range="bytes=10-19")
    assert answer["Body"].read() == BODY[10:20]
    assert answer["ContentRange"] == f"bytes 10-19/{len(BODY)}"


def test_s3_refuses_a_wrong_secret(s3: S3Server, bucket: Bucket, proxy: Proxy) -> None:
    bucket.put("x", b"x")
    options = s3.storage_options(proxy.endpoint) | {"secret": "wrong"}
    filesystem = fsspec.filesystem("s3", **options, skip_instance_cache=True)
    with pytest.raises(PermissionError):
        filesystem.cat_file(f"{bucket.name}/x")


def test_s3_server_lives_in_its_own_session(s3: S3Server) -> None:
    assert os.getsid(s3.pid) == s3.pid != os.getsid(0)


def test_s3_server_stops_and_leaves_nothing_behind() -> None:
    server = S3Server()
    pid, port, folder = server.pid, int(server.endpoint.rpartition(":")[2]), server.data_dir
    server.client().list_buckets()
    server.stop()
    server.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not folder.exists()
    assert not list(Path("/tmp").glob(f"seaweedfs-*{port}.sock"))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_two_s3_servers_run_side_by_side(s3: S3Server) -> None:
    with S3Server() as other:
        assert other.pid != s3.pid
        assert other.client().list_buckets()["Buckets"] == []


def test_s3_server_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "TERM_TIMEOUT_S", 0.2)
    server = S3Server()
    os.kill(server.pid, signal.SIGSTOP)
    server.stop()
    assert not server.data_dir.exists()


def test_bucket_upload_keeps_names_and_bytes(bucket: Bucket, tmp_path: Path) -> None:
    models.write_diffusers(tmp_path / "model")
    assert bucket.upload(tmp_path / "model", "models/pipeline/") == f"{bucket.url}/models/pipeline"
    names = [path.relative_to(tmp_path / "model").as_posix() for path in (tmp_path / "model").rglob("*.*")]
    assert bucket.keys() == sorted(f"models/pipeline/{name}" for name in names)
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert bucket.get(f"models/pipeline/{unet}") == (tmp_path / "model" / unet).read_bytes()


def test_bucket_upload_sends_large_files_in_parts(bucket: Bucket, tmp_path: Path) -> None:
    models.write_safetensors(tmp_path / "large.safetensors", {"x": ("U8", (70 << 20,))})
    bucket.upload(tmp_path, "")
    assert bucket.get("large.safetensors") == (tmp_path / "large.safetensors").read_bytes()


# Proxy before S3


def test_proxy_keeps_signatures_valid_and_counts(s3: S3Server, bucket: Bucket, proxy: Proxy) -> None:
    client = s3.client(proxy.endpoint)
    client.put_object(Bucket=bucket.name, Key="weights", Body=BODY)
    whole = client.get_object(Bucket=bucket.name, Key="weights")
    assert whole["Body"].read() == BODY
    part = client.get_object(Bucket=bucket.name, Key="weights", Range="bytes=5-104")
    assert part["Body"].read() == BODY[5:105]
    client.head_object(Bucket=bucket.name, Key="weights")
    client.delete_object(Bucket=bucket.name, Key="weights")
    path = f"/{bucket.name}/weights"
    assert proxy.requests == [
        Request("PUT", path, None, 200, 0),
        Request("GET", path, None, 200, len(BODY)),
        Request("GET", path, "bytes=5-104", 206, 100),
        Request("HEAD", path, None, 200, 0),
        Request("DELETE", path, None, 204, 0),
    ]
    assert proxy.body_bytes() == proxy.body_bytes("weights$") == len(BODY) + 100
    assert proxy.body_bytes("nothing") == 0
    assert proxy.uploaded_bytes() == len(BODY)
    proxy.reset()
    assert proxy.requests == []


def test_proxy_serves_s3fs(s3: S3Server, bucket: Bucket, proxy: Proxy) -> None:
    bucket.put("folder/weights", BODY)
    options = s3.storage_options(proxy.endpoint)
    filesystem = fsspec.filesystem("s3", **options, skip_instance_cache=True)
    assert filesystem.find(f"{bucket.name}/folder") == [f"{bucket.name}/folder/weights"]
    assert filesystem.cat_file(f"{bucket.name}/folder/weights", start=3, end=33) == BODY[3:33]


@pytest.mark.parametrize("status", STATUS_WORDS)
def test_status_words_are_s3_errors(s3: S3Server, bucket: Bucket, proxy: Proxy, status: str) -> None:
    bucket.put("x", b"x")
    proxy.script("GET .*/x", f"{status} {status}")  # boto3 asks twice where asking again may help
    with pytest.raises(ClientError) as caught:
        s3.client(proxy.endpoint).get_object(Bucket=bucket.name, Key="x")
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == int(status)
    assert caught.value.response["Error"]["Code"] == STATUS_WORDS[status][1]


def test_status_word_refuses_an_upload_that_asks_first(s3: S3Server, bucket: Bucket, proxy: Proxy) -> None:
    proxy.script("PUT", "403")
    with pytest.raises(ClientError, match="AccessDenied"):
        s3.client(proxy.endpoint).put_object(Bucket=bucket.name, Key="x", Body=BODY)
    assert bucket.keys() == []


@pytest.mark.parametrize("word", ["short", "reset"])
def test_boto3_sees_a_body_that_breaks_off(s3: S3Server, bucket: Bucket, proxy: Proxy, word: str) -> None:
    bucket.put("x", BODY)
    proxy.script("GET", word)
    answer = s3.client(proxy.endpoint).get_object(Bucket=bucket.name, Key="x")
    with closing(answer["Body"]) as body, pytest.raises(ResponseStreamingError):
        body.read()


def test_whole_and_shift_pass_signed_ranges(s3: S3Server, bucket: Bucket, proxy: Proxy) -> None:
    bucket.put("weights", BODY)
    client = s3.client(proxy.endpoint)
    proxy.script("GET", "whole shift")
    answers = [client.get_object(Bucket=bucket.name, Key="weights", Range="bytes=10-19") for _ in "ab"]
    bodies = [answer["Body"].read() for answer in answers]
    assert [answer["ResponseMetadata"]["HTTPStatusCode"] for answer in answers] == [200, 206]
    assert bodies == [BODY, BODY[11:21]]
    assert answers[1]["ContentRange"] == f"bytes 11-20/{len(BODY)}"


# Proxy before a plain server


def test_ok_passes_ranges_heads_and_errors_on_one_connection(faulty: Proxy, client: Client) -> None:
    assert client.ask("/weights.bin", Range="bytes=0-9").read() == BODY[:10]
    sock = client.sock
    head = client.ask("/weights.bin", "HEAD")
    assert (head.headers["Content-Length"], head.read()) == (str(len(BODY)), b"")
    unchanged = client.ask("/weights.bin", If_None_Match=head.headers["ETag"])
    assert (unchanged.status, unchanged.read()) == (304, b"")
    missing = client.ask("/missing")
    assert (missing.status, missing.read()) == (404, b"no such file\n")
    assert client.ask("/weights.bin").read() == BODY
    assert client.sock is sock
    assert [request.status for request in faulty.requests] == [206, 200, 304, 404, 200]


def test_words_apply_in_order_to_matching_requests_then_ok(faulty: Proxy, client: Client) -> None:
    faulty.script(r"GET /weights\.bin$", "ok 503 500")
    statuses = []
    for path in ("/weights.bin", "/", "/weights.bin", "/", "/weights.bin", "/weights.bin"):
        answer = client.ask(path)
        answer.read()
        statuses.append(answer.status)
    assert statuses == [200, 200, 503, 200, 500, 200]


def test_unknown_words_are_refused_at_once(faulty: Proxy) -> None:
    for word in ("flop", "slow", "slow:x", "slow:0", "999", "ok:1"):
        with pytest.raises(ValueError, match="unknown fault word"):
            faulty.script(".", f"ok {word}")


def test_503_can_carry_retry_after(faulty: Proxy, client: Client) -> None:
    faulty.script(".", "503:7")
    answer = client.ask("/weights.bin")
    assert (answer.status, answer.headers["Retry-After"]) == (503, "7")
    assert b"<Code>SlowDown</Code>" in answer.read()


def test_status_word_answers_head_without_body(faulty: Proxy, client: Client) -> None:
    faulty.script("HEAD", "404")
    answer = client.ask("/weights.bin", "HEAD")
    assert (answer.status, answer.read()) == (404, b"")
    assert client.ask("/weights.bin").read() == BODY


def test_flip_inverts_one_bit_in_the_middle(faulty: Proxy, client: Client) -> None:
    faulty.script(".", "flip")
    content = client.ask("/weights.bin").read()
    assert len(content) == len(BODY)
    wrong = [place for place, (got, sent) in enumerate(zip(content, BODY, strict=True)) if got != sent]
    assert wrong == [MIDDLE]
    assert (content[MIDDLE] ^ BODY[MIDDLE]).bit_count() == 1


def test_short_promises_all_and_sends_half(faulty: Proxy, client: Client) -> None:
    faulty.script(".", "short")
    answer = client.ask("/weights.bin")
    assert answer.headers["Content-Length"] == str(len(BODY))
    with pytest.raises(http.client.IncompleteRead) as caught:
        answer.read()
    assert caught.value.partial == BODY[:MIDDLE]
    assert faulty.requests == [Request("GET", "/weights.bin", None, 200, MIDDLE)]


def test_long_sends_more_than_was_asked_for(faulty: Proxy, client: Client) -> None:
    faulty.script(".", "long")
    answer = client.ask("/weights.bin", Range="bytes=0-9")
    assert answer.headers["Content-Range"] == f"bytes 0-9/{len(BODY)}"
    assert answer.read() == BODY[:10] + bytes(EXTRA_BYTES)
    assert client.ask("/weights.bin").read() == BODY


def test_reset_comes_half_way(faulty: Proxy, client: Client) -> None:
    faulty.script(".", "reset")
    content, error = read_until_broken(client.ask("/weights.bin"))
    assert isinstance(error, ConnectionResetError)
    assert content == BODY[:MIDDLE]


def test_drop_resets_before_any_byte(files: HttpServer, faulty: Proxy, client: Client) -> None:
    faulty.script(".", "drop")
    with pytest.raises(ConnectionResetError):
        client.ask("/weights.bin")
    assert faulty.requests == [Request("GET", "/weights.bin", None, 0, 0)]
    assert files.requests == []


def test_stall_lasts_until_the_client_leaves(faulty: Proxy) -> None:
    faulty.script(".", "stall")
    with Client(faulty.address, timeout_s=0.2) as client:
        answer = client.ask("/weights.bin")
        faulty.wait_stopped()
        faulty.release()
        content, error = read_until_broken(answer)
        assert isinstance(error, TimeoutError)
        assert content == BODY[:MIDDLE]
        answer.close()
    wait_until(lambda: not proxy_connections())


def test_stall_ends_with_the_proxy(files: HttpServer) -> None:
    with Proxy(files.address) as proxy, Client(proxy.address) as client:
        proxy.script(".", "stall")
        answer = client.ask("/weights.bin")
        proxy.wait_stopped()
        proxy.close()
        with pytest.raises(http.client.IncompleteRead):
            answer.read()
    assert not proxy_connections()


def test_hold_lasts_until_release(faulty: Proxy, client: Client) -> None:
    faulty.script(".", "hold")
    answer = client.ask("/weights.bin")
    faulty.wait_stopped()
    assert faulty.body_bytes() == MIDDLE
    faulty.release()
    assert answer.read() == BODY


def test_wait_stopped_has_a_deadline(faulty: Proxy) -> None:
    with pytest.raises(TimeoutError, match="0 exchanges"):
        faulty.wait_stopped(timeout_s=0.01)


def test_an_answer_without_a_body_breaks_before_its_head(files: HttpServer, faulty: Proxy, client: Client) -> None:
    faulty.script("HEAD", "short")
    with pytest.raises(http.client.RemoteDisconnected):
        client.ask("/weights.bin", "HEAD")
    assert [request.method for request in files.requests] == ["HEAD"]
    client.close()
    faulty.script("HEAD", "hold flip long")
    client.request("HEAD", "/weights.bin")
    faulty.wait_stopped()
    faulty.release()
    assert client.getresponse().read() == b""
    assert [client.ask("/weights.bin", "HEAD").read() for _ in range(2)] == [b"", b""]


def test_whole_ignores_the_range(faulty: Proxy, client: Client) -> None:
    faulty.script(".", "whole")
    answer = client.ask("/weights.bin", Range="bytes=10-19")
    assert (answer.status, answer.headers["Content-Range"]) == (200, None)
    assert answer.read() == BODY
    assert faulty.requests == [Request("GET", "/weights.bin", "bytes=10-19", 200, len(BODY))]


def test_shift_answers_another_range_and_says_so(faulty: Proxy, client: Client) -> None:
    faulty.script(".", "shift")
    answer = client.ask("/weights.bin", Range="bytes=10-19")
    assert answer.headers["Content-Range"] == f"bytes 11-20/{len(BODY)}"
    assert answer.read() == BODY[11:21]


def test_slow_limits_the_rate(faulty: Proxy, client: Client) -> None:
    faulty.script(".", "slow:100")
    start_s = time.monotonic()
    assert client.ask("/weights.bin", Range="bytes=0-40959").read() == BODY[:40960]
    assert time.monotonic() - start_s > 0.35


def test_close_ends_a_slow_answer(files: HttpServer) -> None:
    with Proxy(files.address) as proxy, Client(proxy.address) as client:
        proxy.script(".", "slow:1")
        answer = client.ask("/weights.bin")
        assert answer.read(1) == BODY[:1]
        proxy.close()
        with pytest.raises(http.client.IncompleteRead):
            answer.read()


def test_close_leaves_no_thread_and_no_descriptor(files: HttpServer) -> None:
    n_fds = count_fds()
    with Proxy(files.address) as proxy:
        clients = [Client(proxy.address) for _ in range(4)]
        for client in clients:
            client.ask("/weights.bin", "HEAD").read()
        assert len(proxy_connections()) == 4
    proxy.close()
    for client in clients:
        client.close()
    assert not proxy_connections()
    wait_until(lambda: count_fds() == n_fds)


def test_chunked_bodies_pass_and_break() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked = head + b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nA: b\r\n\r\n"
    with ScriptedServer(chunked) as server, Proxy(server.address) as proxy, Client(proxy.address) as client:
        proxy.script(".", "ok flip")
        answer = client.ask("/")
        assert answer.headers["Transfer-Encoding"] == "chunked"
        assert answer.read() == b"hello world"
        flipped = client.ask("/")
        assert flipped.headers["Content-Length"] == "11"
        assert flipped.read() == b"hello!world"
        assert proxy.body_bytes() == 22


def test_a_body_that_ends_with_the_connection_passes() -> None:
    endless = b"HTTP/1.1 200 OK\r\n\r\nhello"
    with (
        ScriptedServer(endless, closes=True) as server,
        Proxy(server.address) as proxy,
        Client(proxy.address) as client,
    ):
        assert [client.ask("/").read() for _ in range(2)] == [b"hello", b"hello"]


def test_chunked_upload_passes(bucket: Bucket, proxy: Proxy) -> None:
    url = bucket.client.generate_presigned_url("put_object", {"Bucket": bucket.name, "Key": "x"})
    with Client(bucket.server.address) as client:
        client.request("PUT", url.partition(bucket.server.address)[2], body=iter([b"hello", b" world"]))
        assert client.getresponse().status == 200
    assert bucket.get("x") == b"hello world"


def count_fds() -> int:
    """Count this process's open descriptors."""
    return len(list(Path("/proc/self/fd").iterdir()))


def proxy_connections() -> list[str]:
    """Return the names of the proxies' threads that serve a connection."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("proxy-connection")]


class ScriptedServer:
    """Answers every request head with the same bytes."""

    def __init__(self, answer: bytes, *, closes: bool = False) -> None:
        self._answer = answer
        self._closes = closes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock:
                while sock.recv(65536).endswith(b"\r\n\r\n"):
                    sock.sendall(self._answer)
                    if self._closes:
                        break


# HttpServer


def test_http_server_answers_ranges(files: HttpServer) -> None:
    asked = {
        "bytes=0-0": (206, f"bytes 0-0/{len(BODY)}", BODY[:1]),
        "bytes=1000000-2000000": (206, f"bytes 1000000-1000000/{len(BODY)}", BODY[-1:]),
        "bytes=999990-": (206, f"bytes 999990-1000000/{len(BODY)}", BODY[999990:]),
        "bytes=-5": (206, f"bytes 999996-1000000/{len(BODY)}", BODY[-5:]),
        "bytes=1000001-": (416, f"bytes */{len(BODY)}", b""),
        "bytes=-0": (416, f"bytes */{len(BODY)}", b""),
        "bytes=5-4": (200, None, BODY),
        "bytes=0-1,3-4": (200, None, BODY),
    }
    with Client(files.address) as client:
        for range_, expected in asked.items():
            answer = client.ask("/weights.bin", Range=range_)
            assert (answer.status, answer.headers["Content-Range"], answer.read()) == expected
    assert [request.range for request in files.requests] == list(asked)
    assert files.body_bytes("weights") == sum(len(body) for _, _, body in asked.values())


def test_http_server_honours_entity_tags(files: HttpServer) -> None:
    with Client(files.address) as client:
        head = client.ask("/weights.bin", "HEAD")
        head.read()
        etag = head.headers["ETag"]
        same = client.ask("/weights.bin", If_Match=etag, Range="bytes=0-1")
        assert (same.status, same.read()) == (206, BODY[:2])
        changed = client.ask("/weights.bin", If_Match='"other"')
        assert (changed.status, changed.read()) == (412, b"")
        restarted = client.ask("/weights.bin", If_Range='"other"', Range="bytes=0-1")
        assert (restarted.status, restarted.read()) == (200, BODY)


def test_http_server_does_not_leave_its_folder(files: HttpServer, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{files.endpoint}/%2e%2e/secret")
    with caught.value:
        assert caught.value.code == 404


def test_fsspec_finds_and_reads_a_folder_over_http(tmp_path: Path, http_folder: Callable[[Path], HttpServer]) -> None:
    models.write_diffusers(tmp_path / "pipe line")
    server = http_folder(tmp_path)
    filesystem = fsspec.filesystem("http", skip_instance_cache=True)
    found = filesystem.find(f"{server.endpoint}/pipe%20line")
    paths = [path for path in sorted((tmp_path / "pipe line").rglob("*")) if path.is_file()]
    assert found == [f"{server.endpoint}/pipe%20line/{p.relative_to(tmp_path / 'pipe line')}" for p in paths]
    weights = next(path for path in paths if path.suffix == ".safetensors")
    url = f"{server.endpoint}/pipe%20line/{weights.relative_to(tmp_path / 'pipe line')}"
    assert filesystem.info(url)["size"] == weights.stat().st_size
    assert filesystem.cat_file(url, 8, 108) == weights.read_bytes()[8:108]


def test_http_server_closes_with_idle_clients(tmp_path: Path) -> None:
    with HttpServer(tmp_path) as server, Client(server.address) as client:
        client.ask("/").read()
        server.close()
        server.close()
        with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
            client.ask("/")
