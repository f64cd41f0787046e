"""The commands on registries as people and scripts meet them: what each prints, as words and as JSON, and its exit code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from commands import Answer, Run
from http_server import HttpServer
from models import Shapes, write_safetensors
from proxy import Proxy
from servers import Bucket

import weightcache

SHAPES: Shapes = {f"layers.{number}.weight": ("BF16", (256, 256)) for number in range(3)}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with two models, and a store `prod` of three folders: home, near and far, which policy forbids."""
    for seed, name in enumerate(("model", "tuned")):
        (tmp_path / name).mkdir()
        write_safetensors(tmp_path / name / "model.safetensors", SHAPES, seed)
        (tmp_path / name / "config.json").write_text("{}")
    lines = ['[node]\njurisdiction = "eu"', '[stores.prod]\nallow = { jurisdictions = ["eu"] }']
    for name, jurisdiction in {"home": "eu", "near": "eu", "far": "us"}.items():
        lines += ["[[stores.prod.replicas]]", f'name = "{name}"', f'url = "{tmp_path / name}"', 'access = "write"']
        lines += [f'jurisdiction = "{jurisdiction}"']
    (tmp_path / "weightcache.toml").write_text("\n".join(lines))
    monkeypatch.setenv("WEIGHTCACHE_CONFIG", str(tmp_path / "weightcache.toml"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def first() -> str:
    """The revision of wc://prod/llama@v1."""
    return weightcache.publish("model", "wc://prod/llama@v1").revision


@pytest.fixture
def second(first: str) -> str:
    """The revision of wc://prod/llama@v2, of which first is the base."""
    return weightcache.publish("tuned", "wc://prod/llama@v2", base="wc://prod/llama@v1").revision


def shown(run_here: Run, *arguments: object) -> dict[str, str]:
    """Run a command that succeeds and shows names and values."""
    ran = run_here(*arguments)
    assert (ran.returncode, ran.stderr) == (0, "")
    return dict(line.split(maxsplit=1) for line in ran.stdout.splitlines())


def refused(run_here: Run, *arguments: object) -> tuple[int, str, str]:
    """Run a command that fails; return its exit code, its error's code and message."""
    ran = run_here(*arguments, "--json")
    error = json.loads(ran.stdout)["error"]
    assert ran.stderr == f"weightcache: {error['message']} [{error['code']}]\n"
    return ran.returncode, error["code"], error["message"]


def test_publish_says_what_was_saved(run_here: Run, answer: Answer) -> None:
    rows = shown(run_here, "publish", "model", "registry/llama@v1")
    assert re.fullmatch("blake3:[0-9a-f]{64}", rows["revision"])
    assert (rows["bytes"], rows["uploaded"]) == ("393.47 kB in 3 chunks", "393.47 kB")
    again = answer("publish", "model", "registry/llama@v2", "--base", "llama@v1")
    assert (again["uploaded_bytes"], again["saved_bytes"]) == (0, again["bytes"])
    assert again["uri"].endswith("/registry/llama@v2")


def test_publish_copies_to_as_many_replicas_as_asked_for(answer: Answer) -> None:
    done = answer("publish", "model", "wc://prod/llama@v1", "--replicas", "2")
    assert done["copied_bytes"] == done["bytes"]
    assert weightcache.check("wc://prod", replica="near").n_tags == 1


def test_publish_records_policy_base_and_artefacts(first: str, answer: Answer, here: Path) -> None:
    (here / "compiled").mkdir()
    (here / "compiled" / "kernel").write_bytes(b"code")
    told = (
        "--allow",
        "jurisdictions=eu,ch",
        "--base",
        "llama@v1",
        "--artefact",
        "triton=compiled",
        "--fact",
        "gpu=H100",
    )
    answer("publish", "tuned", "wc://prod/llama@v2", *told)
    [row] = [row for row in weightcache.revisions("wc://prod/llama") if "v2" in row.tags]
    assert row.base == f"llama@{first}"
    form = json.loads((here / "home/models/llama/revisions" / f"{row.revision.partition(':')[2]}.json").read_bytes())
    assert form["policy"] == {"allow": {"jurisdictions": ["ch", "eu"]}}
    assert form["bundles"] == [{"name": "triton", "facts": {"gpu": "H100"}}]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["model", "wc://prod"], 2, "names no model of a registry: expected registry/model@tag, as in wc://prod/"),
        (["model", "wc://prdo/llama@v1"], 2, "did you mean 'prod'"),
        (["model", "home"], 2, "home is a registry: expected a model in it, as in "),
        (["wc://prod/llama@v1", "model"], 2, "model is a folder with files, and no place for a model"),
        (["model", f"wc://prod/llama@blake3:{'0' * 64}"], 2, "names a revision: publish to a tag"),
        (["model", "https://host/registry/llama@v1"], 2, "https://host/registry is a web folder"),
        (["model", "wc://prod/llama@v2", "--allow", "jurisdiction=eu"], 2, "did you mean 'jurisdictions'"),
        (["model", "wc://prod/llama@v2", "--replicas", "4"], 2, "but only 3 of wc://prod can be written to"),
        (["model", "home/llama@v2", "--replicas", "2"], 2, "only stores of the configuration have them"),
        (["model", "wc://prod/llama@v2", "--base", "llama@v0"], 3, "no tag 'v0' of a model 'llama'"),
        (["model", "wc://prod/llama@v2", "--artefact", "triton=nowhere"], 2, "no folder nowhere"),
        (["model", "wc://prod/llama@v2", "--fact", "gpu=H100"], 2, "no artefacts that they are of"),
        (["nowhere", "wc://prod/llama@v2"], 3, "nowhere"),
        (["model", "wc://prod/llama@v2", "--deny", "jurisdictions=eu"], 13, "model llama denies jurisdictions 'eu'"),
    ],
)
def test_publish_refuses_what_makes_no_sense_before_it_writes(
    first: str, run_here: Run, here: Path, arguments: Sequence[str], exit_code: int, said: str
) -> None:
    before = files(here)
    code, _, message = refused(run_here, "publish", *arguments)
    assert code == exit_code
    assert said in message
    assert files(here) == before


def files(folder: Path) -> set[Path]:
    """Return the files that are not the cache's."""
    return {path for path in folder.rglob("*") if path.is_file() and not path.is_relative_to(folder / "cache")}


@pytest.mark.parametrize("option", ["--allow", "--deny", "--artefact", "--fact"])
@pytest.mark.parametrize("value", ["eu", "=eu", "eu="])
def test_publish_says_how_its_options_are_written(run_here: Run, option: str, value: str) -> None:
    ran = run_here("publish", "model", "wc://prod/llama@v1", option, value)
    assert ran.returncode == 2
    assert f"'{value}': expected " in ran.stderr


def test_publish_to_a_bucket_that_is_not_there_says_so(
    run_here: Run, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(bucket, bucket.server.endpoint, monkeypatch)
    assert refused(run_here, "publish", "model", "s3://nobody-has-this/registry/llama@v1")[::2] == (
        3,
        "no bucket 'nobody-has-this' (NoSuchBucket, 404): check the name and the endpoint",
    )


def test_publish_without_permission_says_so(
    run_here: Run, bucket: Bucket, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(bucket, proxy.endpoint, monkeypatch)
    proxy.script("PUT ", "403 " * 20)
    code, _, message = refused(run_here, "publish", "model", f"{bucket.url}/registry/llama@v1")
    assert code == 4
    assert "refused these credentials (AccessDenied, 403)" in message


def test_publish_to_a_tag_that_another_moves_meanwhile_is_a_conflict(
    run_here: Run, answer: Answer, bucket: Bucket, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(bucket, proxy.endpoint, monkeypatch)
    uri = f"{bucket.url}/registry/llama@v1"
    first = answer("publish", "model", uri)["revision"]
    proxy.script("PUT .*/tags/v1.json", "412")
    code, _, message = refused(run_here, "publish", "tuned", uri)
    assert code == 15
    assert f"tag 'v1' of llama in {bucket.url}/registry was moved to {first} by another meanwhile" in message
    second = message.partition("The revision of this call is ")[2][: len(first)]
    assert answer("tag", uri, second)["previous"] == first


def use(bucket: Bucket, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in bucket.server.environment(endpoint).items():
        monkeypatch.setenv(name, value)


def test_tags_are_listed_by_registry_and_by_model(first: str, second: str, answer: Answer, run_here: Run) -> None:
    rows = answer("tags", "wc://prod")["tags"]
    assert {(row["model"], row["tag"], row["revision"], row["moves"]) for row in rows} == {
        ("llama", "v1", first, 1),
        ("llama", "v2", second, 1),
    }
    assert answer("tags", "home/llama")["tags"] == rows  # a replica is a registry by itself
    titles, *lines = run_here("tags", "wc://prod/llama").stdout.splitlines()
    assert titles.split() == ["model", "tag", "revision", "moves", "moved", "before"]
    assert {line.split()[2] for line in lines} == {first, second}


def test_revisions_are_listed_with_their_tags_and_base(first: str, second: str, answer: Answer, run_here: Run) -> None:
    rows = {row["revision"]: row for row in answer("revisions", "wc://prod")["revisions"]}
    assert (rows[first]["tags"], rows[first]["base"]) == (["v1"], "")
    assert (rows[second]["tags"], rows[second]["base"]) == (["v2"], f"llama@{first}")
    assert (rows[second]["n_tensors"], rows[second]["bytes"]) == (3, 393474)
    titles = run_here("revisions", "wc://prod/llama").stdout.splitlines()[0]
    assert titles.split() == ["model", "revision", "tags", "bytes", "tensors", "written", "base"]


@pytest.mark.parametrize("command", ["tags", "revisions"])
@pytest.mark.parametrize(
    ("uri", "exit_code", "said"),
    [
        ("wc://prod/lama", 3, r"no model 'lama' in .*home \(did you mean 'llama'\?\)"),
        ("wc://prdo", 2, "did you mean 'prod'"),
        ("nowhere", 3, "no registry at .*nowhere, nor one at .* that could have a model 'nowhere'"),
        ("model", 3, "no registry at .*model, nor one at"),
        ("https://host/registry", 2, "it is not listed or written to"),
    ],
)
def test_listing_of_what_is_not_there_says_so(
    first: str, run_here: Run, command: str, uri: str, exit_code: int, said: str
) -> None:
    code, _, message = refused(run_here, command, uri)
    assert code == exit_code
    assert re.search(said, message)


def test_tag_moves_and_says_what_was_before(first: str, second: str, answer: Answer, run_here: Run) -> None:
    assert shown(run_here, "tag", "wc://prod/llama@stable", "v1") == {"tag": "llama@stable", "revision": first}
    moved = answer("tag", "wc://prod/llama@stable", second)
    assert (moved["revision"], moved["previous"], moved["moves"]) == (second, first, 2)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["wc://prod/llama@stable", "v9"], 3, "did you mean 'v1'"),
        (
            ["wc://prod/llama@stable", "blake3:12"],
            2,
            "'blake3:12' is no revision of llama: expected another of its tags",
        ),
        (["wc://prod/llama@stable", f"blake3:{'0' * 64}"], 3, "no revision blake3:000"),
        (["wc://prod/llama@stable", "wc://prod/llama@v1"], 2, "is no revision of llama"),
        ([f"wc://prod/llama@blake3:{'0' * 64}", "v1"], 2, "name the tag to move, as in wc://prod/llama@stable"),
        (["home", "v1"], 2, "home is a registry: expected a model in it"),
    ],
)
def test_tag_refuses_what_is_no_tag_or_revision(
    first: str, run_here: Run, arguments: Sequence[str], exit_code: int, said: str
) -> None:
    code, _, message = refused(run_here, "tag", *arguments)
    assert code == exit_code
    assert said in message


def test_diff_shows_tensors_and_bytes(first: str, second: str, answer: Answer, run_here: Run) -> None:
    found = answer("diff", "wc://prod/llama@v1", "wc://prod/llama@v2")
    assert found["changed"] == dict.fromkeys(SHAPES, 131072)
    assert (found["n_same"], found["new_bytes"]) == (0, 393216)
    lines = run_here("diff", "wc://prod/llama@v1", "wc://prod/llama@v2").stdout.splitlines()
    assert lines[0].split() == ["~", "layers.0.weight", "131.07", "kB"]
    assert lines[-1] == "0 tensors are equal; 258 B of chunks are shared, 393.22 kB are new"


def test_diff_of_plain_folders_says_that_there_is_no_registry(run_here: Run) -> None:
    code, _, message = refused(run_here, "diff", "model", "tuned")
    assert code == 3
    assert "no registry at" in message


def test_rm_removes_a_tag_a_revision_and_a_model(first: str, second: str, answer: Answer, run_here: Run) -> None:
    assert answer("rm", "wc://prod/llama@v2") == {"removed": "tag v2 of llama"}
    assert answer("rm", f"wc://prod/llama@{second}") == {"removed": f"revision {second} of llama"}
    assert shown(run_here, "rm", "wc://prod/llama") == {"removed": "model llama: 1 revisions"}


def test_rm_of_one_replica_leaves_the_others(first: str, answer: Answer) -> None:
    weightcache.replicate("wc://prod", to="near")
    answer("rm", "wc://prod/llama@v1", "--replica", "near")
    assert [row["tag"] for row in answer("tags", "wc://prod")["tags"]] == ["v1"]
    assert answer("tags", "near")["tags"] == []


@pytest.mark.parametrize(
    ("uri", "exit_code", "said"),
    [
        ("wc://prod", 2, "names no model: expected registry/model"),
        ("wc://prod/llama@v9", 3, "no tag 'v9'"),
        ("wc://prod/lama", 3, "did you mean 'llama'"),
        ("wc://prod/llama@FIRST", 12, "tag v1 names it; remove or move the tag first"),
    ],
)
def test_rm_refuses_what_is_needed_or_not_there(first: str, run_here: Run, uri: str, exit_code: int, said: str) -> None:
    code, _, message = refused(run_here, "rm", uri.replace("FIRST", first))
    assert code == exit_code
    assert said in message


def test_gc_shows_first_and_removes_when_told(first: str, second: str, answer: Answer, run_here: Run) -> None:
    weightcache.remove("wc://prod/llama@v2")
    options = ("wc://prod", "--grace", "0s", "--untagged", "0s")
    dry = answer("gc", *options)
    assert (dry["is_dry"], dry["revisions"], dry["bytes"]) == (True, [f"llama@{second}"], 393216)
    young, kept = run_here("gc", "wc://prod", "--untagged", "0s").stdout.splitlines()[::2]
    assert young == "0 chunks, 0 B, and 1 revision would be removed, with --delete"
    assert kept == "kept: 3 chunks that are needed, 1 that are young"
    assert run_here("gc", *options, "--delete").stdout.startswith("1 chunk, 393.22 kB, and 1 revision removed\n")
    assert answer("gc", *options)["chunks"] == {}


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["wc://prod/llama"], 2, "'wc://prod/llama' names a model: expected its registry, 'wc://prod'"),
        (["home/llama"], 2, "'home/llama' names a model: expected its registry, 'home'"),
        (["nowhere"], 3, "no registry at"),
        (["wc://prod", "--replica", "nera"], 2, "did you mean 'near'"),
        (["home", "--replica", "near"], 2, "only stores of the configuration have replicas"),
    ],
)
@pytest.mark.parametrize("command", ["gc", "check"])
def test_gc_and_check_want_a_registry(
    first: str, run_here: Run, command: str, arguments: Sequence[str], exit_code: int, said: str
) -> None:
    code, _, message = refused(run_here, command, *arguments)
    assert code == exit_code
    assert said in message


@pytest.mark.parametrize("age", ["5", "h", "1.5h", "-1h", "0x1s"])
def test_an_age_that_is_none_is_a_usage_error(run_here: Run, age: str) -> None:
    ran = run_here("gc", "wc://prod", "--grace", age)
    assert ran.returncode == 2
    assert "expected a number and s, m, h, d or w, such as 12h" in ran.stderr


def test_check_exits_with_6_until_repaired(first: str, run_here: Run, here: Path) -> None:
    weightcache.replicate("wc://prod", to="near")
    rotten, lost = sorted((here / "home/chunks").rglob("*/*"), key=lambda path: path.stat().st_size)[-2:]
    rotten.write_bytes(b"!" + rotten.read_bytes()[1:])
    lost.unlink()
    ran = run_here("check", "wc://prod", "--deep")
    assert ran.returncode == 6
    assert ran.stdout.startswith("NOT SOUND: 1 model, 1 tag, 1 revision, 3 chunks, 393.47 kB (digests recomputed)\n")
    assert f"lost    blake3:{lost.name}" in ran.stdout
    assert f"rotten  blake3:{rotten.name}" in ran.stdout
    ran = run_here("check", "wc://prod", "--deep", "--repair", "near", "--json")
    found = json.loads(ran.stdout)
    assert (ran.returncode, found["sound"]) == (0, True)
    assert set(found["repaired"]) == {f"blake3:{lost.name}", f"blake3:{rotten.name}"}
    assert run_here("check", "wc://prod", "--deep").stdout.startswith("sound: ")


def test_a_damaged_revision_is_repaired_or_removed(
    first: str, second: str, run_here: Run, answer: Answer, here: Path
) -> None:
    weightcache.replicate("wc://prod", to="near")
    for revision in (first, second):
        (here / f"home/models/llama/revisions/{revision.partition(':')[2]}.json").write_text("{}")
    assert refused(run_here, "gc", "wc://prod")[:2] == (6, "integrity")
    assert run_here("check", "wc://prod").returncode == 6
    weightcache.remove("wc://prod/llama@v2")
    assert answer("rm", f"wc://prod/llama@{second}") == {"removed": f"revision {second} of llama"}
    found = answer("check", "wc://prod", "--repair", "near")
    assert (found["rotten"], found["repaired"]) == ([f"llama@{first}"], [f"llama@{first}"])
    assert answer("check", "wc://prod")["sound"]


def test_a_damaged_tag_is_found_and_removed(first: str, run_here: Run, answer: Answer, here: Path) -> None:
    (here / "home/models/llama/tags/v2.json").write_text("not at all")
    ran = run_here("check", "wc://prod")
    assert (ran.returncode, "v2.json is no file of a registry" in ran.stdout) == (6, True)
    assert refused(run_here, "tags", "wc://prod")[0] == 5
    assert answer("rm", "wc://prod/llama@v2") == {"removed": "tag v2 of llama"}
    assert answer("check", "wc://prod")["sound"]


def test_check_repairs_from_a_registry_that_is_no_replica(first: str, answer: Answer, here: Path) -> None:
    weightcache.publish("model", "other/llama@v1")
    lost = max((here / "home/chunks").rglob("*/*"), key=lambda path: path.stat().st_size)
    lost.unlink()
    assert answer("check", "wc://prod", "--repair", "./other")["repaired"] == [f"blake3:{lost.name}"]


@pytest.mark.parametrize(
    ("source", "exit_code", "said"),
    [("nera", 2, "did you mean 'near'"), ("./nowhere", 3, "no registry at"), ("far", 13, "is forbidden: store prod")],
)
def test_check_does_not_repair_from_what_is_not_there_or_forbidden(
    first: str, run_here: Run, source: str, exit_code: int, said: str
) -> None:
    code, _, message = refused(run_here, "check", "wc://prod", "--repair", source)
    assert code == exit_code
    assert said in message


def test_replicate_says_what_it_would_do_and_does_it(first: str, answer: Answer, run_here: Run) -> None:
    [dry] = answer("replicate", "wc://prod", "--to", "near", "--dry")["replications"]
    assert (dry["is_dry"], dry["tags"], dry["n_chunks"]) == (True, ["llama@v1"], 3)
    head, *rows, cost = run_here("replicate", "wc://prod/llama", "--to", "near").stdout.splitlines()
    assert head.endswith("near: 3 chunks, 393.47 kB, copied")
    assert rows == [f"revision  llama@{first}", "tag       llama@v1"]
    assert re.fullmatch(r"behind by \d+ s; costs 0.00 USD of egress", cost)
    assert run_here("replicate", "wc://prod", "--to", "near").stdout.endswith("near: nothing is missing\n")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["home"], 2, "'home' is no store of the configuration: expected wc://store"),
        (["wc://prod", "--to", "nera"], 2, "did you mean 'near'"),
        (["wc://prod", "--to", "home"], 2, "no replica to copy to beside home"),
        (["wc://prod", "--source", "nera", "--to", "near"], 2, "did you mean 'near'"),
        (["wc://prod/lama", "--to", "near"], 3, "did you mean 'llama'"),
        (["wc://prod", "--to", "far"], 13, "allows jurisdictions 'eu', and the target's jurisdiction is 'us'"),
    ],
)
def test_replicate_refuses_what_makes_no_sense_or_is_forbidden(
    first: str, run_here: Run, here: Path, arguments: Sequence[str], exit_code: int, said: str
) -> None:
    code, _, message = refused(run_here, "replicate", *arguments)
    assert code == exit_code
    assert said in message
    assert not (here / "far").exists()


def test_keygen_sign_and_trust_make_a_store_of_signed_models(
    first: str, answer: Answer, run_here: Run, here: Path
) -> None:
    public = shown(run_here, "keygen", "key.pem")["public"]
    assert answer("trust", "prod") == {"store": "prod", "trust": [], "line": "trust = []"}
    assert "signatures are not demanded" in shown(run_here, "trust", "prod")["trusted"]
    where, line = run_here("trust", "prod", public).stdout.splitlines()
    assert where == "in weightcache.toml, below [stores.prod]:"
    config = here / "weightcache.toml"
    config.write_text(config.read_text().replace("[stores.prod]", f"[stores.prod]\n{line}"))
    assert shown(run_here, "trust", "prod") == {"trusted": public}
    assert refused(run_here, "plan", "wc://prod/llama@v1")[:2] == (14, "signature")
    assert answer("sign", "wc://prod/llama@v1", "--key", "key.pem") == {"revision": first, "serial": 1}
    assert answer("plan", "wc://prod/llama@v1")["revision"] == first


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["keygen", "weightcache.toml"], 2, "exists: a key is never written over"),
        (["keygen", "nowhere/key.pem"], 2, "cannot be written: No such file"),
        (["sign", "wc://prod/llama@v1", "--key", "nowhere.pem"], 2, "cannot be read: No such file"),
        (["sign", "wc://prod/llama@v1", "--key", "weightcache.toml"], 2, "others may read it"),
        (["trust", "prdo"], 2, "did you mean 'prod'"),
        (["trust", "prod", "ed25519:12"], 2, "not a public key: 'ed25519:12'"),
    ],
)
def test_keys_that_are_none_are_refused(
    first: str, run_here: Run, arguments: Sequence[str], exit_code: int, said: str
) -> None:
    code, _, message = refused(run_here, *arguments)
    assert code == exit_code
    assert said in message


def test_sign_wants_a_published_revision(first: str, run_here: Run) -> None:
    weightcache.keygen("key.pem")
    assert refused(run_here, "sign", "wc://prod/llama@v9", "--key", "key.pem")[0] == 3
    assert refused(run_here, "sign", "home", "--key", "key.pem")[0] == 2


def test_audit_shows_what_was_forbidden(first: str, answer: Answer, run_here: Run) -> None:
    assert refused(run_here, "replicate", "wc://prod", "--to", "far")[0] == 13
    rows = answer("audit", "--forbidden")["rulings"]
    assert [(row["verb"], row["target"]["name"], row["allowed"]) for row in rows] == [("replicate", "far", False)]
    titles, line = run_here("audit", "--since", "1h", "--forbidden").stdout.splitlines()
    assert titles.split() == ["time", "what", "model", "from", "to", "rule"]
    assert line.endswith(
        "FORBIDDEN  replicate x1  wc://prod  this node (?/?/eu)  far (?/?/us)  "
        "store prod allows jurisdictions 'eu', and the target's jurisdiction is 'us'"
    )
    assert len(answer("audit")["rulings"]) > len(rows)


def test_audit_of_nothing_says_so(run_here: Run) -> None:
    assert run_here("audit").stdout == "nothing was ruled on\n"
    assert refused(run_here, "audit", "--since", "yesterday")[0] == 2


def test_plan_shows_which_replica_is_chosen_and_why(first: str, answer: Answer, run_here: Run) -> None:
    weightcache.replicate("wc://prod", to="near")
    choice = answer("plan", "wc://prod/llama@v1")["choices"]["replica"]
    assert re.match(r"(home|near) of 2 allowed \((home|near): \d+ ms, \? MB/s, 0.00\d+ s, 0 USD; ", choice)
    assert choice.endswith(
        "far is forbidden: store prod allows jurisdictions 'eu', and the source's jurisdiction is 'us'"
    )
    table = run_here("plan", "wc://prod/llama@v1").stdout
    assert re.search(r"^choice of replica  (home|near) of 2 allowed", table, re.MULTILINE)


@pytest.mark.parametrize(
    ("uri", "exit_code", "said"),
    [
        ("home", 2, "home is a registry: expected one of its models"),
        ("wc://prod", 2, "names a store: expected one of its models"),
        ("model@v1", 3, "a plain folder whose name has an @ is written with a slash behind it"),
        ("home/llama", 3, "no tag 'latest' of a model 'llama'"),
    ],
)
def test_a_registry_is_no_model(first: str, run_here: Run, uri: str, exit_code: int, said: str) -> None:
    code, _, message = refused(run_here, "load", uri)
    assert code == exit_code
    assert said in message


def test_a_registry_on_the_web_is_read(
    first: str, run_here: Run, answer: Answer, here: Path, http_folder: Callable[[Path], HttpServer]
) -> None:
    url = http_folder(here / "home").endpoint
    assert answer("plan", f"{url}/llama@v1")["revision"] == first
    assert refused(run_here, "load", url)[::2] == (
        2,
        f"{url} is a registry: expected one of its models, as in {url}/llama-3-8b@v1; weightcache tags shows them",
    )
