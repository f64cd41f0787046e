"""Answer what publishing costs, whether what is published is read as fast, and what happens when a region fails.

Questions (each runs alone with `--only`, by the beginning of its name) and their targets:

    fine-tune       A Llama, then one of which 10 % of the tensors differ, by bytes: at most 12 % of the model's bytes are
                    uploaded, fetched by a node that has the base on disk, and stored there. Then a LoRA beside it: 1.01 of
                    the adapter's bytes uploaded. Counted by a proxy, writes of every kind included.
    publish         A model of 2.5 GB from a warm folder to an empty bucket: 0.8 times as fast as the fastest of four
                    clients that write the same chunks as plain objects, 16 at a time. Publishing it again: told.
    read            The same model, published, from SeaweedFS to tensors, verified and cached on disk: no slower than as a
                    plain folder there, that is in at most 1.05 of the time. GETs of both: told.
    regions         A store of three replicas behind links of 20, 40 and 80 ms and of 1000, 500 and 200 Mbit/s, of which a
                    node knows nothing yet: 0.95 of the bytes come from the nearest. When half of the model has come from it
                    and it falls silent, or its server ends: the load is right, in at most 1.5 of the time that it takes from
                    the second alone. When its link drops to a tenth of its rate instead: it is left within 3 s, that is, at
                    least half of what comes in a quarter of a second comes from elsewhere, and goes on to for a second.

    python benchmarks/bench_registry.py --quick     a few minutes, 4 GB of disk; shows that it works, not how fast
    python benchmarks/bench_registry.py             about 30 minutes, 18 GB of disk; for a quiet machine; writes
                                                    benchmarks/results/<date>-registry.json

What a month of loads costs is `weightcache cost --simulate`. How it is measured stands at the top of bench_load.py, and
what it needs at that of bench_origin.py, whose parts these are. Beside that: each run that publishes has a SeaweedFS of its
own, started for it; in the end what lies there must be the same objects, whoever wrote them.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

import measuring
import suite
import web
from questions import OURS_COLD, Answer, Comparison, Say
from regions import FAR, MIDDLE, NEAR
from rows import GB, Row, Verdict, fact_at_least, fact_at_most, no_slower, times_as_fast, told
from workshop import Case, Workshop

DISK_NEEDED = {True: 4 * GB, False: 18 * GB}  # by --quick
TUNED_LIMIT = 0.12  # of the model's bytes
ADAPTER_LIMIT = 1.01  # of the adapter's

PUBLISHED = "weightcache, published"
PUBLISH = "weightcache publish"
AGAIN = "weightcache publish, again"
BOTO3 = "boto3 put_object"
OBSTORE = "obstore put"
AIOBOTOCORE = "aiobotocore put_object"
PLAIN = "http.client, signed URLs"
NEAREST = "weightcache, three regions"
SECOND = "weightcache, the second region alone"
CUT = "weightcache, the nearest falls silent half way"
KILLED = "weightcache, the nearest's server ends half way"
SLOWED = "weightcache, the nearest drops to a tenth half way"


@dataclass(frozen=True, slots=True)
class FineTune:
    """Counted by a proxy: what a fine-tune and an adapter cost beside their base. Once: counts have no spread."""

    name: str
    asks: str
    model: str
    tuned: str
    adapter: str

    def answer(self, workshop: Workshop, repeats: int, say: Say) -> Answer:
        rows: dict[str, Row] = {}
        uploaded: dict[str, int] = {}
        fetched: dict[str, int] = {}
        stored: dict[str, int] = {}
        cache = workshop.folder / "caches" / self.name
        for model in (self.model, self.tuned, self.adapter):
            nbytes = workshop.nbytes(model)
            workshop.proxy.reset()
            result = workshop.publish(model)
            up = uploaded[model] = result["facts"]["proxy_uploaded_bytes"] = workshop.proxy.uploaded_bytes()
            rows[f"publish {model}"] = Row.of(f"publish {model}", nbytes, [result])
            before = _nbytes_below(cache)
            case = Case(f"load {model}", "weightcache", "proxy", options={"is_published": True})
            workshop.proxy.reset()
            result = workshop.run(case, model, cache)
            down = fetched[model] = workshop.proxy.body_bytes()
            kept = stored[model] = result["facts"]["stored_bytes"] = _nbytes_below(cache) - before
            rows[case.name] = Row.of(case.name, nbytes, [result])
            say(f"{self.name}: {model}, {nbytes:,} bytes: {up:,} uploaded, {down:,} fetched, {kept:,} stored")
        base, adapter = workshop.nbytes(self.model), workshop.nbytes(self.adapter)
        verdicts = [
            Verdict(f"bytes {what} for the fine-tune / model's ({base:,})", counts[self.tuned] / base, TUNED_LIMIT, "x")
            for what, counts in (("uploaded", uploaded), ("fetched", fetched), ("stored on the node", stored))
        ]
        what = f"bytes uploaded for the adapter / its own ({adapter:,})"
        return Answer(rows, [*verdicts, Verdict(what, uploaded[self.adapter] / adapter, ADAPTER_LIMIT, "x")])


def _nbytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in measuring.files_below(folder))


def _to_bucket(name: str, loader: str, needs: str = "") -> Case:
    return Case(name, loader, "folder", "warm", needs, to="bucket")


def _from_regions(name: str, *replicas: str, event: str = "") -> Case:
    return Case(name, "weightcache", "regions", options={"replicas": replicas or (NEAR, MIDDLE, FAR), "event": event})


QUESTIONS = (
    FineTune(
        name="fine-tune",
        asks="Does a fine-tune cost what differs from its base, and an adapter itself?",
        model="llama",
        tuned="llama-tuned",
        adapter="llama-adapter",
    ),
    Comparison(
        name="publish",
        asks="To an S3 server on loopback: is publishing nearly as fast as plain parallel writes of the same bytes?",
        model="llama",
        cases=(
            _to_bucket(PUBLISH, "publish"),
            _to_bucket(BOTO3, "boto3_puts"),
            _to_bucket(OBSTORE, "obstore_puts", "obstore"),
            _to_bucket(AIOBOTOCORE, "aiobotocore_puts"),
            _to_bucket(PLAIN, "plain_puts"),
            _to_bucket(AGAIN, "publish_again"),
        ),
        judges=(times_as_fast(PUBLISH, [BOTO3, OBSTORE, AIOBOTOCORE, PLAIN], 0.8),),
    ),
    Comparison(
        name="read",
        asks="From an S3 server on loopback, nothing cached: is a published model read as fast as a plain one?",
        model="llama",
        cases=(
            Case(OURS_COLD, "weightcache", "origin"),
            Case(PUBLISHED, "weightcache", "origin", options={"is_published": True}),
        ),
        judges=(
            no_slower(PUBLISHED, OURS_COLD, 1.05),
            told(PUBLISHED, "n_requests", "requests"),
            told(OURS_COLD, "n_requests", "requests"),
        ),
    ),
    Comparison(
        name="regions",
        asks="From three regions: is the nearest chosen, and left in time when it fails or becomes slow?",
        model="single-1000mbit",
        cases=(
            _from_regions(NEAREST),
            _from_regions(SECOND, MIDDLE),
            _from_regions(CUT, event="cut"),
            _from_regions(KILLED, event="killed"),
            _from_regions(SLOWED, event="slowed"),
        ),
        judges=(
            fact_at_least(NEAREST, "near_share", "share of bytes from the nearest", 0.95),
            no_slower(CUT, SECOND, 1.5),
            no_slower(KILLED, SECOND, 1.5),
            fact_at_most(SLOWED, "left_after_s", "seconds until the nearest is left", 3.0, " s"),
            told(CUT, "left_after_s", "seconds until the nearest is left", " s"),
            told(KILLED, "left_after_s", "seconds until the nearest is left", " s"),
        ),
        obstacle=web.link_obstacle,
    ),
)

if __name__ == "__main__":
    today = datetime.datetime.now(datetime.UTC).date()
    suite.main(__doc__, QUESTIONS, DISK_NEEDED, out=Path(__file__).parent / "results" / f"{today}-registry.json")
