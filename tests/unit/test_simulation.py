"""What a month of loads costs: every number by hand, through tiers, free shares and the cache."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from weightcache.errors import ConfigError
from weightcache.prices import UNPRICED, Overrides
from weightcache.residency import Site
from weightcache.simulation import Month, make_case, simulate
from weightcache.stores import Replica, Store


def months(
    model_gb: float = 140.0,
    n_loads: int = 100,
    n_nodes: int = 1,
    hit_share: float | None = None,
    stores: Mapping[str, Store] | None = None,
    overrides: Overrides | None = None,
) -> dict[str, Month]:
    simulated = simulate(make_case(model_gb, n_loads, n_nodes, hit_share), stores or {}, overrides or {})
    return {month.store: month for month in simulated.months}


# 140 GB are 8344.65 ranges of 16 MiB, so 8345 GETs, and 834,500 for 100 loads, which bring 14,000 GB.
@pytest.mark.parametrize(
    ("provider", "storage", "egress", "requests", "cached_egress", "cached_requests"),
    [
        # (10,000 - 100) x 0.09 + 4,000 x 0.085 = 891 + 340; one load: (140 - 100) x 0.09
        ("aws", 3.22, 1231.00, 0.3338, 3.60, 0.003338),
        ("gcs", 2.80, 1680.00, 0.3338, 16.80, 0.003338),
        # (14,000 - 100) x 0.087; (140 - 100) x 0.087
        ("azure", 2.52, 1209.30, 0.41725, 3.48, 0.0041725),
        ("r2", 2.10, 0.0, 0.30042, 0.0, 0.0030042),
        ("tigris", 2.80, 0.0, 0.41725, 0.0, 0.0041725),
        ("b2", 0.84, 140.00, 0.3338, 1.40, 0.003338),
    ],
)
def test_a_month_of_100_cold_loads_of_140_gb(
    provider: str, storage: float, egress: float, requests: float, cached_egress: float, cached_requests: float
) -> None:
    month = months()[provider]
    assert month.storage_usd == pytest.approx(storage)
    assert month.egress_usd == pytest.approx(egress)
    assert month.requests_usd == pytest.approx(requests)
    assert month.cached_egress_usd == pytest.approx(cached_egress)
    assert month.cached_requests_usd == pytest.approx(cached_requests)


def test_sums_of_a_month() -> None:
    month = months()["aws"]
    assert month.usd == pytest.approx(1234.5538)  # 3.22 + 1231.00 + 0.3338
    assert month.cached_usd == pytest.approx(6.823338)  # 3.22 + 3.60 + 0.003338
    assert month.saved_usd == pytest.approx(1227.730462)


def test_cold_loads_are_one_a_node_or_what_the_hit_share_leaves() -> None:
    assert [make_case(1, 100, n_nodes, None).n_cold for n_nodes in (1, 4, 100, 200)] == [1, 4, 100, 100]
    assert [make_case(1, 100, 4, share).n_cold for share in (0.0, 0.9, 0.995, 1.0)] == [100, 10, 1, 0]
    assert make_case(1, 10, 1, 0.7).n_cold == 3


def test_ranges_are_counted_up() -> None:
    assert [make_case(gb, 1, 1, None).n_gets for gb in (16777216e-9, 16777217e-9, 1e-9)] == [1, 2, 1]


def test_every_tier_of_aws_is_gone_through() -> None:
    # 200 TB: 9,900 x 0.09 + 40,000 x 0.085 + 100,000 x 0.07 + 50,000 x 0.05
    month = months(model_gb=1000, n_loads=200)["aws"]
    assert month.egress_usd == pytest.approx(891 + 3400 + 7000 + 2500)
    assert month.priced_by == (
        "0.023 USD a GB and month; egress 0 USD a GB, 0.09 from 100 GB, 0.085 from 10 TB, 0.07 from 50 TB, 0.05 from 150 TB; "
        "0.0004 USD for 1000 GETs (list prices of 2026-11 to the internet)"
    )


def test_configured_replicas_have_months_of_their_own() -> None:
    replicas = (
        Replica("home", "s3://bucket/r", "http://10.0.0.7:9000"),
        Replica("far", "s3://bucket/r", site=Site("aws", "eu-central-1", "eu"), egress_usd_per_gb=0.02),
        Replica("front", "s3://bucket/r", "https://models.example.com", Site("b2")),
    )
    found = months(stores={"prod": Store("prod", replicas)})
    assert list(found)[-3:] == ["prod/home", "prod/far", "prod/front"]
    assert (found["prod/home"].usd, found["prod/home"].priced_by) == (0, UNPRICED)
    assert found["prod/far"].egress_usd == pytest.approx(280.0)  # no tiers: 14,000 x 0.02
    assert found["prod/far"].storage_usd == pytest.approx(3.22)
    assert found["prod/front"].usd == pytest.approx(141.1738)  # as at b2


def test_configured_prices_beat_the_list_and_end_its_tiers() -> None:
    month = months(overrides={"aws": {"egress_usd_per_gb": 0.01, "storage_usd_per_gb_month": 0.1}})["aws"]
    assert (month.storage_usd, month.egress_usd) == (pytest.approx(14.0), pytest.approx(140.0))
    assert month.requests_usd == pytest.approx(0.3338)
    assert month.priced_by == (
        "0.1 USD a GB and month; egress 0.01 USD a GB; 0.0004 USD for 1000 GETs (prices set in the configuration)"
    )


def test_simulation_is_json() -> None:
    simulated = json.loads(json.dumps(simulate(make_case(140, 100, 2, None), {}, {}).as_dict()))
    assert {name: simulated[name] for name in ("model_bytes", "n_loads", "n_nodes", "n_cold", "n_gets")} == {
        "model_bytes": 140 * 10**9,
        "n_loads": 100,
        "n_nodes": 2,
        "n_cold": 2,
        "n_gets": 8345,
    }
    [aws] = [month for month in simulated["months"] if month["store"] == "aws"]
    assert aws["usd"] == pytest.approx(1234.5538)
    assert aws["saved_usd"] == pytest.approx(aws["usd"] - aws["cached_usd"])


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ((0, 1, 1, None), "model_gb=0: expected"),
        ((-1, 1, 1, None), "model_gb=-1"),
        ((float("nan"), 1, 1, None), "model_gb=nan"),
        ((float("inf"), 1, 1, None), "model_gb=inf"),
        ((1, 0, 1, None), "n_loads=0: expected"),
        ((1, 1, 0, None), "n_nodes=0: expected"),
        ((1, 1, 1, 1.1), "hit_share=1.1: expected"),
        ((1, 1, 1, -0.1), "hit_share=-0.1"),
        ((1, 1, 1, float("nan")), "hit_share=nan"),
    ],
)
def test_case_that_makes_no_sense_is_refused(case: tuple[float, int, int, float | None], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_case(*case)
