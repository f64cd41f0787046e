"""Stores with replicas, on real S3 servers behind proxies: the choice, fail-over, policy, trust, replication, artefacts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from cache_folder import chunk_files
from models import Shapes, write_safetensors
from proxy import Proxy
from reference import assert_same, tensors_of
from servers import Bucket, S3Server

import weightcache
from weightcache import errors

SHAPES: Shapes = {f"layers.{number}.weight": ("BF16", (1024, 1024)) for number in range(24)}
PLACES = {"frankfurt": ("eu-central-1", "eu"), "virginia": ("us-east-1", "us"), "paris": ("eu-west-3", "eu")}


@dataclass
class Prod:
    """The store `prod`: a bucket and a proxy before it for each of PLACES; frankfurt and paris are written to."""

    path: Path
    buckets: dict[str, Bucket]
    proxies: dict[str, Proxy]

    def configure(
        self,
        *,
        node: str = 'provider = "aws"',
        store: Sequence[str] = (),
        written: Sequence[str] = ("frankfurt", "paris"),
        **replicas: str,
    ) -> None:
        """Write the configuration: lines of [node], of [stores.prod], who is written to, and more lines of some replicas."""
        lines = ["attempts = 2", "request_timeout_s = 2", "[node]", node, "[stores.prod]", *store]
        for name, (region, jurisdiction) in PLACES.items():
            access = "write" if name in written else "read"
            lines += [
                "[[stores.prod.replicas]]",
                f'name = "{name}"',
                f'url = "{self.buckets[name].url}/registry"',
                f'endpoint = "{self.proxies[name].endpoint}"',
                f'provider = "aws"\nregion = "{region}"\njurisdiction = "{jurisdiction}"',
                f'access = "{access}"',
                replicas.get(name, "egress_usd_per_gb = 0.0"),
            ]
        self.path.write_text("\n".join(lines))


@pytest.fixture
def prod(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prod]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret)
    monkeypatch.setenv("WEIGHTCACHE_CONFIG", str(tmp_path / "weightcache.toml"))
    with ExitStack() as stack:
        buckets = {name: s3.create_bucket() for name in PLACES}
        for bucket in buckets.values():
            stack.callback(bucket.remove)
        proxies = {name: stack.enter_context(Proxy(s3.address, (s3.key, s3.secret))) for name in PLACES}
        prod = Prod(tmp_path / "weightcache.toml", buckets, proxies)
        prod.configure()
        yield prod


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", SHAPES)
    (folder / "config.json").write_text("{}")
    return folder


def publish_everywhere(prod: Prod, model: Path, name: str = "wc://prod/llama@v1") -> str:
    """Publish to frankfurt and copy to the others; return the revision."""
    prod.configure(written=tuple(PLACES))
    published = weightcache.publish(model, name, replicas=3)
    prod.configure()
    return str(published.revision)


def n_requests(proxy: Proxy) -> int:
    return sum("chunks/" in request.path for request in proxy.requests)


def test_a_logical_name_is_loaded(prod: Prod, model: Path) -> None:
    publish_everywhere(prod, model)
    with weightcache.load_model("wc://prod/llama@v1", "cpu") as loaded:
        assert_same(loaded, tensors_of(model))
        assert "of 3 allowed" in loaded.report.choices["replica"]
        loaded.wait_stored()
    with weightcache.load_model("wc://prod/llama@v1", "cpu", offline=True) as loaded:
        assert_same(loaded, tensors_of(model))


def test_the_cheaper_of_equally_fast_replicas_is_read(prod: Prod, model: Path) -> None:
    publish_everywhere(prod, model)
    prod.configure(frankfurt="egress_usd_per_gb = 0.09", virginia="egress_usd_per_gb = 0.05")
    with weightcache.load_model("wc://prod/llama@v1", "cpu") as loaded:
        used = {place: facts for place, facts in loaded.report.replicas.items() if facts["received_bytes"] > 1 << 20}
        assert [place.rpartition("/")[2] for place in used] == [prod.buckets["paris"].name]
        assert loaded.report.usd < 0.0001  # requests alone


def test_a_replica_that_is_down_is_not_noticed_but_in_the_report(prod: Prod, model: Path) -> None:
    publish_everywhere(prod, model)
    prod.proxies["paris"].close()
    prod.configure(
        paris="egress_usd_per_gb = 0.0", frankfurt="egress_usd_per_gb = 0.09", virginia="egress_usd_per_gb = 0.09"
    )
    with weightcache.load_model("wc://prod/llama@v1", "cpu") as loaded:
        assert_same(loaded, tensors_of(model))
        assert "paris: does not answer" in loaded.report.choices["replica"]


@pytest.mark.parametrize("fault", ["reset", "short", "stall", "500", "404", "403"])
def test_a_replica_that_fails_amid_a_load_is_left(prod: Prod, model: Path, fault: str) -> None:
    publish_everywhere(prod, model)
    prod.configure(frankfurt="egress_usd_per_gb = 0.09", virginia="egress_usd_per_gb = 0.09")
    prod.proxies["paris"].script(r"chunks/", "ok ok ok " + " ".join([fault] * 60))
    with weightcache.load_model("wc://prod/llama@v1", "cpu") as loaded:
        assert_same(loaded, tensors_of(model))
        places = [
            place.rpartition("/")[2]
            for place, facts in loaded.report.replicas.items()
            if facts["received_bytes"] > 1 << 20
        ]
        assert set(places) & {prod.buckets["frankfurt"].name, prod.buckets["virginia"].name}


def test_a_rotten_chunk_at_one_replica_is_read_from_another_and_reported(prod: Prod, model: Path) -> None:
    publish_everywhere(prod, model)
    prod.configure(frankfurt="egress_usd_per_gb = 0.09", virginia="egress_usd_per_gb = 0.09")
    bucket = prod.buckets["paris"]
    key = max(bucket.keys("registry/chunks/"))
    bucket.put(key, bucket.get(key)[:-1] + b"!")
    with weightcache.load_model("wc://prod/llama@v1", "cpu") as loaded:
        assert_same(loaded, tensors_of(model))
        [warning] = loaded.report.warnings
    assert "replica paris" in warning
    assert "check --repair" in warning
    repaired = weightcache.check("wc://prod", deep=True, replica="paris", repair_from=["frankfurt"])
    assert repaired.repaired == [f"blake3:{key.rpartition('/')[2]}"]
    assert repaired.sound


def test_what_is_on_this_node_serves_while_all_replicas_are_down_and_what_is_not_is_an_error(
    prod: Prod, model: Path, tmp_path: Path
) -> None:
    publish_everywhere(prod, model)
    weightcache.prefetch("wc://prod/llama@v1")
    for proxy in prod.proxies.values():
        proxy.close()
    with weightcache.load_model("wc://prod/llama@v1", "cpu") as loaded:
        assert_same(loaded, tensors_of(model))
        assert "cannot be reached" in loaded.report.warnings[0]
    max(chunk_files(tmp_path / "cache").values(), key=lambda path: path.stat().st_size).unlink()
    with pytest.raises(errors.OriginUnreachableError):
        weightcache.load_model("wc://prod/llama@v1", "cpu")


def test_all_replicas_down_is_one_error(prod: Prod, model: Path) -> None:
    publish_everywhere(prod, model)
    for proxy in prod.proxies.values():
        proxy.close()
    with pytest.raises(errors.OriginUnreachableError):
        weightcache.load_model("wc://prod/llama@v1", "cpu")


# -- residency


def test_where_a_replica_is_cannot_be_said_by_who_loads(prod: Prod, model: Path) -> None:
    weightcache.publish(model, "wc://prod/llama@v1")
    elsewhere = {"endpoint_url": prod.proxies["virginia"].endpoint}
    for use in (
        lambda: weightcache.load_model("wc://prod/llama@v1", "cpu", storage_options=elsewhere),
        lambda: weightcache.tags("wc://prod", storage_options=elsewhere),
        lambda: weightcache.publish(model, "wc://prod/llama@v1", destination_options=elsewhere),
    ):
        with pytest.raises(errors.ConfigError, match="storage_options name an endpoint"):
            use()
    assert prod.proxies["virginia"].requests == []


def test_a_policy_of_the_store_keeps_bytes_from_other_places(prod: Prod, model: Path) -> None:
    publish_everywhere(prod, model)
    before = {name: n_requests(proxy) for name, proxy in prod.proxies.items()}
    asked = len(prod.proxies["virginia"].requests)
    prod.configure(
        node='provider = "aws"\nregion = "eu-north-1"\njurisdiction = "eu"',
        store=['allow = { jurisdictions = ["eu"] }'],
        virginia="egress_usd_per_gb = 0.0",
        paris="egress_usd_per_gb = 0.09",
        frankfurt="egress_usd_per_gb = 0.09",
    )
    with weightcache.load_model("wc://prod/llama@v1", "cpu") as loaded:
        assert "of 2 allowed" in loaded.report.choices["replica"]
    assert len(prod.proxies["virginia"].requests) == asked
    assert sum(n_requests(proxy) for proxy in prod.proxies.values()) > sum(before.values())
    rulings = weightcache.rulings()
    assert {row["source"]["name"] for row in rulings if not row["allowed"]} == {"virginia"}


def test_a_model_whose_policy_forbids_this_node_is_refused_before_a_weight_byte(prod: Prod, model: Path) -> None:
    prod.configure(node='jurisdiction = "eu"\nprovider = "aws"')
    weightcache.publish(model, "wc://prod/llama@v1", policy={"allow": {"jurisdictions": ["eu"]}})
    prod.configure(node='jurisdiction = "us"\nprovider = "aws"')
    before = n_requests(prod.proxies["frankfurt"])
    with pytest.raises(errors.ResidencyError, match="jurisdictions 'eu'"):
        weightcache.load_model("wc://prod/llama@v1", "cpu")
    assert n_requests(prod.proxies["frankfurt"]) == before


def test_a_model_is_not_replicated_to_where_its_policy_forbids(prod: Prod, model: Path) -> None:
    prod.configure(node='jurisdiction = "eu"\nprovider = "aws"', written=tuple(PLACES))
    weightcache.publish(model, "wc://prod/llama@v1", policy={"allow": {"jurisdictions": ["eu"]}})
    with pytest.raises(errors.ResidencyError):
        weightcache.replicate("wc://prod", to="virginia")
    assert prod.buckets["virginia"].keys() == []
    weightcache.replicate("wc://prod", to="paris")
    assert prod.buckets["paris"].keys("registry/chunks/")


# -- replication


def test_replication_says_what_it_would_copy_and_copies_it(prod: Prod, model: Path) -> None:
    prod.configure(frankfurt="egress_usd_per_gb = 0.09")
    published = weightcache.publish(model, "wc://prod/llama@v1")
    [dry] = weightcache.replicate("wc://prod", dry=True)
    assert (dry.target, dry.tags, dry.bytes) == (f"{prod.buckets['paris'].url}/registry", ["llama@v1"], published.bytes)
    assert dry.usd == pytest.approx(published.bytes / 1e9 * 0.09)
    assert prod.buckets["paris"].keys() == []
    [done] = weightcache.replicate("wc://prod")
    assert (done.revisions, done.tags, done.bytes) == (dry.revisions, dry.tags, dry.bytes)
    [again] = weightcache.replicate("wc://prod")
    assert (again.revisions, again.tags, again.bytes) == ([], [], 0)
    assert weightcache.check("wc://prod", deep=True, replica="paris").sound


def test_publishing_waits_for_replicas(prod: Prod, model: Path) -> None:
    published = weightcache.publish(model, "wc://prod/llama@v1", replicas=2)
    assert published.copied_bytes == published.bytes
    assert weightcache.check("wc://prod", deep=True, replica="paris").n_tags == 1
    with pytest.raises(errors.ConfigError, match="3 replicas were asked for"):
        weightcache.publish(model, "wc://prod/llama@v1", replicas=3)


def test_tags_that_both_sides_moved_are_a_conflict(prod: Prod, model: Path, tmp_path: Path) -> None:
    publish_everywhere(prod, model)
    other = tmp_path / "other"
    other.mkdir()
    write_safetensors(other / "model.safetensors", SHAPES, seed=1)
    options = {"endpoint_url": prod.proxies["paris"].endpoint}
    weightcache.publish(other, f"{prod.buckets['paris'].url}/registry/llama@v1", destination_options=options)
    third = tmp_path / "third"
    third.mkdir()
    write_safetensors(third / "model.safetensors", SHAPES, seed=2)
    weightcache.publish(third, "wc://prod/llama@v1")
    [done] = weightcache.replicate("wc://prod", to="paris")
    assert len(done.conflicts) == 1
    assert done.tags == []


def test_a_replica_that_is_only_read_is_never_written_to(prod: Prod, model: Path) -> None:
    weightcache.publish(model, "wc://prod/llama@v1")
    for write in (
        lambda: weightcache.replicate("wc://prod", to="virginia"),
        lambda: weightcache.check("wc://prod", replica="virginia", repair_from=["frankfurt"]),
        lambda: weightcache.gc("wc://prod", replica="virginia", dry=False),
    ):
        with pytest.raises(errors.ConfigError, match="virginia may only be read"):
            write()
    assert prod.buckets["virginia"].keys() == []


# -- trust


def test_only_what_a_trusted_key_signed_is_loaded(prod: Prod, model: Path, tmp_path: Path) -> None:
    public = weightcache.keygen(tmp_path / "key.pem")
    other = weightcache.keygen(tmp_path / "other.pem")
    weightcache.publish(model, "wc://prod/llama@v1")
    prod.configure(store=[f'trust = ["{public}"]'])
    before = n_requests(prod.proxies["frankfurt"])
    with pytest.raises(errors.SignatureError, match="is not signed"):
        weightcache.load_model("wc://prod/llama@v1", "cpu")
    weightcache.sign("wc://prod/llama@v1", tmp_path / "other.pem")
    with pytest.raises(errors.SignatureError):
        weightcache.load_model("wc://prod/llama@v1", "cpu")
    assert n_requests(prod.proxies["frankfurt"]) == before
    weightcache.sign("wc://prod/llama@v1", tmp_path / "key.pem")
    with weightcache.load_model("wc://prod/llama@v1", "cpu") as loaded:
        assert_same(loaded, tensors_of(model))
    prod.configure(store=[f'trust = ["{other}"]'])
    weightcache.sign(
        "wc://prod/llama@v1", tmp_path / "other.pem"
    )  # or its serial, which is lower, would be a roll-back
    weightcache.load_model("wc://prod/llama@v1", "cpu").close()
    assert weightcache.trusted_keys("prod", public) == [other, public]


def test_a_tag_that_is_rolled_back_is_refused(prod: Prod, model: Path, tmp_path: Path) -> None:
    public = weightcache.keygen(tmp_path / "key.pem")
    prod.configure(store=[f'trust = ["{public}"]'])
    first = weightcache.publish(model, "wc://prod/llama@v1")
    weightcache.sign("wc://prod/llama@v1", tmp_path / "key.pem")
    write_safetensors(model / "model.safetensors", SHAPES, seed=1)
    weightcache.publish(model, "wc://prod/llama@v1")
    weightcache.sign("wc://prod/llama@v1", tmp_path / "key.pem")
    weightcache.load_model("wc://prod/llama@v1", "cpu").close()
    weightcache.tag("wc://prod/llama@v1", first.revision)
    with pytest.raises(errors.SignatureError, match="serial"):
        weightcache.load_model("wc://prod/llama@v1", "cpu")
    weightcache.sign("wc://prod/llama@v1", tmp_path / "key.pem")  # on purpose
    weightcache.load_model("wc://prod/llama@v1", "cpu").close()


def test_a_signature_that_was_changed_is_refused(prod: Prod, model: Path, tmp_path: Path) -> None:
    public = weightcache.keygen(tmp_path / "key.pem")
    prod.configure(store=[f'trust = ["{public}"]'])
    weightcache.publish(model, "wc://prod/llama@v1")
    weightcache.sign("wc://prod/llama@v1", tmp_path / "key.pem")
    [key] = prod.buckets["frankfurt"].keys("registry/models/llama/signatures/")
    form = json.loads(prod.buckets["frankfurt"].get(key))
    prod.buckets["frankfurt"].put(key, json.dumps(form | {"serial": form["serial"] + 1}).encode())
    with pytest.raises(errors.SignatureError, match="is wrong"):
        weightcache.load_model("wc://prod/llama@v1", "cpu")


# -- artefacts


def test_artefacts_are_placed_where_they_fit_and_said_where_not(prod: Prod, model: Path, tmp_path: Path) -> None:
    compiled = tmp_path / "compiled"
    (compiled / "aa").mkdir(parents=True)
    (compiled / "aa" / "kernel.bin").write_bytes(b"x" * 100_000)
    weightcache.publish(model, "wc://prod/llama@here", artefacts={"inductor": compiled})
    weightcache.publish(model, "wc://prod/llama@there", artefacts={"triton": compiled}, facts={"gpu": "H100"})
    with weightcache.load_model("wc://prod/llama@here", "cpu", artefacts=tmp_path / "placed") as loaded:
        assert_same(loaded, tensors_of(model))
        assert loaded.report.choices["artefact inductor"].startswith("placed in")
        assert set(loaded.files) == {"config.json"}
    assert (tmp_path / "placed" / "inductor" / "aa" / "kernel.bin").read_bytes() == b"x" * 100_000
    with weightcache.load_model("wc://prod/llama@there", "cpu", artefacts=tmp_path / "placed") as loaded:
        assert "gpu is 'none' here, not 'H100'" in loaded.report.choices["artefact triton"]
    assert not (tmp_path / "placed" / "triton").exists()
    weightcache.pull("wc://prod/llama@here", tmp_path / "pulled")
    assert sorted(path.name for path in (tmp_path / "pulled").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("wc://prdo/llama", "did you mean 'prod'"),
        ("wc://prod", "names a store"),
        ("wc://prod/llama@nope", "no tag 'nope'"),
    ],
)
def test_a_wrong_logical_name_is_said(prod: Prod, model: Path, uri: str, said: str) -> None:
    weightcache.publish(model, "wc://prod/llama@v1")
    with pytest.raises(errors.WeightcacheError, match=said):
        weightcache.load_model(uri, "cpu")
