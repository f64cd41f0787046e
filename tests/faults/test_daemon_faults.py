"""The node daemon dies, is stopped, is asked nonsense, or by whom it does not serve: nobody loses a byte by that."""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import models
import pytest
from cache_folder import staged_files
from daemon_fuzzing import fuzz
from daemon_killing import kill_at_random
from hosted import Hosted, host
from nodes import ClientProcess, Node, clients, receive, wait_until
from reference import assert_same, fingerprint
from servers import Bucket, Proxy

import weightcache
from weightcache import errors
from weightcache.tensors import LoadedModel

MIB = 1 << 20
SHAPES: models.Shapes = {f"layer.{number}.weight": ("F32", (512, 1024)) for number in range(8)}


@pytest.fixture
def hosted(tmp_path: Path, bucket: Bucket, proxy: Proxy) -> Hosted:
    """Eight tensors of 2 MiB, each a chunk and a request."""
    folder = tmp_path / "model"
    folder.mkdir()
    models.write_safetensors(folder / "model.safetensors", SHAPES)
    return host(folder, bucket, proxy)


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask for each tensor by itself."""
    monkeypatch.setenv("WEIGHTCACHE_RANGE_BYTES", "2MiB")


def load(hosted: Hosted, **arguments: object) -> LoadedModel:
    return weightcache.load_model(hosted.url, "cpu", storage_options=hosted.options, **arguments)  # type: ignore[arg-type]


class TokenNode(Node):
    """A daemon whose clients must show a token; the test shows the right one."""

    def __init__(self, configuration: str, token_file: Path) -> None:
        self._token = token_file.read_text().strip()
        super().__init__(configuration)

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return super().ask({"token": self._token, **message})


# -- it ends in the middle


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_load_goes_on_by_itself_when_the_daemon_does_not(node: Node, hosted: Hosted, number: int) -> None:
    hosted.proxy.script("GET .*safetensors", "ok ok ok hold")
    client = ClientProcess(hosted.url, hosted.options)
    with clients(client):
        hosted.proxy.wait_stopped(timeout_s=60)
        wait_until(lambda: node.image(hosted.url).get("n_leases") == 1)
        node.signal(number)
        loaded = client.result()
        assert loaded["tensors"] == fingerprint(hosted.tensors)
        assert [warning for warning in loaded["report"]["warnings"] if "starting again without it" in warning]
        client.end()
    hosted.proxy.release()


@pytest.mark.parametrize("order", [(), ("layer.0.weight", "layer.7.weight")])
def test_a_stream_goes_on_with_what_is_left(node: Node, hosted: Hosted, order: Sequence[str]) -> None:
    hosted.proxy.script("GET .*safetensors", "ok ok ok hold")
    tensors = weightcache.stream(hosted.url, "cpu", order=order, storage_options=hosted.options)
    got = [next(tensors)]
    node.kill()
    hosted.proxy.release()
    got += tensors
    assert len(got) == len(SHAPES)
    assert_same(dict(got), hosted.tensors)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_who_holds_a_model_keeps_it(node: Node, hosted: Hosted, number: int) -> None:
    with load(hosted) as model:
        node.signal(number)
        assert_same(model, hosted.tensors)


def test_a_stopped_daemon_is_not_waited_for(node: Node, hosted: Hosted) -> None:
    node.signal(signal.SIGSTOP)
    with load(hosted) as model:
        assert "is silent" in model.report.choices["daemon"]
        assert_same(model, hosted.tensors)


def test_a_load_s_deadline_holds_while_the_daemon_waits_for_the_origin(node: Node, hosted: Hosted) -> None:
    hosted.proxy.script("GET", "stall " * 50)
    with pytest.raises(errors.DeadlineError):
        load(hosted, timeout_s=2.0)
    node.kill()  # which would wait for the origin


def test_an_origin_that_fails_the_daemon_is_asked_by_the_load_itself(node: Node, hosted: Hosted) -> None:
    hosted.proxy.script("GET .*safetensors", "ok " + "404 " * 20)
    with pytest.raises(errors.WeightcacheError):
        load(hosted)
    hosted.proxy.reset()
    with load(hosted) as model:
        assert_same(model, hosted.tensors)


# -- it is ended while something hangs


def end_without_patience(node: Node) -> int:
    """Have the daemon drain, and then wait no longer for what is under way; returns its exit code."""
    node.signal(signal.SIGTERM)
    wait_until(lambda: not node.state()["is_ready"])
    return node.stop()


def test_a_load_that_hangs_at_its_end_is_broken_off_and_leaves_the_disk_sound(node: Node, hosted: Hosted) -> None:
    hosted.proxy.script("GET .*safetensors", "ok ok ok " + "hold " * 50)
    client = ClientProcess(hosted.url, hosted.options)
    with clients(client):
        hosted.proxy.wait_stopped(timeout_s=60)
        wait_until(lambda: node.image(hosted.url).get("n_leases") == 1)
        assert end_without_patience(node) == 0
        hosted.proxy.reset()
        hosted.proxy.release()
        loaded = client.result()
        assert loaded["tensors"] == fingerprint(hosted.tensors)
        assert any("starting again without it" in warning for warning in loaded["report"]["warnings"])
        client.end()
    assert staged_files(node.folder) == []
    found = weightcache.verify(deep=True)
    assert found.n_chunks > 0
    assert found.rotten + found.lost + found.problems == []


def test_a_library_that_hangs_does_not_keep_it(node: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        options = ["--storage-option", "host=127.0.0.1", "--storage-option", f"port={silent.getsockname()[1]}"]
        command = [sys.executable, "-m", "weightcache", "warm", "webhdfs:///model", *options]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as waiting:
            asking, _ = silent.accept()
            with asking:
                assert end_without_patience(node) == 0
            assert waiting.wait(60) == errors.DaemonError.exit_code
    assert not node.socket.exists()
    assert "ending without them" in node.log.read_text()


# -- whom it serves


@pytest.mark.parametrize(
    ("configuration", "says"),
    [
        ('[node]\nregion = "eu-west-1"\n', "policies, stores or place"),
        ('[stores.prod]\n[[stores.prod.replicas]]\nurl = "/mnt/registry"\n', "policies, stores or place"),
    ],
)
def test_a_client_of_other_rules_goes_by_itself(
    node: Node, hosted: Hosted, tmp_path: Path, configuration: str, says: str
) -> None:
    other = tmp_path / "other.toml"
    other.write_text(configuration)
    client = ClientProcess(hosted.url, hosted.options, {"WEIGHTCACHE_CONFIG": str(other)})
    with clients(client):
        assert says in client.result()["report"]["choices"]["daemon"]
        client.end()


def test_a_client_of_other_credentials_goes_by_itself(
    node: Node, hosted: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", hosted.options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", hosted.options["secret"])
    options = {key: value for key, value in hosted.options.items() if key not in ("key", "secret")}
    with weightcache.load_model(hosted.url, "cpu", storage_options=options) as model:
        assert "AWS_ACCESS_KEY_ID" in model.report.choices["daemon"]


def test_credentials_that_are_refused_see_nothing_that_others_have(node: Node, hosted: Hosted) -> None:
    with load(hosted):
        pass
    wrong = {**hosted.options, "secret": "wrong"}
    with pytest.raises(errors.AccessDeniedError):
        weightcache.load_model(hosted.url, "cpu", storage_options=wrong)


@pytest.mark.parametrize(
    ("token", "url_is_allowed", "says"),
    [("right", True, ""), ("right", False, "may not have"), ("wrong", True, "token")],
)
def test_a_token_gives_the_models_of_its_class(
    hosted: Hosted, tmp_path: Path, token: str, url_is_allowed: bool, says: str
) -> None:
    (tmp_path / "right").write_text("sesame\n")
    (tmp_path / "wrong").write_text("guess\n")
    pattern = hosted.url if url_is_allowed else "s3://elsewhere/*"
    configuration = (
        f'[daemon]\nhttp = ""\ntoken_file = "{tmp_path / token}"\n'
        f'[[daemon.clients]]\nname = "a team"\ntoken_file = "{tmp_path / "right"}"\nmodels = ["{pattern}"]\n'
    )
    with TokenNode(configuration, tmp_path / "right"), load(hosted) as model:
        assert_same(model, hosted.tensors)
        told = model.report.choices["daemon"]
        assert says in told if says else told.startswith("attached")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("is_allowed", [False, True])
def test_another_user_is_served_if_he_is_named(start: Callable[..., Node], is_allowed: bool) -> None:
    nobody = 65534
    node = start(f'[daemon]\nhttp = ""\nuids = [{nobody if is_allowed else 1}]\n')  # other folders hide the socket
    folder = os.open(node.socket.parent, os.O_PATH)
    connecting = f"""if True:
        import json, os, socket
        os.fchdir({folder})
        os.setresuid({nobody}, {nobody}, {nobody})
        sock = socket.socket(socket.AF_UNIX)
        sock.connect("socket")
        body = json.dumps({{"v": 1, "op": "status"}}).encode()
        try:
            sock.sendall(len(body).to_bytes(4, "big") + body)
        except BrokenPipeError:
            pass
        nbytes = int.from_bytes(sock.recv(4), "big")
        print(json.loads(sock.recv(nbytes, socket.MSG_WAITALL))["ok"])
    """
    ran = subprocess.run(
        [sys.executable, "-c", connecting], pass_fds=[folder], capture_output=True, text=True, timeout=60
    )
    os.close(folder)
    assert ran.stdout == f"{is_allowed}\n", ran.stderr
    wait_until(lambda: node.state()["n_refused"] == (0 if is_allowed else 1))


def test_a_quota_of_prefetches_is_kept(hosted: Hosted, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("sesame")
    configuration = (
        f'[daemon]\nhttp = ""\ntoken_file = "{tmp_path}/token"\n'
        f'[[daemon.clients]]\nname = "a team"\ntoken_file = "{tmp_path}/token"\nprefetch_bytes_per_day = "1MiB"\n'
    )
    with TokenNode(configuration, tmp_path / "token"):
        weightcache.warm(hosted.url, storage_options=hosted.options)
        with pytest.raises(errors.AccessDeniedError, match="within a day"):
            weightcache.warm(hosted.url, storage_options=hosted.options)


# -- what it is asked


def say(node: Node, raw: bytes) -> dict[str, object] | None:
    """Send bytes; return the answer, None where it just closes."""
    with node.connect() as sock:
        try:
            sock.sendall(raw)
            sock.shutdown(socket.SHUT_WR)
            return receive(sock)
        except (ConnectionError, BrokenPipeError):
            return None


def message(**fields: object) -> bytes:
    body = json.dumps({"v": 1, **fields}).encode()
    return len(body).to_bytes(4, "big") + body


NONSENSE = {
    "no JSON": (4).to_bytes(4, "big") + b"\xff{}]",
    "no object": (2).to_bytes(4, "big") + b"[]",
    "too long": (1 << 31).to_bytes(4, "big") + b"{",
    "nested": (100_000).to_bytes(4, "big") + b"[" * 100_000,
    "another version": message(v=2, op="status"),
    "no op": message(),
    "unknown op": message(op="nonsense"),
    "op of another kind": message(op=["status"]),
    "no fields": message(op="attach"),
    "fields of another kind": message(
        op="attach", uri=1, options=[], place=3, resident_only=3, rules=1, surroundings=2
    ),
    "no URI": message(op="evict", uri="\0", options={}),
    "a report of nothing": message(op="report", report={}),
    "half": message(op="status")[:-3],
    "half a head": b"\0\0",
    "nothing": b"",
}


@pytest.mark.parametrize("raw", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_ends_its_connection_alone(node: Node, raw: bytes) -> None:
    with node.connect() as other:
        answer = say(node, raw)
        assert answer is None or answer["ok"] is False
        other.sendall(message(op="status"))
        assert receive(other)["ok"]


def test_descriptors_that_are_sent_to_it_are_not_kept(node: Node, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    with node.connect() as sock, ours.open("w") as file:
        for _ in range(2):
            sent = array.array("i", [file.fileno()] * 200)
            sock.sendmsg([message(op="status")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, sent)])
            assert receive(sock)["ok"]
        assert str(ours) not in open_files(node)


def open_files(node: Node) -> list[str]:
    found = []
    for descriptor in Path(f"/proc/{node.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # its own come and go
            found.append(str(descriptor.readlink()))
    return found


def test_a_client_that_says_nothing_is_let_go(node: Node) -> None:
    with node.connect() as silent:
        assert silent.recv(4) == b""


def test_garbage_leaves_it_as_it_was(node: Node) -> None:
    assert fuzz(node, n_messages=3000, seed=1).wrong == []


def test_kills_at_random_moments_leave_nothing(start: Callable[..., Node], hosted: Hosted) -> None:
    assert kill_at_random(start(), hosted, n_kills=4, seed=1).wrong == []
