"""The Hub face: what the Hub's own client, transformers and hand-written requests get from it."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import models
import pytest
from commands import Answer as RunAnswer
from hosted import Hosted, host
from nodes import Node, wait_until
from reference import hashes
from served_hub import ServedHub
from servers import Bucket, Proxy, S3Server

import weightcache
from weightcache.errors import ConfigError, ModelNotFoundError, UnsafeFormatError

CLIENT_TIMEOUT_S = 300.0
GGUF_NBYTES = (19 << 20) + 123


def write_model(folder: Path, seed: int = 0) -> Path:
    """Write a model with what a repository holds beside: a GGUF file of two chunks, a folder, a file without a byte."""
    models.write_tiny_sharded(folder, seed=seed)
    (folder / "tiny.gguf").write_bytes(b"GGUF" + os.urandom(GGUF_NBYTES - 4))
    (folder / "sub").mkdir()
    (folder / "sub" / "a b.txt").write_text("a name with a space")
    (folder / "empty").touch()
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture(scope="module")
def seen(s3: S3Server, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What a client sees, told by one process: its imports take longer than all that it asks."""
    work = tmp_path_factory.mktemp("hub-client")
    bucket = s3.create_bucket()
    with pytest.MonkeyPatch.context() as env:
        env.setenv("WEIGHTCACHE_DIR", str(work / "cache"))
        env.setenv("WEIGHTCACHE_CONFIG", os.devnull)
        for name, value in s3.environment().items():
            env.setenv(name, value)
        uri, registry = bucket.upload(folder, "many/tiny"), work / "registry"
        for number in (1, 2):
            (work / f"v{number}").mkdir()
            models.write_safetensors(work / f"v{number}" / "model.safetensors", {"a": ("F32", (99,))}, number)
            weightcache.publish(work / f"v{number}", f"{registry}/small@v{number}")
        laid = weightcache.materialise(uri, "org/laid", cache_dir=work / "laid")
        repos = {
            "org/tiny": uri,
            "org/*": f"{bucket.url}/many/{{name}}",
            "org/published": f"{registry}/small@v1",
            "org/any": uri,
        }
        with ServedHub(repos) as face, ServedHub({}, upstream=face.url) as below:
            own = {"HF_ENDPOINT": face.url, "HF_HOME": str(work / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
            script = Path(__file__).parents[1] / "hub_client.py"
            ran = subprocess.run(
                [sys.executable, script, below.url, folder, work / "laid"],
                env={**os.environ, **own},
                capture_output=True,
                text=True,
                timeout=CLIENT_TIMEOUT_S,
            )
    bucket.remove()
    assert ran.returncode == 0, ran.stderr
    told: dict[str, Any] = json.loads(ran.stdout)
    yield {**told, "laid": laid, "work": work}


@pytest.fixture
def face(folder: Path) -> Iterator[ServedHub]:
    with ServedHub({"org/tiny": str(folder)}) as face:
        yield face


@pytest.fixture
def hosted(folder: Path, bucket: Bucket, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Hosted:
    hosted = host(folder, bucket, proxy)
    for name, value in hosted.environment.items():
        monkeypatch.setenv(name, value)
    return hosted


# The client


def test_client_is_told_the_files_and_their_sizes(seen: dict[str, Any], folder: Path) -> None:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert seen["sizes"] == {name: path.stat().st_size for name, path in files.items()}
    assert seen["tree"] == sorted([*files, "sub"])
    assert seen["paths"] == ["sub/a b.txt", "sub"]


def test_snapshot_is_the_model_bit_for_bit(seen: dict[str, Any], folder: Path) -> None:
    assert seen["snapshot"] == hashes(folder)


def test_one_file_is_downloaded_alone(seen: dict[str, Any], folder: Path) -> None:
    assert seen["one of many"] == {"config.json": hashes(folder)["config.json"]}


def test_client_reads_here_and_there_in_a_file(seen: dict[str, Any], folder: Path) -> None:
    whole = (folder / "tiny.gguf").read_bytes()
    places = (18 << 20, 0, (16 << 20) - 10)
    assert seen["seek"] == [sha256(whole[at : at + 1000]).hexdigest() for at in places]


def test_tags_and_commits_of_a_registry_are_revisions(seen: dict[str, Any]) -> None:
    v2 = hashes(seen["work"] / "v2")
    assert sorted(seen["tags"]) == ["v1", "v2"]
    assert seen["tagged"] == v2
    assert seen["by commit"] == v2


def test_client_raises_its_own_errors(seen: dict[str, Any]) -> None:
    assert seen["errors"] == {
        "repository": "RepositoryNotFoundError",
        "file": "RemoteEntryNotFoundError",
        "revision": "RevisionNotFoundError",
        "commit": "RevisionNotFoundError",
        "published revision": "RevisionNotFoundError",
        "tree": "RemoteEntryNotFoundError",
        "who": "HfHubHTTPError",
        "upstream": "RepositoryNotFoundError",
    }


def test_transformers_load_the_same_weights_from_the_face(seen: dict[str, Any]) -> None:
    assert seen["weights"]["face"] == seen["weights"]["folder"]
    assert seen["tokens"] == [3, 4]


def test_face_fetches_from_another_hub(seen: dict[str, Any], folder: Path) -> None:
    assert seen["below"] == hashes(folder)


def test_materialised_model_is_found_offline(seen: dict[str, Any], folder: Path) -> None:
    assert seen["offline"] == hashes(folder)
    assert seen["offline weights"] == seen["weights"]["folder"]
    assert (seen["work"] / "laid/models--org--laid/refs/main").read_text() == seen["laid"].commit == seen["sha"]


# Requests


@pytest.mark.parametrize(("header", "cut"), [("bytes=5-9", slice(5, 10)), ("bytes=-7", slice(-7, None))])
def test_part_of_a_file_is_answered(face: ServedHub, folder: Path, header: str, cut: slice) -> None:
    answer = face.ask("/org/tiny/resolve/main/config.json", Range=header)
    assert (answer.status, answer.body) == (206, (folder / "config.json").read_bytes()[cut])


def test_download_that_broke_off_is_resumed(face: ServedHub, folder: Path) -> None:
    whole, at = (folder / "tiny.gguf").read_bytes(), (17 << 20) + 1
    answer = face.ask("/org/tiny/resolve/main/tiny.gguf", Range=f"bytes={at}-")
    assert answer.headers["Content-Range"] == f"bytes {at}-{len(whole) - 1}/{len(whole)}"
    assert answer.body == whole[at:]


def test_range_behind_the_end_is_refused_with_the_size(face: ServedHub, folder: Path) -> None:
    answer = face.ask("/org/tiny/resolve/main/config.json", Range="bytes=99999-")
    nbytes = (folder / "config.json").stat().st_size
    assert (answer.status, answer.headers["Content-Range"]) == (416, f"bytes */{nbytes}")


def test_what_was_begun_of_another_state_is_sent_whole(face: ServedHub, folder: Path) -> None:
    answer = face.ask("/org/tiny/resolve/main/config.json", Range="bytes=5-", If_Range='"another"')
    assert (answer.status, answer.body) == (200, (folder / "config.json").read_bytes())


def test_head_tells_of_a_file_and_that_xet_is_not_spoken(face: ServedHub, folder: Path) -> None:
    answer = face.ask("/org/tiny/resolve/main/config.json", "HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["Content-Length"] == str((folder / "config.json").stat().st_size)
    assert answer.headers["ETag"] == answer.headers["X-Linked-Etag"]
    assert not [name for name in answer.headers if "xet" in name.lower()]


@pytest.mark.parametrize(
    "path",
    [
        "/org/tiny/resolve/main/../../../../etc/passwd",
        "/org/tiny/resolve/main/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/org/tiny/resolve/main//etc/passwd",
        "/org/tiny/resolve/main/%2fetc%2fpasswd",
        "/org/tiny/resolve/..%2f..%2f../etc/passwd",
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/resolve/main/etc/passwd",
        "/api/models/org/..%2f..%2fetc/tree/main",
        "/api/models/org/tiny/tree/main/..%2f..",
        "/org/tiny/resolve/main/config.json%00",
    ],
)
def test_hostile_path_finds_nothing(face: ServedHub, path: str) -> None:
    assert face.ask(path).status == 404


@pytest.mark.parametrize("revision", ["x%2F..%2F..%2Fother%2Fsmall@v1", "v1%2F", "blake3:..%2Fv1", "%00", ""])
def test_hostile_revision_does_not_lead_to_another_registry(tmp_path: Path, revision: str) -> None:
    (tmp_path / "model").mkdir()
    models.write_safetensors(tmp_path / "model" / "model.safetensors", {"a": ("F32", (99,))})
    for name in ("own", "other"):
        weightcache.publish(tmp_path / "model", f"{tmp_path / name}/small@v1")
    (tmp_path / "own" / "small@x").mkdir()  # without it the system goes no further
    with ServedHub({"org/small": f"{tmp_path}/own/small@v1"}) as face:
        answer = face.ask(f"/org/small/resolve/{revision}/model.safetensors")
    assert (answer.status, answer.headers["X-Error-Code"]) == (404, "RevisionNotFound")


def test_other_name_of_this_machine_is_not_answered(face: ServedHub) -> None:
    assert face.ask("/api/models/org/tiny", Host="evil.example").status == 421


def test_nothing_is_written(face: ServedHub) -> None:
    assert {face.ask("/api/models/org/tiny", method).status for method in ("POST", "PUT", "DELETE")} == {405}


def test_model_that_changed_is_another_commit(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.gguf").write_bytes(b"GGUF one")
    with ServedHub({"org/a": str(folder)}) as face:
        before = face.ask("/org/a/resolve/main/a.gguf", "HEAD").headers
        (folder / "a.gguf").write_bytes(b"GGUF two and more")
        wait_until(lambda: face.ask("/org/a/resolve/main/a.gguf", "HEAD").headers["ETag"] != before["ETag"])
        assert face.ask("/org/a/resolve/main/a.gguf").body == b"GGUF two and more"
        gone = face.ask(f"/org/a/resolve/{before['X-Repo-Commit']}/a.gguf")
    assert (gone.status, gone.headers["X-Error-Code"]) == (404, "RevisionNotFound")


def test_file_that_changes_while_it_is_sent_is_not_taken_for_whole(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "a.gguf"
    with path.open("wb") as file:
        file.truncate(200 << 20)  # more than is read ahead of a client that takes nothing
    with ServedHub({"org/a": str(path.parent)}) as face:
        connection = http.client.HTTPConnection("127.0.0.1", face.port, timeout=CLIENT_TIMEOUT_S)
        connection.request("GET", "/org/a/resolve/main/a.gguf")
        response = connection.getresponse()
        response.read(1)
        os.utime(path, (1, 1))
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()
        connection.close()


def test_clients_at_the_same_time_cost_the_origin_one(hosted: Hosted, folder: Path) -> None:
    whole = (folder / "tiny.gguf").read_bytes()
    with ServedHub({"org/tiny": hosted.url}) as face, ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(lambda _: face.ask("/org/tiny/resolve/main/tiny.gguf").body, range(6)))
    assert all(answer == whole for answer in answers)
    assert hosted.proxy.body_bytes(r"\.gguf(\?|$)") == len(whole)


def test_what_was_served_is_on_disk_when_the_origin_is_down(hosted: Hosted, folder: Path) -> None:
    with ServedHub({"org/tiny": hosted.url}) as face:
        face.ask("/org/tiny/resolve/main/tiny.gguf")
    served = b"".join(weightcache.read(hosted.url, "tiny.gguf", 5, 17 << 20, offline=True))
    assert served == (folder / "tiny.gguf").read_bytes()[5 : 17 << 20]


def test_bytes_that_changed_on_the_way_are_not_sent(hosted: Hosted) -> None:
    weightcache.prefetch(hosted.url)
    shard = "model-00001-of-00003.safetensors"
    [rotten, *_] = sorted(
        Path(os.environ["WEIGHTCACHE_DIR"]).glob("chunks/??/*"), key=lambda path: -path.stat().st_size
    )
    content = bytearray(rotten.read_bytes())
    content[100] ^= 1
    rotten.write_bytes(content)
    with ServedHub({"org/tiny": hosted.url}) as face:
        answers = {
            name: face.ask(f"/org/tiny/resolve/main/{name}").body
            for name in (shard, shard.replace("00001", "00002", 1), shard.replace("00001", "00003", 1))
        }
    assert {name: sha256(body).hexdigest() for name, body in answers.items()} == {
        name: digest for name, digest in hashes(hosted.folder).items() if name in answers
    }


def test_residency_policy_refuses_a_repository(tmp_path: Path, hosted: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = '[node]\njurisdiction = "eu"\nallow = { jurisdictions = ["eu"] }\n'
    (tmp_path / "weightcache.toml").write_text(rules)
    monkeypatch.setenv("WEIGHTCACHE_CONFIG", str(tmp_path / "weightcache.toml"))
    with ServedHub({"org/tiny": hosted.url}, upstream="http://127.0.0.1:9") as face:
        answers = [face.ask(f"/{repo}/resolve/main/config.json") for repo in ("org/tiny", "org/other")]
    assert [answer.status for answer in answers] == [403, 403]
    assert "allow" in answers[0].headers["X-Error-Message"]
    assert {row["allowed"] for row in weightcache.rulings() if row["verb"] == "read"} == {False}
    assert not [line for line in hosted.proxy.requests if "config.json" in str(line)]


def test_what_came_from_an_upstream_is_served_while_that_is_down(folder: Path) -> None:
    path = "/org/tiny/resolve/main/config.json"
    with ServedHub({"org/tiny": str(folder)}) as upstream:
        with ServedHub({}, upstream=upstream.url) as face:
            first = face.ask(path)
        below = ServedHub({}, upstream=upstream.url)
    with below as face:
        again = face.ask(path)
    assert (first.status, again.status, again.body) == (200, 200, (folder / "config.json").read_bytes())
    assert again.headers["ETag"] == first.headers["ETag"]


# Its commands


def test_command_serves_until_it_is_told_to_end(folder: Path) -> None:
    arguments = ["hub", "serve", "--address", "127.0.0.1:0", "--model", f"org/tiny={folder}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "weightcache", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(
                b"GET /org/tiny/resolve/main/config.json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            )
            answer = b"".join(iter(lambda: client.recv(65536), b""))
    finally:
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=CLIENT_TIMEOUT_S)
    assert answer.endswith((folder / "config.json").read_bytes())
    assert (process.returncode, told) == (0, "")


def test_a_hub_without_repositories_is_refused() -> None:
    with pytest.raises(ConfigError, match="no repository"):
        weightcache.serve_hub(address="127.0.0.1:0")


def test_daemon_serves_what_it_has_in_memory(folder: Path, hosted: Hosted, start: Callable[..., Node]) -> None:
    node = start(f'[hub]\naddress = "127.0.0.1:0"\n[hub.models]\n"org/tiny" = "{hosted.url}"\n')
    weightcache.warm(hosted.url)
    hosted.proxy.reset()
    port = int(node.log.read_text().partition("the Hub face answers at 127.0.0.1:")[2].split()[0])
    asked = ServedHub({})
    asked.port = port
    name = "model-00002-of-00003.safetensors"
    assert asked.ask(f"/org/tiny/resolve/main/{name}").body == (folder / name).read_bytes()
    assert hosted.served_bytes() < 4096  # a header, which is no tensor
    assert node.stop() == 0  # with the model still open


def test_file_is_read_from_the_daemons_memory(hosted: Hosted, node: Node) -> None:
    weightcache.warm(hosted.url)
    hosted.proxy.reset()
    name = "model-00002-of-00003.safetensors"
    assert b"".join(weightcache.read(hosted.url, name, cache="auto")) == (hosted.folder / name).read_bytes()
    assert hosted.served_bytes() < 4096  # a header, which is no tensor


def test_materialised_again_writes_nothing_and_is_removed_whole(
    tmp_path: Path, hosted: Hosted, answer: RunAnswer
) -> None:
    arguments = ("--repo", "org/tiny", "--cache-dir", tmp_path / "hf")
    first = answer("hub", "materialise", hosted.url, *arguments)
    again = answer("hub", "materialise", hosted.url, *arguments)
    assert (first["written_bytes"], again["written_bytes"]) == (hosted.nbytes, 0)
    assert hashes(first["path"]) == hashes(hosted.folder)
    assert answer("hub", "remove", *arguments)["bytes"] == hosted.nbytes
    assert not list((tmp_path / "hf").glob("models--*"))


def test_removal_leaves_what_others_downloaded(tmp_path: Path, folder: Path) -> None:
    cache = tmp_path / "hf"
    laid = weightcache.materialise(folder, "org/tiny", cache_dir=cache)
    other = cache / "models--org--tiny" / "snapshots" / ("0" * 40)
    other.mkdir()
    blob = cache / "models--org--tiny" / "blobs" / ("f" * 40)
    blob.write_bytes(b"another's")
    (other / "theirs").symlink_to(blob)
    (other / "shared").symlink_to((laid.path / "config.json").resolve())
    weightcache.remove_materialised("org/tiny", cache_dir=cache)
    assert sorted(path.name for path in other.iterdir() if path.is_file()) == ["shared", "theirs"]
    with pytest.raises(ModelNotFoundError, match="hf cache rm"):
        weightcache.remove_materialised("org/tiny", cache_dir=cache)


def test_snapshot_that_broke_off_does_not_appear(tmp_path: Path, folder: Path) -> None:
    cache = tmp_path / "hf"
    (cache / "models--org--tiny").mkdir(parents=True)
    (cache / "models--org--tiny" / "blobs").write_text("in the way")
    with pytest.raises(weightcache.errors.CapacityError, match="cannot write org/tiny"):
        weightcache.materialise(folder, "org/tiny", cache_dir=cache)
    assert [path.name for path in (cache / "models--org--tiny").iterdir()] == ["blobs"]


# Models without safetensors


def test_model_of_gguf_alone_is_listed_pulled_and_refused_by_loads(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "gguf").mkdir()
    shutil.copy(folder / "tiny.gguf", tmp_path / "gguf")
    assert [file.path for file in weightcache.list_files(tmp_path / "gguf").files] == ["tiny.gguf"]
    weightcache.pull(tmp_path / "gguf", tmp_path / "pulled", cache="disk")
    assert hashes(tmp_path / "pulled") == hashes(tmp_path / "gguf")
    with pytest.raises(ModelNotFoundError, match="no safetensors"):
        weightcache.load_model(tmp_path / "gguf", "cpu")


def test_pickled_weights_are_carried_as_data_and_refused_by_loads(tmp_path: Path) -> None:
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"never read")
    assert b"".join(weightcache.read(tmp_path / "pickled", "pytorch_model.bin")) == b"never read"
    with pytest.raises(UnsafeFormatError):
        weightcache.load_model(tmp_path / "pickled", "cpu")


# Its page


def test_page_of_the_face_names_settings_that_there_are(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "stacks" / "hub.md").read_text()
    (tmp_path / "weightcache.toml").write_text(page.partition("```toml\n")[2].partition("```")[0])
    settings = weightcache.configuration(tmp_path / "weightcache.toml").settings
    assert settings.hub is not None
    assert settings.hub.uri_of("team/llama") == "s3://bucket/team/llama"
