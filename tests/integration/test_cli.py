"""The command line as people and scripts meet it: what is printed where, and the code it exits with."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from cache_folder import chunk_files, flip_byte
from commands import Answer, Run
from models import write_tiny_sharded

import weightcache
import weightcache.cli
from weightcache import errors
from weightcache.cli.load import load
from weightcache.cli.output import Output, ago, printable, size, usd
from weightcache.ledger import Ledger
from weightcache.prices import LISTED, price_of
from weightcache.spending import append, bill

TIMEOUT_S = 60.0
CLI = (sys.executable, "-m", "weightcache")
NOBODY_LISTENS = "endpoint_url=http://127.0.0.1:1"
COMMANDS = (
    *("load", "pull", "prefetch", "plan"),
    *(
        "publish",
        "tags",
        "revisions",
        "tag",
        "diff",
        "rm",
        "gc",
        "check",
        "replicate",
        "keygen",
        "sign",
        "trust",
        "audit",
    ),
    *("ls", "verify", "evict", "pin", "unpin", "cost", "config", "doctor", "completion"),
)

# What is patched for a run in a process of its own.
WITHOUT_THE_EXTRA = "sys.modules.update(click=None, rich=None)"
FAILING = "def ls(): raise RuntimeError('the wheels\\ncame off')\nweightcache.models = ls"
INTERRUPTED = "def ls(): raise KeyboardInterrupt\nweightcache.models = ls"


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in pipes."""
    command = [*CLI, *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def run_patched(patch: str, *arguments: str, then: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line in a process where `patch` ran before, and `then` after it."""
    lines = (
        "import sys, weightcache, weightcache.cli",
        f"sys.argv[1:] = {arguments!r}",
        patch,
        "code = weightcache.cli.main()",
        then,
        "sys.exit(code)",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_tiny_sharded(folder)
    return folder


@pytest.fixture
def cached(model: Path) -> Path:
    """A model that is in the cache."""
    weightcache.prefetch(model)
    return model


# -- at start


def test_version_needs_no_extra() -> None:
    ran = run_patched(WITHOUT_THE_EXTRA, "--version")
    assert (ran.returncode, ran.stdout) == (0, f"weightcache {weightcache.__version__}\n")


def test_missing_extra_is_named_in_one_line() -> None:
    ran = run_patched(WITHOUT_THE_EXTRA, "ls")
    needs = 'weightcache\'s command line needs its extra: pip install "weightcache[cli]"\n'
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", needs)


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_start_imports_nothing_heavy(argument: str) -> None:
    heavy = (
        "print(sorted({'torch', 'numpy', 'fsspec', 'botocore', 'rich.table'} & sys.modules.keys()), file=sys.stderr)"
    )
    assert run_patched("", argument, then=heavy).stderr.endswith("[]\n")


def test_help_names_every_command_and_every_exit_code() -> None:
    words = run("--help").stdout.split()
    tree = (each for each in vars(errors).values() if isinstance(each, type))
    codes = {each.exit_code for each in tree if issubclass(each, errors.WeightcacheError)}
    assert {str(code) for code in (0, 1, 130, *codes)} <= set(words)
    assert set(COMMANDS) <= set(words)


def test_unknown_command_is_answered_with_the_nearest() -> None:
    ran = run("lod", "x")
    assert ran.returncode == 2
    assert "no such command 'lod' (did you mean 'load'?)" in ran.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_asks_this_program(shell: str) -> None:
    assert "_WEIGHTCACHE_COMPLETE" in run("completion", shell).stdout


def test_completion_completes() -> None:
    ran = run(_WEIGHTCACHE_COMPLETE="bash_complete", COMP_WORDS="weightcache ev", COMP_CWORD="1")
    assert ran.stdout == "plain,evict\n"


# -- results


def test_load_reports_as_one_json_object(model: Path, answer: Answer) -> None:
    found = answer("load", model, "--cache", "disk", "--include", "model.layers.0.*", "--device", "cpu")
    assert found["uri"] == str(model)
    assert found["n_tensors"] == 9
    assert found["device"] == "cpu"
    assert found["stored_bytes"] >= found["tensor_bytes"]  # it waited
    assert {"open", "describe", "look", "move", "bind", "total"} <= found["seconds"].keys()
    assert {"bytes", "gb_per_s", "n_requests", "n_retries", "choices", "warnings"} <= found.keys()
    assert "config.json" in found["files"]


def test_load_is_written_as_a_trace_and_as_a_page(model: Path, answer: Answer, tmp_path: Path) -> None:
    trace, page = tmp_path / "load.json", tmp_path / "load.html"
    found = answer("load", model, "--cache", "disk", "--device", "cpu", "--trace", trace, "--report", page)
    assert "spans" not in found
    events = json.loads(trace.read_text())["traceEvents"]
    assert {"stage", "origin", "verify", "store"} <= {event.get("cat") for event in events}
    assert f"<h1>{model}</h1>" in page.read_text()


@pytest.mark.parametrize("option", ["--trace", "--report"])
def test_file_that_cannot_be_written_is_known_before_the_load(model: Path, run_here: Run, option: str) -> None:
    ran = run_here("load", model, "--cache", "disk", option, model / "no-such-folder" / "file")
    assert ran.returncode == 2
    assert "no-such-folder" in ran.stderr
    assert weightcache.models() == []


def test_report_in_a_pipe_is_plain_text_without_progress(model: Path) -> None:
    ran = run("prefetch", model)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.isascii()
    assert not {"\x1b", "\r"} & set(ran.stdout)
    shown = dict(line.split(maxsplit=1) for line in ran.stdout.splitlines())
    assert shown["model"] == str(model)
    assert shown["stored"].endswith("MB")
    assert "origin" in shown["bytes"]


def test_progress_is_shown_to_a_terminal(model: Path) -> None:
    outside, inside = pty.openpty()
    with subprocess.Popen([*CLI, "prefetch", str(model)], stdout=subprocess.PIPE, stderr=inside) as process:
        os.close(inside)
        shown = b"".join(iter(lambda: read_terminal(outside), b""))
        assert process.stdout is not None
        printed = process.stdout.read()
    os.close(outside)
    assert process.returncode == 0
    assert b"prefetch" in shown
    assert b"\x1b" not in printed


def read_terminal(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 16)
    except OSError:  # Linux says EIO where the other end is closed
        return b""


def test_pull_writes_the_files_bit_for_bit(model: Path, answer: Answer, tmp_path: Path) -> None:
    found = answer("pull", model, tmp_path / "pulled")
    assert found["n_tensors"] == 0
    names = [path.name for path in sorted(model.iterdir())]
    assert [path.name for path in sorted((tmp_path / "pulled").iterdir())] == names
    for name in names:
        assert (tmp_path / "pulled" / name).read_bytes() == (model / name).read_bytes()


def test_plan_moves_nothing(model: Path, answer: Answer) -> None:
    found = answer("plan", model, "--exclude", "model.layers.*")
    assert found["n_tensors"] == 2
    assert found["disk_bytes"] == 0
    assert found["origin_bytes"] >= found["tensor_bytes"]


def test_ls_without_a_cache_makes_none(answer: Answer, tmp_path: Path) -> None:
    assert answer("ls") == {"models": []}
    assert not (tmp_path / "cache").exists()


def test_ls_shows_sizes_and_holds_in_words(cached: Path, answer: Answer, run_here: Run) -> None:
    assert answer("pin", cached) == {"uri": str(cached), "pinned": True}
    [model] = answer("ls")["models"]
    assert (model["uri"], model["tier"], model["pinned"], model["in_use"]) == (str(cached), "disk", True, False)
    assert 0 < model["bytes"] <= model["total_bytes"]
    titles, row = run_here("ls").stdout.splitlines()
    assert titles.split() == ["model", "tier", "here", "of", "last", "use", "held", "endpoint"]
    assert str(cached) in row
    assert "MB" in row
    assert "just now" in row
    assert row.endswith("pinned")


def test_evict_frees_an_unpinned_model(cached: Path, answer: Answer) -> None:
    weightcache.pin(cached)
    assert answer("unpin", cached) == {"uri": str(cached), "pinned": False}
    [evicted] = answer("evict", cached)["evicted"]
    assert evicted["uri"] == str(cached)
    assert evicted["freed_bytes"] > 3_000_000
    assert answer("ls") == {"models": []}


def test_verify_exits_with_6_until_repaired(cached: Path, run_here: Run, tmp_path: Path) -> None:
    digest, path = next(iter(chunk_files(tmp_path / "cache").items()))
    flip_byte(path, 0)
    assert run_here("verify").returncode == 0  # presence and size are right
    ran = run_here("verify", "--deep")
    assert ran.returncode == errors.IntegrityError.exit_code
    assert f"unrepaired  blake3:{digest}" in ran.stdout
    ran = run_here("verify", "--deep", "--repair", "--json")
    found = json.loads(ran.stdout)
    assert (ran.returncode, found["sound"]) == (0, True)
    assert found["rotten"] == found["repaired"] == [f"blake3:{digest}"]
    assert found["unrepaired"] == []


def test_cost_sums_up_what_loads_asked_for(answer: Answer, run_here: Run, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    for number, uri in enumerate(("s3://bucket/a", "s3://bucket/b")):
        ledger = Ledger("s3://bucket", n_gets=1000, n_lists=number, received_bytes=10**9)
        append(
            tmp_path / "cache",
            bill(uri, [ledger], 2 * 10**9, lambda place: price_of(place, {}), 1_796_000_000 + number),
        )  # 2026-11-30
    found = answer("cost", "--since", "2026-11")
    assert [row["name"] for row in found["rows"]] == ["s3://bucket"]
    assert found["total"]["n_gets"] == 2000
    assert found["total"]["usd"] == pytest.approx(2 * 0.0904 + 0.000005)
    assert found["prices"] == [LISTED]
    titles, first, second, total, assumed = run_here("cost", "--by", "model").stdout.splitlines()
    assert titles.split()[:3] == ["model", "gets", "lists"]
    assert first.startswith("s3://bucket/b  1000  1 ")
    assert second.split()[0] == "s3://bucket/a"
    assert total.split()[:2] == ["total", "2000"]
    assert total.endswith("0.1808 USD  4.00 GB  0.3600 USD")
    assert assumed == f"priced by: {LISTED}. Free shares are not deducted."


def test_cost_of_nothing_says_so(run_here: Run, answer: Answer, tmp_path: Path) -> None:
    assert answer("cost")["rows"] == []
    assert run_here("cost", "--since", "7d").stdout == "no load is known that dialled since 7d\n"
    assert not (tmp_path / "cache").exists()


def test_cost_since_nonsense_is_a_usage_error(run_here: Run) -> None:
    ran = run_here("cost", "--since", "yesterday")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "since='yesterday': expected an age such as 7d" in ran.stderr


def test_cost_is_simulated_store_by_store(answer: Answer, run_here: Run, tmp_path: Path) -> None:
    found = answer("cost", "--simulate")
    assert [month["store"] for month in found["months"]] == ["aws", "gcs", "azure", "r2", "tigris", "b2"]
    assert found["months"][0]["usd"] == pytest.approx(1234.5538)
    ran = run_here("cost", "--simulate", "--model-gb", "140", "--loads", "100", "--nodes", "1")
    lines = ran.stdout.splitlines()
    assert lines[0] == "A 140.00 GB model, 100 loads a month to another cloud, 8345 GETs each if cold."
    assert lines[1] == "All of them cold; then with the disk cache, 1 of them cold."
    amounts = "3.22 USD 1231.00 USD 0.3338 USD 1234.55 USD 3.60 USD 0.0033 USD 6.82 USD 1227.73 USD"
    assert lines[3].split() == ["aws", *amounts.split()]
    assert "0.085 from 10 TB" in ran.stdout
    assert answer("cost", "--simulate", "--loads", "50", "--hit-share", "0.9")["n_cold"] == 5
    assert not (tmp_path / "cache").exists()


def test_cost_of_configured_replicas_is_simulated(
    answer: Answer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "my.toml").write_text('[[stores.prod.replicas]]\nname = "here"\nurl = "/r"\negress_usd_per_gb = 0.5')
    monkeypatch.setenv("WEIGHTCACHE_CONFIG", str(tmp_path / "my.toml"))
    month = answer("cost", "--simulate", "--model-gb", "1", "--loads", "4")["months"][-1]
    assert (month["store"], month["egress_usd"], month["cached_egress_usd"]) == ("prod/here", 2.0, 0.5)


@pytest.mark.parametrize(
    "arguments", [["--loads", "5"], ["--simulate", "--by", "model"], ["--simulate", "--since", "7d"]]
)
def test_cost_takes_no_options_that_would_mean_nothing(run_here: Run, arguments: Sequence[str]) -> None:
    ran = run_here("cost", *arguments)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "--simulate" in ran.stderr


CONFIGURATION = """
threads = 3
redirect_hosts = ["h"]
[prices.aws]
egress_usd_per_gb = 0
[node]
provider = "aws"
jurisdiction = "eu"
allow = { jurisdictions = ["eu"] }
[stores.prod]
deny = { providers = ["gcs"] }
[[stores.prod.replicas]]
url = "s3://models/registry"
endpoint = "https://t3.storage.dev"
region = "fra"
jurisdiction = "eu"
profile = "mine"
access = "write"
replicates_itself = true
[[stores.prod.replicas]]
name = "lake"
url = "s3://lake/registry"
"""


def test_configuration_is_shown_as_it_is_understood(answer: Answer, run_here: Run, tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(CONFIGURATION)
    found = answer("config", "check", path)
    assert found["file"] == str(path)
    assert found["settings"]["threads"] == {"value": 3, "from": str(path)}
    assert found["policy"] == {"allow": {"jurisdictions": ["eu"]}}
    store = found["stores"]["prod"]
    assert (store["policy"], store["trust"], store["publish_to"]) == (
        {"deny": {"providers": ["gcs"]}},
        [],
        "tigris-fra",
    )
    tigris, lake = store["replicas"]
    assert {key: tigris[key] for key in ("name", "region", "access", "replicates_itself")} == {
        "name": "tigris-fra",
        "region": "fra",
        "access": "write",
        "replicates_itself": True,
    }
    assert (lake["price"]["egress_usd_per_gb"], lake["access"]) == (0.0, "read")
    shown = run_here("config", "check", path).stdout
    lines = [line.split() for line in shown.splitlines()]
    assert ["file", str(path)] in lines
    assert ["node", "aws/?/eu"] in lines
    assert ["policy", "allow", "jurisdictions", "eu"] in lines
    assert ["threads", "3,", "from", str(path)] in lines
    assert ["prices", "aws:", "egress_usd_per_gb", "0,", "from", str(path)] in lines
    assert ["publishes", "to", "tigris-fra"] in lines
    [row] = [line for line in shown.splitlines() if line.startswith("tigris-fra")]
    for words in (
        "https://t3.storage.dev (profile mine)",
        "tigris/fra/eu, replicates itself",
        "write",
        "0 USD a GB",
        LISTED,
    ):
        assert words in row


def test_configuration_without_a_file_is_the_environments(
    answer: Answer, run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    found = answer("config", "check")
    assert found["file"] is None
    assert found["settings"] == {"dir": {"value": str(tmp_path / "cache"), "from": "the environment"}}
    assert "every place" in run_here("config", "check").stdout
    assert not (tmp_path / "cache").exists()


def test_doctor_finds_and_keeps_secrets() -> None:
    secrets = {
        "AWS_ACCESS_KEY_ID": "keyinthetest",
        "AWS_SECRET_ACCESS_KEY": "secretinthetest",
        "AWS_SESSION_TOKEN": "tokeninthetest",
        "AWS_ENDPOINT_URL_S3": "http://user:passwordinthetest@127.0.0.1:1",
        "HTTP_PROXY": "http://user:passwordinthetest@127.0.0.1:2",
    }
    ran = run("doctor", "--json", "-vv", **secrets)
    assert ran.returncode == 0
    found = json.loads(ran.stdout)
    assert found["broken"] == []
    assert {"s3 credentials", "disk speed", "gpu"} <= {finding["name"] for finding in found["findings"]}
    assert all(finding.keys() == {"name", "value", "ok", "advice"} for finding in found["findings"])
    assert "inthetest" not in ran.stdout + ran.stderr


def test_doctor_exits_with_1_when_something_is_broken(
    run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("WEIGHTCACHE_DIR", str(tmp_path / "file" / "cache"))
    ran = run_here("doctor")
    assert ran.returncode == 1
    assert "BROKEN  cache folder" in ran.stdout


# -- errors


def s3(*arguments: str) -> Sequence[str]:
    return ("plan", "s3://bucket/model", "--storage-option", NOBODY_LISTENS, *arguments)


KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "WEIGHTCACHE_CONFIG": "once.toml"}


@pytest.mark.parametrize(
    ("code", "exit_code", "arguments", "environment"),
    [
        ("config", 2, ["ls"], {"WEIGHTCACHE_DIRR": "/x"}),
        ("config", 2, ["prefetch", "model", "--tier", "host"], {}),
        ("config", 2, ["config", "check", "absent.toml"], {}),
        ("config", 2, ["config", "check", "stores.toml"], {}),
        ("config", 2, ["cost", "--simulate", "--hit-share", "2"], {}),
        ("uri", 2, ["plan", "wc://prod/model"], {}),
        ("uri", 2, ["plan", "wc://prod"], {"WEIGHTCACHE_CONFIG": "prod.toml"}),
        ("uri", 2, ["plan", "model@"], {}),
        ("uri", 2, ["plan", "s3://user:password@bucket/model"], {}),
        ("uri", 2, ["plan", "s3://user:password@bucket/model@v1"], {}),
        ("not-found", 3, ["plan", "nowhere"], {}),
        ("not-found", 3, ["plan", "model@v1"], {}),
        ("not-found", 3, ["evict", "model"], {}),
        ("access-denied", 4, s3(), {}),
        ("format", 5, ["plan", "broken"], {}),
        ("unsafe-format", 5, ["plan", "model.bin"], {}),
        ("origin-unreachable", 7, s3(), KEYS),
        ("offline", 8, s3("--offline"), {}),
        ("capacity", 9, ["pull", "model", "model/config.json/folder"], {}),
        ("device", 10, ["load", "model", "--device", "abacus"], {}),
        ("cache-format", 11, ["ls"], {"WEIGHTCACHE_DIR": "newer"}),
    ],
)
def test_error_is_one_line_and_a_code(
    code: str,
    exit_code: int,
    arguments: Sequence[str],
    environment: dict[str, str],
    model: Path,
    run_here: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(model.parent)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    Path("broken").mkdir()
    Path("broken/model.safetensors").write_bytes(b"not at all")
    Path("once.toml").write_text("attempts = 1")
    Path("prod.toml").write_text('[[stores.prod.replicas]]\nurl = "/r"')
    Path("stores.toml").write_text('[[stores.prod.replicas]]\nurl = "s3://user:password@bucket/r"')
    Path("newer").mkdir()
    Path("newer/weightcache.json").write_text('{"version": 999}')
    ran = run_here(*arguments, "--json")
    [line] = ran.stderr.splitlines()
    error = json.loads(ran.stdout)["error"]
    assert (ran.returncode, error["code"]) == (exit_code, code)
    assert line == f"weightcache: {error['message']} [{code}]"
    assert isinstance(error["facts"], dict)
    assert "password" not in line


def test_pinned_model_is_in_use(cached: Path) -> None:
    weightcache.pin(cached)
    ran = run("evict", cached)
    assert (ran.returncode, ran.stdout) == (errors.InUseError.exit_code, "")
    assert ran.stderr.endswith(" [in-use]\n")


def test_names_cannot_speak_to_the_terminal(run_here: Run, tmp_path: Path) -> None:
    ran = run_here("plan", f"{tmp_path}/no\nsuch\x1b[2J\udcff")
    assert ran.returncode == 3
    assert r"no\nsuch\x1b[2J\udcff" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_internal_error_is_one_line_and_verbose_has_the_traceback() -> None:
    ran = run_patched(FAILING, "ls")
    line = r"weightcache: internal error: RuntimeError: the wheels\ncame off; run with -vv for the traceback"
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", f"{line}\n")
    assert "Traceback" in run_patched(FAILING, "ls", "-vv").stderr


def test_interrupt_is_quiet() -> None:
    ran = run_patched(INTERRUPTED, "ls")
    assert (ran.returncode, ran.stdout, ran.stderr.strip()) == (130, "", "")


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_reader_that_is_gone_is_no_error(flags: Sequence[str]) -> None:
    outside, inside = os.pipe()
    os.close(outside)
    ran = subprocess.run([*CLI, "ls", *flags], stdout=inside, stderr=subprocess.PIPE, timeout=TIMEOUT_S, check=False)
    os.close(inside)
    assert ran.stderr == b""


# -- options


def storage_options(*pairs: str) -> dict[str, Any]:
    arguments = [part for pair in pairs for part in ("--storage-option", pair)]
    context = load.make_context("load", ["model", *arguments], obj=Output())
    found: dict[str, Any] = context.params["storage_options"]
    return found


def test_storage_options_are_json_where_they_can_be_and_nest_by_dots() -> None:
    assert storage_options(
        "anon=true",
        "endpoint_url=http://host:9000/?a=b",
        "client_kwargs.region_name=eu-west-1",
        "client_kwargs.verify=false",
        'config_kwargs={"connect_timeout": 5}',
        "empty=",
    ) == {
        "anon": True,
        "endpoint_url": "http://host:9000/?a=b",
        "client_kwargs": {"region_name": "eu-west-1", "verify": False},
        "config_kwargs": {"connect_timeout": 5},
        "empty": "",
    }


@pytest.mark.parametrize("pairs", [["topsecret"], ["=topsecret"], ["a..b=topsecret"], ["a=1", "a.b=topsecret"]])
def test_storage_option_that_makes_no_sense_is_refused_unquoted(pairs: Sequence[str]) -> None:
    with pytest.raises(click.BadParameter) as caught:
        storage_options(*pairs)
    assert "topsecret" not in caught.value.format_message()


# -- words


def test_sizes_and_ages_are_read_at_a_glance(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [size(nbytes) for nbytes in (0, 999, 1000, 2_471_628_800)] == ["0 B", "999 B", "1.00 kB", "2.47 GB"]
    monkeypatch.setattr("time.time", lambda: 1e6)
    ages = [ago(1e6 - passed_s) for passed_s in (-5, 59, 60, 7199, 200_000)]
    assert ages == ["just now", "just now", "1 min ago", "1 h ago", "2 d ago"]


def test_money_is_read_at_a_glance() -> None:
    amounts = (0, 0.00001, 0.0904, 1, 1234.5)
    assert [usd(amount) for amount in amounts] == ["0.00 USD", "< 0.0001 USD", "0.0904 USD", "1.00 USD", "1234.50 USD"]


def test_what_cannot_be_printed_is_escaped() -> None:
    assert printable("é 模型 a\tb\x07\u202e") == r"é 模型 a\tb\x07\u202e"
