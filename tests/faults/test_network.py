"""Loads over a network that breaks: right bytes, or an error that says what to do; never wrong bytes, never a hang."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import models
import pytest
from cache_folder import chunk_files
from hosted import Hosted, host
from reference import assert_same, tensors_of
from servers import Bucket, Proxy, S3Server

import weightcache
from weightcache.errors import (
    AccessDeniedError,
    DeadlineError,
    IntegrityError,
    ModelNotFoundError,
    OfflineError,
    OriginChangedError,
    OriginUnreachableError,
    WeightcacheError,
)
from weightcache.tensors import LoadedModel

MIB = 1 << 20
N_TENSORS = 5
ATTEMPTS = 3
N_RESUMED = 2  # times that half of what is left of 1 MiB is a piece that need not be asked for again
SHAPES: models.Shapes = {f"layer.{number}.weight": ("F32", (256, 1024)) for number in range(N_TENSORS)}
OBJECTS = r"GET .*safetensors"

PASSING = ["429", "500", "503", "503:1", "short", "long", "reset", "whole", "shift"]


@pytest.fixture
def hosted(tmp_path: Path, bucket: Bucket, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Hosted:
    """Five tensors of 1 MiB, each a chunk and a request, asked for one after the other."""
    monkeypatch.setenv("WEIGHTCACHE_RANGE_BYTES", "1MiB")
    monkeypatch.setenv("WEIGHTCACHE_CONNECTIONS", "1")
    (tmp_path / "model").mkdir()
    models.write_safetensors(tmp_path / "model" / "model.safetensors", SHAPES)
    return host(tmp_path / "model", bucket, proxy)


def load(hosted: Hosted, **arguments: object) -> LoadedModel:
    return weightcache.load_model(hosted.url, "cpu", storage_options=hosted.options, **arguments)  # type: ignore[arg-type]


def fill(hosted: Hosted) -> None:
    """Load once, so that all is on disk, and forget the traffic."""
    with load(hosted) as model:
        assert model.wait_stored(60)
    hosted.proxy.reset()


def overwrite(hosted: Hosted, seed: int) -> Path:
    """Replace the object by another of the same size; return the folder of what it is now."""
    folder = hosted.folder.with_name(f"model-{seed}")
    folder.mkdir()
    models.write_safetensors(folder / "model.safetensors", SHAPES, seed)
    hosted.bucket.upload(folder, hosted.prefix)
    return folder


# -- a request fails


@pytest.mark.parametrize("word", PASSING)
def test_g06_a_broken_answer_is_asked_for_again(hosted: Hosted, word: str) -> None:
    hosted.proxy.script(OBJECTS, f"ok ok {word} ok ok {word}")
    with load(hosted) as model:
        assert_same(model, hosted.tensors)
        assert model.report.n_retries == 2
        assert model.report.n_requests == len(hosted.proxy.requests)
        assert model.report.bytes["origin"] == N_TENSORS * MIB
        assert model.report.warnings == []
        assert model.wait_stored(60)
    hosted.proxy.reset()
    with load(hosted) as model:
        assert_same(model, hosted.tensors)
    assert hosted.served_bytes() == 0


def test_g09_a_stalled_answer_is_asked_for_again(hosted: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTCACHE_REQUEST_TIMEOUT_S", "1")
    hosted.proxy.script("GET .*list-type", "stall")
    hosted.proxy.script(OBJECTS, "stall ok stall")
    with load(hosted) as model:
        assert_same(model, hosted.tensors)
        assert model.report.n_retries >= 3


def test_g09_a_stall_that_does_not_end_is_an_error(hosted: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTCACHE_REQUEST_TIMEOUT_S", "1")
    hosted.proxy.script(OBJECTS, "ok ok" + " stall" * (N_RESUMED + ATTEMPTS))
    with pytest.raises(OriginUnreachableError, match="3 times"):
        load(hosted)


@contextmanager
def standing_still(server: S3Server) -> Iterator[None]:
    """Stop a server's process for the length of the block: its kernel accepts, and nobody answers."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


@pytest.mark.parametrize(("patience_s", "is_retried"), [("15", False), ("1", True)])
def test_g09_a_server_that_stands_still_for_a_while_costs_time_alone(
    hosted: Hosted, monkeypatch: pytest.MonkeyPatch, patience_s: str, is_retried: bool
) -> None:
    monkeypatch.setenv("WEIGHTCACHE_REQUEST_TIMEOUT_S", patience_s)
    hosted.proxy.script(OBJECTS, "ok ok hold")
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(load, hosted)
        hosted.proxy.wait_stopped()
        with standing_still(hosted.bucket.server):
            hosted.proxy.release()
            with pytest.raises(TimeoutError):
                loading.result(1.5)
        with loading.result(60) as model:
            assert_same(model, hosted.tensors)
            assert bool(model.report.n_retries) is is_retried
            assert model.report.warnings == []


@pytest.mark.parametrize("patience_s", ["15", "0.4"])
def test_g09_a_server_that_stays_still_is_an_error_within_the_deadline(
    hosted: Hosted, monkeypatch: pytest.MonkeyPatch, patience_s: str
) -> None:
    monkeypatch.setenv("WEIGHTCACHE_REQUEST_TIMEOUT_S", patience_s)
    hosted.proxy.script(OBJECTS, "ok ok hold")
    error, advice = (DeadlineError, "raise timeout_s") if patience_s == "15" else (OriginUnreachableError, "try again")
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(load, hosted, timeout_s=4.0)
        hosted.proxy.wait_stopped()
        with standing_still(hosted.bucket.server):
            hosted.proxy.release()
            began = time.monotonic()
            with pytest.raises(error, match=advice) as caught:
                loading.result(30)
            assert time.monotonic() - began < 6.0
    assert hosted.url in str(caught.value)
    with load(hosted) as model:
        assert_same(model, hosted.tensors)


def test_g09_a_server_that_never_answers_is_an_error_within_the_deadline(hosted: Hosted) -> None:
    options = hosted.bucket.server.storage_options()
    with standing_still(hosted.bucket.server), pytest.raises(DeadlineError, match="raise timeout_s"):
        weightcache.load_model(hosted.url, "cpu", storage_options=options, timeout_s=1.0)


@pytest.mark.parametrize("word", ["503", "short", "whole"])
def test_a_broken_header_or_listing_is_asked_for_again(hosted: Hosted, word: str) -> None:
    hosted.proxy.script("GET .*list-type", "503")
    hosted.proxy.script(OBJECTS, word)
    with load(hosted) as model:
        assert_same(model, hosted.tensors)
        assert model.report.n_retries == 2


def test_a_connection_that_drops_before_an_answer_costs_nothing(hosted: Hosted) -> None:
    """The HTTP client itself asks again, once: an idle connection may have been closed by the server any time."""
    hosted.proxy.script(OBJECTS, "ok drop ok drop drop ok")
    with load(hosted) as model:
        assert_same(model, hosted.tensors)
        assert model.report.n_retries <= 1
        assert model.report.bytes["origin"] == N_TENSORS * MIB


@pytest.mark.parametrize("word", ["503", "short", "whole"])
def test_g14_after_three_attempts_a_load_fails_and_the_next_goes_on_from_there(hosted: Hosted, word: str) -> None:
    n_resumed = N_RESUMED if word == "short" else 0
    hosted.proxy.script(OBJECTS, "ok ok ok" + f" {word}" * (n_resumed + ATTEMPTS))
    with pytest.raises(OriginUnreachableError, match="3 times") as caught:
        load(hosted)
    assert caught.value.facts["attempts"] == ATTEMPTS
    assert hosted.url in str(caught.value)
    asked = [request.range for request in hosted.proxy.requests if "safetensors" in request.path]
    assert len(asked) == 1 + 2 + n_resumed + ATTEMPTS
    assert len(set(asked)) == 1 + 3 + n_resumed
    hosted.proxy.reset()
    with load(hosted) as model:
        assert_same(model, hosted.tensors)
        assert model.report.bytes == {"origin": (N_TENSORS - 2) * MIB, "disk": 2 * MIB, "host": 0}
    assert hosted.served_bytes() == (N_TENSORS - 2) * MIB


@pytest.mark.parametrize(
    ("word", "error"), [("403", AccessDeniedError), ("404", ModelNotFoundError)], ids=["403", "404"]
)
def test_what_is_final_is_not_asked_for_again(hosted: Hosted, word: str, error: type[WeightcacheError]) -> None:
    hosted.proxy.script(OBJECTS, f"ok ok {word}")
    with pytest.raises(error):
        load(hosted)
    assert len([request for request in hosted.proxy.requests if request.status == int(word)]) == 1


def test_a_stream_survives_what_a_load_survives(hosted: Hosted) -> None:
    hosted.proxy.script(OBJECTS, "ok 503 ok short ok reset")
    assert_same(dict(weightcache.stream(hosted.url, "cpu", storage_options=hosted.options)), hosted.tensors)


def test_a_pull_survives_what_a_load_survives(hosted: Hosted, tmp_path: Path) -> None:
    hosted.proxy.script(OBJECTS, "ok 503 ok short ok reset")
    weightcache.pull(hosted.url, tmp_path / "pulled", storage_options=hosted.options)
    [name] = [path.name for path in (tmp_path / "pulled").iterdir()]
    assert (tmp_path / "pulled" / name).read_bytes() == (hosted.folder / name).read_bytes()


def test_a_pull_that_fails_leaves_no_file(hosted: Hosted, tmp_path: Path) -> None:
    hosted.proxy.script(OBJECTS, "ok ok" + " 503" * ATTEMPTS)
    with pytest.raises(OriginUnreachableError):
        weightcache.pull(hosted.url, tmp_path / "pulled", storage_options=hosted.options)
    assert list((tmp_path / "pulled").iterdir()) == []


# -- bytes come wrong


def lose_one_chunk(hosted: Hosted, tmp_path: Path) -> None:
    [path, *_] = [path for path in chunk_files(tmp_path / "cache").values() if path.stat().st_size == MIB]
    path.unlink()


def test_g01_a_flipped_bit_is_found_by_its_digest_and_fetched_once_more(hosted: Hosted, tmp_path: Path) -> None:
    fill(hosted)
    lose_one_chunk(hosted, tmp_path)
    hosted.proxy.script(OBJECTS, "flip")
    with load(hosted) as model:
        assert_same(model, hosted.tensors)
        assert model.report.bytes == {"origin": 2 * MIB, "disk": (N_TENSORS - 1) * MIB, "host": 0}
        assert model.wait_stored(60)
    assert hosted.served_bytes() == 2 * MIB
    assert weightcache.verify(deep=True).sound


def test_g01_bytes_that_stay_wrong_reach_nobody(hosted: Hosted, tmp_path: Path) -> None:
    fill(hosted)
    lose_one_chunk(hosted, tmp_path)
    hosted.proxy.script(OBJECTS, "flip flip")
    with pytest.raises(IntegrityError, match="expected blake3:"):
        load(hosted)
    assert len(chunk_files(tmp_path / "cache")) == N_TENSORS - 1
    with load(hosted) as model:
        assert_same(model, hosted.tensors)


# -- an object changes


def test_g05_an_object_overwritten_after_it_was_described_is_loaded_anew(hosted: Hosted) -> None:
    hosted.proxy.script(OBJECTS, "hold")
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(load, hosted)
        hosted.proxy.wait_stopped()
        changed = overwrite(hosted, 1)
        hosted.proxy.release()
        with loading.result(60) as model:
            assert_same(model, tensors_of(changed))
            assert len(model.report.warnings) == 1
            assert "changed" in model.report.warnings[0]
            assert model.wait_stored(60)
    with load(hosted, offline=True) as model:
        assert_same(model, tensors_of(changed))


def test_g05_an_object_overwritten_while_it_is_read_is_loaded_anew(hosted: Hosted) -> None:
    hosted.proxy.script(OBJECTS, "ok ok hold")
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(load, hosted)
        hosted.proxy.wait_stopped()
        changed = overwrite(hosted, 1)
        hosted.proxy.release()
        with loading.result(60) as model:
            assert_same(model, tensors_of(changed))
            assert len(model.report.warnings) == 1


def test_g05_an_object_that_keeps_changing_is_an_error(hosted: Hosted) -> None:
    hosted.proxy.script(OBJECTS, "ok 412 ok 412")
    with pytest.raises(OriginChangedError, match="load again"):
        load(hosted)
    with load(hosted) as model:
        assert_same(model, hosted.tensors)


def test_g05_a_stream_of_an_object_that_changes_is_an_error(hosted: Hosted) -> None:
    hosted.proxy.script(OBJECTS, "ok ok ok 412")
    streamed = {}
    with pytest.raises(OriginChangedError):
        for name, tensor in weightcache.stream(hosted.url, "cpu", storage_options=hosted.options):
            streamed[name] = tensor
    assert_same(streamed, {name: hosted.tensors[name] for name in streamed})
    assert len(streamed) <= 2


# -- the origin is away


def test_offline_never_dials(hosted: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(hosted)
    with load(hosted, offline=True) as model:
        assert_same(model, hosted.tensors)
    monkeypatch.setenv("WEIGHTCACHE_OFFLINE", "1")
    with load(hosted) as model:
        assert_same(model, hosted.tensors)
    assert_same(dict(weightcache.stream(hosted.url, "cpu", storage_options=hosted.options)), hosted.tensors)
    assert weightcache.plan(hosted.url, storage_options=hosted.options).origin_bytes == 0
    with pytest.raises(OfflineError):
        weightcache.load_model(f"{hosted.url}-other", "cpu", storage_options=hosted.options)
    assert hosted.proxy.requests == []
    hosted.proxy.close()
    with load(hosted) as model:
        assert_same(model, hosted.tensors)
        assert model.report.warnings == []


def stop(hosted: Hosted) -> None:
    hosted.proxy.close()


def refuse_listings(hosted: Hosted) -> None:
    hosted.proxy.script("GET .*list-type", " ".join(["503"] * ATTEMPTS))


@pytest.mark.parametrize("take_away", [stop, refuse_listings])
def test_g08_a_model_on_this_node_is_loaded_when_the_origin_is_away(
    hosted: Hosted, caplog: pytest.LogCaptureFixture, take_away: Callable[[Hosted], None]
) -> None:
    fill(hosted)
    take_away(hosted)
    with load(hosted) as model:
        assert_same(model, hosted.tensors)
        assert len(model.report.warnings) == 1
        assert "origin" in model.report.warnings[0]
        assert model.report.n_retries == ATTEMPTS - 1
        assert model.report.bytes["origin"] == 0
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    assert_same(dict(weightcache.stream(hosted.url, "cpu", storage_options=hosted.options)), hosted.tensors)


def test_g08_a_model_that_is_only_half_here_needs_its_origin(hosted: Hosted, tmp_path: Path) -> None:
    fill(hosted)
    lose_one_chunk(hosted, tmp_path)
    hosted.proxy.close()
    with pytest.raises(OriginUnreachableError, match="3 times"):
        load(hosted)


def test_a_model_that_was_never_here_needs_its_origin(hosted: Hosted) -> None:
    hosted.proxy.close()
    with pytest.raises(OriginUnreachableError, match="3 times"):
        load(hosted)


def test_g23_what_is_on_this_node_is_not_given_to_wrong_credentials(hosted: Hosted) -> None:
    fill(hosted)
    with pytest.raises(AccessDeniedError):
        weightcache.load_model(hosted.url, "cpu", storage_options=hosted.options | {"secret": "wrong"})


def test_g27_no_secret_is_logged_or_told(hosted: Hosted, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "weightcache")
    hosted.proxy.script(OBJECTS, "503 ok reset 404")
    with pytest.raises(ModelNotFoundError) as caught:
        load(hosted)
    told = f"{caught.value!r} {caught.value.facts} {caplog.text}"
    assert hosted.url in told
    assert hosted.options["secret"] not in told
    assert "Signature" not in told
