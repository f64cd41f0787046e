"""Residency of what is done with registries, one case each; folders are the replicas. Properties are elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from models import write_safetensors
from reference import assert_same, tensors_of

import weightcache
from weightcache import errors

EU = {"allow": {"jurisdictions": ["eu"]}}
EU_RULE = 'allow = { jurisdictions = ["eu"] }'
PLACES = {"berlin": "eu", "paris": "eu", "boston": "us"}


@dataclass
class World:
    """Folders as the replicas of the store `prod`, all written to, and a model."""

    root: Path
    model: Path

    def configure(self, node: str = "eu", own: Sequence[str] = (), replicas: Sequence[str] = tuple(PLACES)) -> None:
        """Write the configuration: the node's jurisdiction, its own rules, and which replicas there are."""
        lines = [f'[node]\njurisdiction = "{node}"', *own]
        for name in replicas:
            lines += ["[[stores.prod.replicas]]", f'name = "{name}"\nurl = "{self.folder(name)}"\naccess = "write"']
            lines += [f'jurisdiction = "{PLACES[name]}"']
        (self.root / "weightcache.toml").write_text("\n".join(lines))

    def folder(self, replica: str) -> Path:
        return self.root / replica

    def chunks(self, replica: str) -> list[Path]:
        return sorted(self.folder(replica).glob("chunks/??/*"))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("WEIGHTCACHE_CONFIG", str(tmp_path / "weightcache.toml"))
    (tmp_path / "model").mkdir()
    write_safetensors(tmp_path / "model" / "model.safetensors", {"a": ("F32", (1000,)), "b": ("F32", (9,))})
    world = World(tmp_path, tmp_path / "model")
    world.configure()
    return world


def refused() -> list[tuple[str, str]]:
    """Return why and for whom ways were refused, as the audit log has it."""
    return [(row["verb"], row["rule"]) for row in weightcache.rulings() if not row["allowed"]]


@pytest.mark.parametrize("cache", ["auto", "none"])
@pytest.mark.parametrize("uri", ["wc://prod/llama@v1", "model"])
def test_g26_a_load_that_is_refused_at_once_is_in_the_audit_log(world: World, uri: str, cache: str) -> None:
    weightcache.publish(world.model, "wc://prod/llama@v1")
    world.configure("us", own=[EU_RULE])
    with pytest.raises(errors.ResidencyError) as caught:
        weightcache.load_model(uri if uri.startswith("wc") else world.model, "cpu", cache=cache)
    assert caught.value.facts["rule"] in [rule for _, rule in refused()]


def test_g26_an_offline_load_is_ruled_on_and_in_the_audit_log(world: World) -> None:
    weightcache.publish(world.model, "wc://prod/llama@v1", policy=EU)
    weightcache.prefetch("wc://prod/llama@v1")
    with weightcache.load_model("wc://prod/llama@v1", "cpu", offline=True) as loaded:
        assert_same(loaded, tensors_of(world.model))
    world.configure("us")
    with pytest.raises(errors.ResidencyError, match="model llama allows jurisdictions 'eu'"):
        weightcache.load_model("wc://prod/llama@v1", "cpu", offline=True)
    assert refused()[-1] == ("keep", "model llama allows jurisdictions 'eu', and the source's jurisdiction is 'us'")


def test_g22_without_its_manifest_a_published_model_is_not_on_this_node(world: World) -> None:
    weightcache.publish(world.model, "wc://prod/llama@v1", policy=EU)
    weightcache.prefetch("wc://prod/llama@v1")
    [record] = (world.root / "cache").glob("models/*/manifest.json")
    record.unlink()
    with pytest.raises(errors.OfflineError):
        weightcache.load_model("wc://prod/llama@v1", "cpu", offline=True)


def test_g26_a_copy_keeps_to_the_policies_of_what_is_copied_whatever_its_own_says(world: World) -> None:
    weightcache.publish(world.model, "wc://prod/llama@v1", policy=EU)
    world.configure(replicas=["berlin"])
    other = world.root / "elsewhere"
    text = (world.root / "weightcache.toml").read_text()
    (world.root / "weightcache.toml").write_text(
        f'{text}\n[[stores.wide.replicas]]\nurl = "{other}"\njurisdiction = "us"\naccess = "write"'
    )
    with pytest.raises(errors.ResidencyError, match=r"publish of wc://wide/copy@v1 .* model llama allows"):
        weightcache.publish("wc://prod/llama@v1", "wc://wide/copy@v1", policy={})
    assert not other.exists()


def test_g26_nothing_is_asked_of_a_registry_that_the_models_policy_forbids(world: World) -> None:
    world.configure(replicas=["boston"])
    with pytest.raises(errors.ResidencyError, match="model llama allows jurisdictions 'eu'"):
        weightcache.publish(world.model, "wc://prod/llama@v1", policy=EU)
    assert not world.folder("boston").exists()


@pytest.mark.parametrize("policy", ["of the model", "of the registry"])
def test_g26_a_check_reads_and_repairs_only_where_policies_allow(world: World, policy: str) -> None:
    weightcache.publish(world.model, "wc://prod/llama@v1", policy=EU if policy == "of the model" else None)
    shutil.copytree(world.folder("berlin"), world.folder("boston"))
    if policy == "of the registry":
        for name in ("berlin", "boston"):
            about = world.folder(name) / "weightcache.json"
            about.write_text(json.dumps(json.loads(about.read_text()) | {"policy": EU}))
    lost = world.chunks("boston")[0]
    lost.unlink()
    checks: Sequence[Callable[[], object]] = (
        lambda: weightcache.check("wc://prod", replica="boston", repair_from=["berlin"]),
        lambda: weightcache.check("wc://prod", replica="berlin", repair_from=["boston"]),
        lambda: weightcache.check("wc://prod", replica="boston", deep=True),
    )
    for check in checks:
        with pytest.raises(errors.ResidencyError, match="allows jurisdictions 'eu'"):
            check()
    assert not lost.exists()
    assert weightcache.check("wc://prod", deep=True).sound
    assert not weightcache.check("wc://prod", replica="boston").sound  # which reads no chunk


def test_a_chunk_is_repaired_from_the_registry_that_is_named(world: World) -> None:
    weightcache.publish(world.model, "wc://prod/llama@v1")
    shutil.copytree(world.folder("berlin"), world.root / "copy")
    for chunk in world.chunks("berlin"):
        chunk.unlink()
    repaired = weightcache.check("wc://prod", repair_from=[str(world.root / "copy")])
    assert repaired.sound
    assert len(repaired.repaired) == len(world.chunks("berlin")) > 0


def test_g26_a_diff_reads_only_what_policies_allow(world: World, tmp_path: Path) -> None:
    weightcache.publish(world.model, "wc://prod/llama@v1", policy=EU)
    write_safetensors(world.model / "model.safetensors", {"b": ("F32", (9,)), "a": ("F32", (1000,))})
    weightcache.publish(world.model, "wc://prod/llama@v2", policy=EU)
    assert not weightcache.diff("wc://prod/llama@v1", "wc://prod/llama@v2").changed
    world.configure("us")
    for uris in (("wc://prod/llama@v1", "wc://prod/llama@v2"), ("wc://prod/llama@v2", "wc://prod/llama@v1")):
        with pytest.raises(errors.ResidencyError, match="model llama allows jurisdictions 'eu'"):
            weightcache.diff(*uris)
    assert {verb for verb, _ in refused()} == {"read"}


def test_g26_a_registrys_own_policy_rules_on_where_it_is_copied_from_and_to(world: World) -> None:
    weightcache.publish(world.model, "wc://prod/llama@v1")
    about = world.folder("berlin") / "weightcache.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"policy": EU}))
    with pytest.raises(errors.ResidencyError, match=r"to boston .* registry .* allows jurisdictions 'eu'"):
        weightcache.replicate("wc://prod", to="boston")
    assert not world.folder("boston").exists()
    weightcache.replicate("wc://prod", to="paris")
    assert len(world.chunks("paris")) == len(world.chunks("berlin"))


def test_g26_what_may_not_be_copied_to_one_may_be_copied_to_another(world: World) -> None:
    weightcache.publish(world.model, "wc://prod/llama@v1", policy=EU)
    shutil.copytree(world.folder("berlin"), world.folder("boston"))  # where it is, by no doing of ours
    write_safetensors(world.model / "model.safetensors", {"a": ("F32", (500,))})
    weightcache.publish(world.model, "wc://prod/free@v1", policy={})
    [done] = weightcache.replicate("wc://prod", to="boston")
    assert done.tags == ["free@v1"]
