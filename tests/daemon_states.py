"""Own the states of a daemon that tests of its page show: at rest, during a cold load, and made by an enemy.

Never asks a daemon: they are values, the same each time.
"""

from __future__ import annotations

import copy
from typing import Any

from weightcache.spans import Span, join

NOW_S = 1_795_000_000.0
GB = 10**9
N_SPANS = 120
PATHS = tuple(f"model-{number:05}-of-00004.safetensors" for number in range(1, 5))
CHUNK_NBYTES = 16_000_000


def at_rest() -> dict[str, Any]:
    """Return the state of a daemon with some models, whose clients come and go."""
    return copy.deepcopy(_AT_REST)


def cold_load() -> dict[str, Any]:
    """Return the state while one model is loaded for the first time, and another one fetched ahead."""
    state = at_rest()
    uri = "s3://models/mistral-small-24b-instruct"
    state["n_clients"] = 5
    state["tiers"][0] |= {"used_bytes": 44_310_000_000, "leased_bytes": 36_860_000_000}
    state["models"].insert(
        0, _model(uri, "host", 20_870_000_000, 47_150_000_000, state="filling", n_leases=2, used_s=0)
    )
    state["transfers"] = [
        _transfer(1, uri, "load", "host", 20_870_000_000, 47_150_000_000, 1_912_000_000, 11),
        _transfer(2, "wc://prod/gemma-2-27b@canary", "tag", "disk", 3_210_000_000, 54_450_000_000, 0, 95),
        _transfer(3, "hf://org/small-classifier", "forecast", "disk", 88_000_000, 91_000_000, 41_000_000, 2),
    ]
    state["decisions"].insert(0, _decision(2, "fetch", "hf://org/small-classifier", "disk", "expected in 12 min"))
    return state


def hostile() -> dict[str, Any]:
    """Return a state whose every text was chosen by an enemy."""
    state = cold_load()
    for index, text in enumerate(EVIL):
        state["models"].append(_model(text, "disk", 1, 2, used_s=index))
        state["models"][-1] |= {"state": text, "pages": text, "revision": text}
        state["transfers"].append(_transfer(100 + index, text, text, text, 1, 2, 3, 4))
        state["decisions"].append(_decision(index, text, text, text, text))
        state["forecast"].append(_forecast(text, 3, 60, 120, text))
        state["tiers"].append({"tier": text, "used_bytes": 1, "budget_bytes": 2, "leased_bytes": 1})
        load = copy.deepcopy(state["loads"][0])
        load["report"] |= {"uri": text, "choices": {text: text}, "warnings": [text], "revision": text, "device": text}
        load["report"]["seconds"] = {text: 1.0, "total": 1.0}
        load["report"]["spans"] = [["stage", text, 0, 1, 0], [text, text, 0, 1, 5], ["origin", text, 0, 1, 5]]
        load |= {"by": text, "ended_s": NOW_S - index}
        state["loads"].insert(0, load)
    state["loads"].append({"ended_s": 0, "pid": 1, "by": "client", "report": {"uri": "no report", "seconds": "none"}})
    return state


EVIL = (
    "<img src=x onerror=\"window.hacked='img'\">",
    "\"><script>window.hacked='script'</script>",
    "javascript:window.hacked='url'",
    "</style><svg onload=\"window.hacked='svg'\">",
    "__proto__",
    "s3://bucket/\u202e\u0000gnp.exe",
    "s3://bucket/" + "x" * 3000,
)


def _model(
    uri: str, tier: str, nbytes: int, total: int = 0, state: str = "resident", n_hits: int = 0, n_leases: int = 0,
    used_s: float = 0, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    pages = "shared, in huge pages of 2 MiB (reserved)" if tier == "host" else ""
    return {
        "uri": uri,
        "revision": f"blake3:{hash_of(uri)}",
        "tier": tier,
        "state": state,
        "bytes": nbytes,
        "total_bytes": total or nbytes,
        "n_hits": n_hits,
        "n_leases": n_leases,
        "last_use_s": NOW_S - used_s,
        "pinned": False,
        "until_s": None,
        "pages": pages,
        **more,
    }


def hash_of(text: str) -> str:
    """Return 64 digits that depend on a text alone."""
    number = 5381
    for char in text * 3:
        number = (number * 33 + ord(char)) % 2**256
    return f"{number:064x}"


def _transfer(
    number: int, uri: str, why: str, tier: str, done: int, total: int, rate: int, ago_s: float
) -> dict[str, Any]:
    return {
        "id": number,
        "uri": uri,
        "why": why,
        "tier": tier,
        "done_bytes": done,
        "total_bytes": total,
        "bytes_per_s": rate,
        "began_s": NOW_S - ago_s,
    }


def _decision(ago_s: float, what: str, uri: str, tier: str, why: str) -> dict[str, Any]:
    return {"at_s": NOW_S - ago_s, "what": what, "uri": uri, "tier": tier, "why": why}


def _forecast(uri: str, n_uses: int, from_s: float, until_s: float, why: str) -> dict[str, Any]:
    return {
        "uri": uri,
        "n_uses": n_uses,
        "expected_from_s": NOW_S + from_s,
        "expected_until_s": NOW_S + until_s,
        "why": why,
    }


def _load(
    ago_s: float, pid: int, uri: str, seconds: dict[str, float], moved: dict[str, int], **more: Any
) -> dict[str, Any]:
    total = sum(seconds.values())
    nbytes = sum(moved.values())
    spans: list[Span] = []
    at_s = 0.0
    for name, spent_s in seconds.items():
        spans.append(Span("stage", name, at_s, at_s + spent_s, 0))
        if name == "move":
            spans += _motion(at_s, spent_s, moved)
        at_s += spent_s
    report = {
        "uri": uri,
        "revision": f"blake3:{hash_of(uri)}",
        "device": "cuda:0",
        "n_tensors": 723,
        "tensor_bytes": nbytes,
        "seconds": {**seconds, "total": total},
        "bytes": {"origin": 0, "disk": 0, "host": 0, **moved},
        "gb_per_s": round(nbytes / 1e9 / (total - seconds.get("import", 0.0)), 3),
        "n_requests": moved.get("origin", 0) // CHUNK_NBYTES,
        "n_retries": 0,
        "usd": 0.0,
        "stored_bytes": moved.get("origin", 0),
        "choices": {"cache": "disk: the origin is not this machine"},
        "warnings": [],
        "spans": [list(span) for span in join(spans, N_SPANS)],
        **more,
    }
    return {"ended_s": NOW_S - ago_s, "pid": pid, "by": "client", "report": report}


def _motion(start_s: float, spent_s: float, moved: dict[str, int]) -> list[Span]:
    """Return what lanes did while bytes moved: ranges on 16 connections, each verified and stored when it is here."""
    spans = []
    for tier in ("disk", "host"):
        n_slices = 24 if moved.get(tier) else 0
        for index in range(n_slices):
            edges = (start_s + spent_s * number / n_slices for number in (index, index + 1))
            spans.append(Span(tier, "read" if tier == "disk" else "copy", *edges, moved[tier] // n_slices))
    n_chunks = moved.get("origin", 0) // CHUNK_NBYTES
    each_s = spent_s * 16 / max(16, n_chunks)
    for index in range(n_chunks):
        path = PATHS[index * len(PATHS) // n_chunks]
        at_s = start_s + index // 16 * each_s + index % 16 * each_s / 40
        stop_s = at_s + each_s * (0.86 + index * 37 % 11 / 100)
        spans.append(Span("origin", path, at_s, stop_s, CHUNK_NBYTES))
        spans.append(Span("verify", path, stop_s, stop_s + 0.012, CHUNK_NBYTES))
        spans.append(Span("device", path, stop_s + 0.012, stop_s + 0.015, CHUNK_NBYTES))
        spans.append(Span("store", path, stop_s + 0.02, stop_s + 0.06, CHUNK_NBYTES))
    return spans


_LLAMA = "s3://models/llama-3-8b"
_TUNED = "wc://prod/llama-3-8b-support@2026-11"
_QWEN = "s3://models/qwen2.5-7b-instruct"
_EMBED = "hf://sentence-transformers/all-MiniLM-L6-v2"

_AT_REST: dict[str, Any] = {
    "version": "0.1.0",
    "pid": 4127,
    "started_s": NOW_S - 273_840,
    "now_s": NOW_S,
    "socket": "/run/weightcache/weightcache.sock",
    "dir": "/var/cache/weightcache",
    "is_ready": True,
    "n_clients": 3,
    "n_refused": 0,
    "tiers": [
        {"tier": "host", "used_bytes": 31_440_000_000, "budget_bytes": 64 * GB, "leased_bytes": 16_060_000_000},
        {"tier": "disk", "used_bytes": 412_700_000_000, "budget_bytes": 800 * GB, "leased_bytes": 47_300_000_000},
    ],
    "models": [
        _model(_LLAMA, "host", 16_060_000_000, n_hits=214, n_leases=3, used_s=4, pinned=True),
        _model(_QWEN, "host", 15_230_000_000, n_hits=37, used_s=1620, until_s=NOW_S + 380),
        _model(_EMBED, "host", 90_900_000, n_hits=1804, used_s=41),
        _model(_TUNED, "disk", 16_060_000_000, n_hits=12, used_s=86_000),
        _model("s3://models/flux-dev", "disk", 23_800_000_000, n_hits=3, used_s=420_000),
    ],
    "transfers": [],
    "loads": [
        _load(4, 90121, _LLAMA, {"import": 1.90, "open": 0.048, "describe": 0.362, "look": 0.017, "move": 8.07,
              "bind": 0.024, "files": 0.011}, {"origin": 16_060_000_000}, usd=0.000385),
        _load(1620, 90007, _QWEN, {"import": 1.79, "open": 0.013, "describe": 0.005, "look": 0.011, "move": 4.92,
              "bind": 0.019, "files": 0.002}, {"disk": 15_230_000_000}),
        _load(3100, 89544, _LLAMA, {"import": 1.84, "open": 0.011, "describe": 0.004, "look": 0.006, "move": 1.31,
              "bind": 0.021, "files": 0.002}, {"host": 16_060_000_000}),
        _load(5200, 88123, _EMBED, {"import": 1.77, "open": 0.008, "describe": 0.002, "look": 0.001, "move": 0.012,
              "bind": 0.003, "files": 0.001}, {"host": 90_900_000}),
    ],
    "limits": {"origin_bytes_per_s": 2_010_000_000, "disk_bytes_per_s": 3_220_000_000, "host_bytes_per_s": 12_400_000_000},
    "decisions": [
        _decision(640, "leave", "s3://models/flux-dev", "disk", "expected in 3 h at the earliest"),
        _decision(1710, "fetch", _QWEN, "host", "expected in 2 to 9 min: asked for about every 30 min"),
        _decision(4300, "demote", _TUNED, "disk", "not used for 1 h"),
        _decision(9100, "evict", "s3://models/tune-0412", "disk", "least value: 1 use, 16.06 GB, 8 s to reload"),
    ],
    "forecast": [
        _forecast(_QWEN, 37, -60, 540, "its uses are 28 to 34 min apart"),
        _forecast(_TUNED, 12, 5400, 9000, "asked for at about this hour on 11 of 12 days"),
    ],
    "ledger": {
        "usd": 4.1837,
        "received_bytes": 1_204_000_000_000,
        "n_gets": 75_310,
        "saved_bytes": 5_840_000_000_000,
        "wasted_prefetch_bytes": 31_000_000_000,
    },
}  # fmt: skip
