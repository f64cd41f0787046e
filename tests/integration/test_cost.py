"""What loads cost, end to end: the report, the counters and the cache folder's ledger tell what the proxy saw."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import models
import pytest
import torch
from hosted import Hosted, host
from servers import Bucket, Proxy

import weightcache
from weightcache import meters
from weightcache.report import Report

TIMEOUT_S = 60.0
LAYERS: models.Shapes = {f"layer{number}": ("F32", (256, 1024)) for number in range(4)}
LISTING = "list-type=2"
PRICES = '[prices."127.0.0.1"]\negress_usd_per_gb = 1.0\nget_usd_per_1000 = 2.0\nlist_usd_per_1000 = 4.0\n'


@pytest.fixture
def hosted(tmp_path: Path, bucket: Bucket, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Hosted:
    """Four tensors of 1 MiB, each a chunk and a request, and a configuration."""
    monkeypatch.setenv("WEIGHTCACHE_RANGE_BYTES", "1MiB")
    monkeypatch.setattr(meters, "_numbers", {})
    (tmp_path / "model").mkdir()
    models.write_safetensors(tmp_path / "model" / "model.safetensors", LAYERS)
    (tmp_path / "model" / "config.json").write_text("{}")
    return host(tmp_path / "model", bucket, proxy)


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request at a time: of several, one that a failure cancels may be counted and not be seen."""
    monkeypatch.setenv("WEIGHTCACHE_CONNECTIONS", "1")


@pytest.fixture
def priced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prices for the proxy."""
    (tmp_path / "prices.toml").write_text(PRICES)
    monkeypatch.setenv("WEIGHTCACHE_CONFIG", str(tmp_path / "prices.toml"))


def load(hosted: Hosted, **arguments: object) -> Report:
    """Load and close a model, and wait until all is written."""
    with weightcache.load_model(hosted.url, "cpu", storage_options=hosted.options, **arguments) as model:  # type: ignore[arg-type]
        assert model.wait_stored(TIMEOUT_S)
        return model.report


def place(hosted: Hosted) -> str:
    return f"{hosted.proxy.endpoint}/{hosted.bucket.name}"


def seen(proxy: Proxy) -> dict[str, int]:
    """Return what the proxy saw, named as a report names it."""
    requests = proxy.requests
    n_lists = sum(LISTING in request.path for request in requests)
    n_bytes = sum(request.body_bytes for request in requests)
    return {"n_gets": len(requests) - n_lists, "n_lists": n_lists, "received_bytes": n_bytes}


def assert_tells(report: Report, hosted: Hosted) -> None:
    """The report's one replica has the proxy's counts."""
    told = report.as_dict()
    [(name, facts)] = told["replicas"].items()
    counted = seen(hosted.proxy)
    assert name == place(hosted)
    assert {key: facts[key] for key in counted} == counted
    assert told["n_requests"] == facts["n_gets"] + facts["n_lists"] == len(hosted.proxy.requests)
    assert told["n_retries"] == facts["n_retries"]


def test_report_tells_what_the_origin_was_asked_for(hosted: Hosted) -> None:
    report = load(hosted)
    assert_tells(report, hosted)
    assert report.replicas[place(hosted)]["received_bytes"] == report.bytes["origin"] + report.metadata_bytes


def test_report_of_a_warm_load_tells_of_its_listing(hosted: Hosted) -> None:
    load(hosted)
    hosted.proxy.reset()
    report = load(hosted)
    assert_tells(report, hosted)


def test_report_tells_of_what_failed(hosted: Hosted) -> None:
    hosted.proxy.script("GET .*safetensors", "ok 503 ok 500")
    report = load(hosted)
    assert_tells(report, hosted)
    assert report.n_retries == 2


@pytest.mark.usefixtures("one_by_one")
def test_report_tells_of_an_attempt_before_a_change(hosted: Hosted) -> None:
    hosted.proxy.script("GET .*safetensors", "ok ok 412")
    report = load(hosted)
    assert_tells(report, hosted)


def test_report_of_load_into_tells_of_its_look(hosted: Hosted) -> None:
    module = torch.nn.Module()
    for name, (_, shape) in LAYERS.items():
        module.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
    assert_tells(weightcache.load_into(module, hosted.url, storage_options=hosted.options), hosted)


@pytest.mark.usefixtures("priced")
def test_load_is_priced_as_configured(hosted: Hosted) -> None:
    report = load(hosted)
    counted = seen(hosted.proxy)
    expected = counted["received_bytes"] / 1e9 + counted["n_gets"] * 0.002 + counted["n_lists"] * 0.004
    assert report.usd == pytest.approx(expected)
    assert report.choices["price"] == "127.0.0.1: prices set in the configuration"


def test_load_without_a_known_price_says_so(hosted: Hosted) -> None:
    report = load(hosted)
    assert report.usd == 0
    assert report.choices["price"] == "unknown: no price is known, counted as 0"


@pytest.mark.usefixtures("priced")
def test_ledger_of_the_folder_tells_what_the_origin_was_asked_for(hosted: Hosted) -> None:
    reports = [load(hosted), load(hosted)]
    [cost] = weightcache.cost()
    counted = seen(hosted.proxy)
    assert cost.name == place(hosted)
    assert {key: getattr(cost, key) for key in counted} == counted
    assert cost.usd == pytest.approx(sum(report.usd for report in reports))
    assert cost.saved_bytes == reports[1].bytes["disk"] >= len(LAYERS) << 20
    assert cost.saved_usd == pytest.approx(cost.saved_bytes / 1e9)
    assert [each.name for each in weightcache.cost(by="model")] == [hosted.url]


def test_stream_prefetch_pull_and_plan_are_kept_too(hosted: Hosted, tmp_path: Path) -> None:
    list(weightcache.stream(hosted.url, "cpu", cache="disk", storage_options=hosted.options))
    weightcache.plan(hosted.url, storage_options=hosted.options)
    weightcache.prefetch(hosted.url, storage_options=hosted.options)
    weightcache.pull(hosted.url, tmp_path / "pulled", storage_options=hosted.options)
    load(hosted)
    [cost] = weightcache.cost()
    counted = seen(hosted.proxy)
    assert {key: getattr(cost, key) for key in counted} == counted


@pytest.mark.usefixtures("one_by_one")
def test_load_that_fails_is_kept(hosted: Hosted) -> None:
    hosted.proxy.script("GET .*safetensors", "ok 403")
    with pytest.raises(weightcache.errors.AccessDeniedError):
        load(hosted)
    load(hosted)
    [cost] = weightcache.cost()
    assert cost.n_gets == seen(hosted.proxy)["n_gets"]


def test_load_that_dials_nothing_is_not_kept(hosted: Hosted, tmp_path: Path) -> None:
    load(hosted)
    [path] = (tmp_path / "cache" / "ledger").iterdir()
    before = path.read_bytes()
    report = load(hosted, offline=True)
    with weightcache.load_model(hosted.folder, "cpu", cache="disk") as model:
        assert model.wait_stored(TIMEOUT_S)
        assert model.report.replicas == {}
    assert (report.replicas, report.usd) == ({}, 0.0)
    assert path.read_bytes() == before


def test_load_without_a_cache_folder_writes_nothing(hosted: Hosted, tmp_path: Path) -> None:
    report = load(hosted, cache="none")
    assert_tells(report, hosted)
    assert not (tmp_path / "cache").exists()


def test_load_is_whole_when_its_cost_cannot_be_kept(
    hosted: Hosted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache" / "ledger").touch()
    for _ in range(2):
        assert load(hosted).warnings == []
    assert [record.levelname for record in caplog.records if record.levelno >= logging.WARNING] == ["WARNING"]


def test_metrics_tell_what_the_origin_was_asked_for(hosted: Hosted) -> None:
    reports = [load(hosted), load(hosted)]
    counted = seen(hosted.proxy)
    told = dict(line.rsplit(" ", 1) for line in weightcache.metrics().splitlines() if not line.startswith("#"))
    replica = f'replica="{place(hosted)}"'
    assert told[f'weightcache_origin_requests_total{{kind="get",{replica}}}'] == str(counted["n_gets"])
    assert told[f'weightcache_origin_requests_total{{kind="list",{replica}}}'] == str(counted["n_lists"])
    assert told[f"weightcache_origin_bytes_total{{{replica}}}"] == str(counted["received_bytes"])
    assert float(told[f"weightcache_origin_usd_total{{{replica}}}"]) == 0
    for tier in ("origin", "disk", "host"):
        nbytes = sum(report.bytes[tier] for report in reports)
        assert told[f'weightcache_load_bytes_total{{tier="{tier}"}}'] == str(nbytes)


@pytest.mark.usefixtures("priced")
def test_g27_no_secret_is_counted_or_kept(hosted: Hosted, tmp_path: Path) -> None:
    report = load(hosted)
    [path] = (tmp_path / "cache" / "ledger").iterdir()
    costs = [cost.as_dict() for by in ("replica", "model", "month") for cost in weightcache.cost(by=by)]
    told = "\n".join((path.read_text(), weightcache.metrics(), json.dumps(report.as_dict()), json.dumps(costs)))
    assert hosted.url in told
    assert place(hosted) in told
    assert hosted.options["secret"] not in told
    assert hosted.options["key"] not in told
    assert "Signature" not in told
