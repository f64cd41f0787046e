"""The Grafana dashboard: it asks only for metrics that there are, and its panels do not lie on each other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "weightcache.json").read_text())
NAME = re.compile(r"\bweightcache_[a-z0-9_]+")
PARTS = ("_bucket", "_sum", "_count")  # of a histogram


def queries() -> list[str]:
    """Return everything that the dashboard asks Prometheus."""
    asked = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return asked + [each["query"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]


def test_every_expression_names_metrics_that_exist() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "weightcache").rglob("*.py"))
    plain = set(re.findall(r'"(weightcache_[a-z0-9_]+)"', sources))
    measured = plain | {f"{name}{part}" for name in plain if name.endswith("_seconds") for part in PARTS}
    for query in queries():
        named = set(NAME.findall(query))
        assert named, query
        assert named <= measured, query


def test_what_only_grows_is_asked_for_by_rate() -> None:
    for query in queries():
        for name in NAME.findall(query):
            if name.endswith(("_total", *PARTS)) and not query.startswith("label_values"):
                assert re.search(rf"(rate|increase)\({name}\b", query), query


def test_panels_lie_side_by_side() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_panels_have_titles_and_units() -> None:
    for panel in DASHBOARD["panels"]:
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
