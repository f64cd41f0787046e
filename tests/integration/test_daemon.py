"""The node daemon and its clients, as real processes: one copy of a model for all of them, and what a user sees of it."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import models
import pytest
import torch
from hosted import Hosted, host
from nodes import ClientProcess, Node, clients, wait_until
from reference import assert_same, fingerprint
from servers import Bucket, Proxy

import weightcache
from weightcache import errors
from weightcache.forecast import Forecast
from weightcache.tensors import LoadedModel

SHAPES: models.Shapes = {
    "a.weight": ("BF16", (1024, 1536)),
    "b.odd": ("U8", (1001,)),
    "c.empty": ("F16", (0, 4)),
    "d.scalar": ("I64", ()),
    "e.large": ("F32", (3000, 2048)),
}
MIB = 1 << 20


@pytest.fixture
def hosted(tmp_path: Path, bucket: Bucket, proxy: Proxy) -> Hosted:
    folder = tmp_path / "model"
    folder.mkdir()
    models.write_safetensors(folder / "model.safetensors", SHAPES)
    (folder / "config.json").write_text('{"model_type": "test"}')
    (folder / "empty.txt").touch()
    return host(folder, bucket, proxy)


def load(hosted: Hosted, device: str = "cpu", **arguments: object) -> LoadedModel:
    return weightcache.load_model(hosted.url, device, storage_options=hosted.options, **arguments)  # type: ignore[arg-type]


def is_attached(model: LoadedModel) -> bool:
    return model.report.choices.get("daemon", "").startswith("attached")


# -- one copy for all


def test_a_load_attaches_to_the_daemon_s_image(node: Node, hosted: Hosted) -> None:
    with load(hosted) as model:
        assert is_attached(model)
        assert_same(model, hosted.tensors)
        assert (model.report.bytes["origin"], model.report.bytes["disk"]) == (0, 0)
        assert model.report.bytes["host"] >= sum(tensor.nbytes for tensor in hosted.tensors.values())
        assert model.config == {"model_type": "test"}
        assert model.files["empty.txt"].read_bytes() == b""
    assert hosted.served_bytes() <= 1.01 * hosted.nbytes


def test_what_is_resident_is_attached_to_without_an_origin_byte(node: Node, hosted: Hosted) -> None:
    with load(hosted):
        pass
    hosted.proxy.reset()
    with load(hosted) as model:
        assert_same(model, hosted.tensors)

    def files_are_shared() -> bool:
        with load(hosted) as model:
            return model.files["config.json"].is_relative_to(node.folder)

    wait_until(files_are_shared)  # the daemon lays them out once the image is full
    assert hosted.served_bytes() == 0


def test_processes_that_load_one_cold_model_at_once_cost_the_origin_one(node: Node, hosted: Hosted) -> None:
    loading = [ClientProcess(hosted.url, hosted.options) for _ in range(4)]
    with clients(*loading):
        results = [client.result() for client in loading]
        assert {result["tensors"] for result in results} == {fingerprint(hosted.tensors)}
        assert all(result["report"]["bytes"]["origin"] == 0 for result in results)
        wait_until(lambda: node.image(hosted.url).get("n_leases") == 4)
        assert {client.end() for client in loading} == {fingerprint(hosted.tensors)}
    assert hosted.served_bytes() <= 1.01 * hosted.nbytes


def test_a_client_attaches_while_the_image_is_being_filled(node: Node, hosted: Hosted) -> None:
    hosted.proxy.script("GET .*safetensors", "ok hold")
    first = ClientProcess(hosted.url, hosted.options)
    with clients(first):
        hosted.proxy.wait_stopped(timeout_s=60)
        wait_until(lambda: node.image(hosted.url).get("state") == "filling")
        tensors = weightcache.stream(hosted.url, "cpu", storage_options=hosted.options)
        hosted.proxy.release()
        assert_same(dict(tensors), hosted.tensors)
        first.result()
        assert first.end() == fingerprint(hosted.tensors)
    assert hosted.served_bytes() <= 1.01 * hosted.nbytes


def test_what_one_client_writes_no_other_sees(node: Node, hosted: Hosted) -> None:
    with load(hosted) as ours, load(hosted) as theirs:
        ours["e.large"].fill_(7.0)
        assert_same(theirs, hosted.tensors)
        assert ours["e.large"].eq(7.0).all()


@pytest.mark.parametrize("way", ["stream", "load_into", "dtype"])
def test_every_way_of_loading_takes_the_image(node: Node, hosted: Hosted, way: str) -> None:
    with load(hosted):
        pass
    hosted.proxy.reset()
    if way == "stream":
        assert_same(dict(weightcache.stream(hosted.url, "cpu", storage_options=hosted.options)), hosted.tensors)
    elif way == "dtype":
        with load(hosted, dtype="float16") as model:
            assert_same({"e": model["e.large"]}, {"e": hosted.tensors["e.large"].half()})
            assert is_attached(model)
    else:
        part, whole = torch.nn.Module(), torch.nn.Module()
        part.register_buffer("large", torch.zeros(3000, 2048))
        whole.e = part
        report = weightcache.load_into(whole, hosted.url, strict=False, storage_options=hosted.options)
        assert_same({"large": part.large}, {"large": hosted.tensors["e.large"]})
        assert report.choices["daemon"].startswith("attached")
    assert hosted.served_bytes() == 0


def test_a_part_of_a_model_is_taken_from_an_image_that_is_there_and_fills_none(node: Node, hosted: Hosted) -> None:
    with load(hosted, include="e.*") as model:
        assert not is_attached(model)
    assert node.images() == {}
    with load(hosted):
        pass
    with load(hosted, include="e.*") as model:
        assert is_attached(model)
        assert_same(model, {"e.large": hosted.tensors["e.large"]})


def test_a_folder_of_this_machine_is_shared_where_it_was_warmed(node: Node, hosted: Hosted) -> None:
    with weightcache.load_model(hosted.folder, "cpu") as model:
        assert not is_attached(model)
    weightcache.warm(hosted.folder)
    with weightcache.load_model(hosted.folder, "cpu") as model:
        assert is_attached(model)
        assert_same(model, hosted.tensors)
        assert model.files["config.json"] == hosted.folder / "config.json"


def test_a_container_that_shares_the_socket_alone_gets_files_of_its_own(
    start: Callable[..., Node], hosted: Hosted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start()
    elsewhere = tmp_path / "container"
    client = ClientProcess(
        hosted.url, hosted.options, {"WEIGHTCACHE_SOCKET": str(node.socket), "WEIGHTCACHE_DIR": str(elsewhere)}
    )
    with clients(client):
        loaded = client.result()
        assert loaded["tensors"] == fingerprint(hosted.tensors)
        assert loaded["report"]["choices"]["daemon"].startswith("attached")
        assert Path(loaded["files"]["config.json"]).read_bytes() == (hosted.folder / "config.json").read_bytes()
        client.end()
    assert not elsewhere.exists()


def test_a_model_that_moved_at_the_origin_is_fetched_and_the_old_one_stays_for_who_holds_it(
    node: Node, hosted: Hosted, tmp_path: Path
) -> None:
    with load(hosted) as old:
        before = fingerprint(old)
        models.write_safetensors(hosted.folder / "model.safetensors", SHAPES, seed=5)
        hosted.bucket.upload(hosted.folder, hosted.prefix)
        wait_until(lambda: _revision(hosted) != old.report.revision)
        assert fingerprint(old) == before
        assert node.state()["tiers"][0]["used_bytes"] > 1.5 * old.report.tensor_bytes


def _revision(hosted: Hosted) -> str:
    with load(hosted) as model:
        assert is_attached(model)
        return model.report.revision


def test_a_fork_keeps_what_its_parent_attached(node: Node, hosted: Hosted) -> None:
    script = f"""if True:
        import os, sys
        import weightcache
        model = weightcache.load_model({hosted.url!r}, "cpu", storage_options={hosted.options!r})
        assert model.report.choices["daemon"].startswith("attached"), model.report.choices
        before = model["e.large"][0, 0].item()
        pid = os.fork()
        if pid == 0:
            os._exit(0 if str(model["e.large"][0, 0].item()) == str(before) else 1)
        model.close()
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# -- leases


def test_a_lease_lasts_as_long_as_the_model_is_open(node: Node, hosted: Hosted) -> None:
    with load(hosted):
        wait_until(lambda: node.image(hosted.url).get("n_leases") == 1)
    wait_until(lambda: node.image(hosted.url).get("n_leases") == 0)


def test_a_killed_client_s_lease_is_gone(node: Node, hosted: Hosted) -> None:
    client = ClientProcess(hosted.url, hosted.options)
    with clients(client):
        client.result()
        wait_until(lambda: node.image(hosted.url).get("n_leases") == 1)
        client.kill()
        wait_until(lambda: node.image(hosted.url).get("n_leases") == 0, 5.0)


def test_tensors_stay_valid_when_the_model_is_closed_and_the_image_evicted(node: Node, hosted: Hosted) -> None:
    with load(hosted) as model:
        kept = dict(model)
    assert weightcache.evict(hosted.url) > 0
    wait_until(lambda: node.images() == {})
    assert_same(kept, hosted.tensors)


def test_an_evicted_image_s_memory_is_free(node: Node, hosted: Hosted) -> None:
    with load(hosted):
        pass
    weightcache.evict(hosted.url)
    maps = Path(f"/proc/{node.process.pid}/maps")
    wait_until(lambda: "memfd:weightcache" not in maps.read_text())


def test_an_image_in_use_keeps_its_room(start: Callable[..., Node], hosted: Hosted, tmp_path: Path) -> None:
    start(f"host_budget_bytes = {40 * MIB}\n")
    other = tmp_path / "other"
    other.mkdir()
    models.write_safetensors(other / "model.safetensors", SHAPES, seed=9)
    hosted.bucket.upload(other, "models/other")
    url = f"{hosted.bucket.url}/models/other"
    with load(hosted), weightcache.load_model(url, "cpu", storage_options=hosted.options) as second:
        assert "no room" in second.report.choices["daemon"]
    with weightcache.load_model(url, "cpu", storage_options=hosted.options) as second:
        assert is_attached(second)


# -- warm, by itself and by request


def test_warm_brings_a_model_before_it_is_loaded(node: Node, hosted: Hosted) -> None:
    told: list[tuple[int, int]] = []
    report = weightcache.warm(hosted.url, storage_options=hosted.options, progress=lambda *each: told.append(each))
    assert report.bytes["origin"] >= sum(tensor.nbytes for tensor in hosted.tensors.values())
    hosted.proxy.reset()
    with load(hosted) as model:
        assert is_attached(model)
    assert hosted.served_bytes() == 0


def test_a_list_is_brought_at_the_start_and_what_moves_is_brought_again(
    start: Callable[..., Node], hosted: Hosted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in hosted.environment.items():
        monkeypatch.setenv(name, value)
    node = start(
        f'[daemon]\nhttp = ""\nwatch = "1s"\n[[warm]]\nmodel = "{hosted.url}"\ntier = "host"\n',
    )
    wait_until(lambda: node.image(hosted.url).get("pinned", False))
    before = node.image(hosted.url)
    models.write_safetensors(hosted.folder / "model.safetensors", SHAPES, seed=5)
    hosted.bucket.upload(hosted.folder, hosted.prefix)
    wait_until(lambda: node.image(hosted.url).get("revision", before["revision"]) != before["revision"])
    wait_until(lambda: {each["what"] for each in node.state()["decisions"]} == {"fetch"})


def expect(url: str) -> Path:
    """Have a model expected within the minute, by what its past says; returns the file that says so."""
    past = Path(os.environ["WEIGHTCACHE_DIR"]) / "daemon" / "forecast.json"
    past.parent.mkdir(mode=0o700, parents=True)
    forecast = Forecast()
    for n_hours in range(12, 0, -1):
        forecast.used(url, time.time() - n_hours * 3600 + 60)  # every hour, and a minute from now again
    past.write_text(json.dumps(forecast.to_form()))
    return past


def test_what_is_expected_is_fetched_before_it_is_asked_for(
    start: Callable[..., Node], hosted: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in hosted.environment.items():
        monkeypatch.setenv(name, value)
    past = expect(hosted.url)
    node = start('[daemon]\nhttp = ""\nforecast = true\n')
    wait_until(lambda: node.image(hosted.url).get("state") == "resident")
    wait_until(lambda: [each["what"] for each in node.state()["decisions"]] == ["fetch"])
    state = node.state()
    assert state["decisions"][0]["why"].startswith("by forecast")
    assert state["forecast"][0]["uri"] == hosted.url
    hosted.proxy.reset()
    with weightcache.load_model(hosted.url, "cpu") as model:
        assert is_attached(model)
    assert hosted.served_bytes() == 0
    assert node.stop() == 0
    assert len(Forecast.from_form(json.loads(past.read_text())).to_form()["models"][hosted.url][1]) == 12


def test_a_list_is_a_demand_and_drives_out_what_is_expected(
    start: Callable[..., Node], hosted: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in hosted.environment.items():
        monkeypatch.setenv(name, value)
    expect(hosted.url)
    configuration = f'host_budget_bytes = {60 * MIB}\n[daemon]\nhttp = ""\nforecast = true\n'
    node = start(configuration)
    wait_until(lambda: [each["what"] for each in node.state()["decisions"]] == ["fetch"])
    node.write(f'{configuration}[[warm]]\nmodel = "{hosted.folder}"\ntier = "host"\n')
    node.signal(signal.SIGHUP)
    wait_until(lambda: [each["why"][:7] for each in node.state()["decisions"]] == ["by list", "by fore"])
    assert list(node.images()) == [str(hosted.folder)]


def test_what_nobody_uses_is_demoted(start: Callable[..., Node], hosted: Hosted) -> None:
    node = start('[daemon]\nhttp = ""\nidle_host = "1s"\n')
    with load(hosted):
        wait_until(lambda: _used_bytes(node, "disk") >= hosted.nbytes)
    wait_until(lambda: not node.images())
    wait_until(lambda: [each["what"] for each in node.state()["decisions"]] == ["demote"])
    hosted.proxy.reset()
    with load(hosted):
        pass
    assert hosted.served_bytes() == 0  # it was on disk


def _used_bytes(node: Node, tier: str) -> int:
    return next(int(each["used_bytes"]) for each in node.state()["tiers"] if each["tier"] == tier)


def test_what_is_to_stay_is_not_demoted_before_its_time(start: Callable[..., Node], hosted: Hosted) -> None:
    node = start('[daemon]\nhttp = ""\nidle_host = "0.2s"\n')
    weightcache.warm(hosted.url, until_s=6.0, storage_options=hosted.options)
    wait_until(lambda: node.image(hosted.url).get("until_s"))
    until_s = node.image(hosted.url)["until_s"]
    wait_until(lambda: not node.images())
    assert node.state()["now_s"] >= until_s


# -- what a user sees


def test_models_lists_the_daemon_s(node: Node, hosted: Hosted) -> None:
    with load(hosted) as model:
        model.wait_stored(30)
        wait_until(lambda: {each.tier for each in weightcache.models()} == {"disk", "host"})
        assert [each.in_use for each in weightcache.models() if each.tier == "host"] == [True]


def test_the_state_tells_of_loads(node: Node, hosted: Hosted) -> None:
    with load(hosted):
        pass
    wait_until(lambda: len(node.state()["loads"]) == 2 and not node.state()["transfers"])
    state = node.state()
    assert {each["by"] for each in state["loads"]} == {"daemon", "client"}
    assert state["ledger"]["received_bytes"] >= hosted.nbytes


@pytest.mark.parametrize("arguments", [("status",), ("ps",), ("status", "--json"), ("ps", "--json")])
def test_commands_show_what_it_has(node: Node, hosted: Hosted, arguments: tuple[str, ...]) -> None:
    with load(hosted):
        ran = _run(*arguments)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert hosted.url in ran.stdout


def test_the_command_warms(node: Node, hosted: Hosted) -> None:
    options = [word for key, value in hosted.options.items() for word in ("--storage-option", f"{key}={value}")]
    ran = _run("warm", hosted.url, "--until", "10m", *options)
    assert ran.returncode == 0, ran.stderr
    wait_until(lambda: node.image(hosted.url).get("until_s"))


@pytest.mark.parametrize("arguments", [("status",), ("ps",), ("warm", "s3://bucket/model")])
def test_without_a_daemon_commands_say_how_to_start_one(arguments: tuple[str, ...]) -> None:
    ran = _run(*arguments)
    assert ran.returncode == errors.DaemonError.exit_code
    assert "start it with weightcache daemon" in ran.stderr


def test_a_load_says_nothing_where_there_is_no_daemon(hosted: Hosted) -> None:
    with load(hosted) as model:
        assert "daemon" not in model.report.choices


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "weightcache", *arguments], capture_output=True, text=True, timeout=120
    )


def test_its_log_is_objects_where_that_is_asked_for(start: Callable[..., Node], hosted: Hosted) -> None:
    node = start("", ("--log-format", "json"))
    weightcache.warm(hosted.url, storage_options=hosted.options)
    assert node.stop() == 0
    told = [json.loads(line) for line in node.log.read_text().splitlines()]
    assert all({"time", "level", "logger", "message"} <= each.keys() for each in told)
    [load] = [each["load"] for each in told if "load" in each]
    assert (load["uri"], load["why"], load["tier"]) == (hosted.url, "request", "host")
    assert load["bytes"]["origin"] >= sum(tensor.nbytes for tensor in hosted.tensors.values())


def test_why_it_does_not_start_is_an_object_too(node: Node) -> None:
    second = _run("daemon", "--log-format", "json")
    assert "another daemon" in json.loads(second.stderr)["message"]


# -- its life


def test_it_never_imports_torch(node: Node, hosted: Hosted) -> None:
    with load(hosted):
        pass
    assert "libtorch" not in Path(f"/proc/{node.process.pid}/maps").read_text()


def test_the_socket_is_its_users_alone(node: Node) -> None:
    assert stat.S_IMODE(node.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(node.socket.parent.stat().st_mode) == 0o700


def test_sigterm_ends_it_and_leaves_no_socket(node: Node, hosted: Hosted) -> None:
    with load(hosted) as model:
        assert node.stop() == 0
        assert not node.socket.exists()
        assert_same(model, hosted.tensors)


def test_one_daemon_serves_a_socket(node: Node) -> None:
    second = _run("daemon")
    assert second.returncode == errors.DaemonError.exit_code
    assert "another daemon" in second.stderr
    assert node.state()["is_ready"]


def test_a_killed_one_s_socket_is_taken_over_with_its_disk(start: Callable[..., Node], hosted: Hosted) -> None:
    node = start()
    weightcache.warm(hosted.url, storage_options=hosted.options)
    node.kill()
    assert node.socket.exists()
    hosted.proxy.reset()
    node.start()
    with load(hosted) as model:
        assert is_attached(model)
        assert_same(model, hosted.tensors)
    assert hosted.served_bytes() == 0


def test_sighup_takes_a_new_configuration_and_keeps_the_old_where_it_is_wrong(node: Node, hosted: Hosted) -> None:
    node.write("nonsense = 1\n")
    node.signal(signal.SIGHUP)
    wait_until(lambda: "not taken" in node.log.read_text())
    node.write(f'[[warm]]\nmodel = "{hosted.folder}"\ntier = "host"\n')
    node.signal(signal.SIGHUP)
    wait_until(lambda: str(hosted.folder) in node.images())
