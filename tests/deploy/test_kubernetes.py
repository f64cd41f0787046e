"""The Kubernetes manifests: that they build and fit the API's schemas, that names, ports and mounts agree, that the
configuration is read, and that a client shares nothing with the daemon but the folder of its socket.
"""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from weightcache.config import read_bytes, read_configuration

ROOT = Path(__file__).parents[2] / "deploy"
KUBERNETES = ROOT / "kubernetes"
BASE = KUBERNETES / "base"
OVERLAYS = sorted((KUBERNETES / "overlays").iterdir())
EXAMPLES = sorted((KUBERNETES / "examples").glob("*.yaml"))
CONFIGURATIONS = [ROOT / "weightcache.toml", *sorted(KUBERNETES.rglob("*.toml"))]
VERSIONS = ("1.30", "1.37")  # of Kubernetes: one that nodes still run, and today's
DAEMON_USER = 10001
SPARE_NBYTES = 2 << 30  # of the daemon itself, and of loads under way

Object = dict[str, Any]


@cache
def build(folder: Path) -> tuple[Object, ...]:
    """Return the objects of a kustomization, as they would be applied."""
    program = shutil.which("kustomize") or shutil.which("kubectl")
    if program is None:
        pytest.skip("there is neither kustomize nor kubectl here to build the manifests")
    command = [program, "build" if program.endswith("kustomize") else "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return tuple(yaml.safe_load_all(done.stdout))


def only(objects: tuple[Object, ...], kind: str) -> Object:
    (found,) = [each for each in objects if each["kind"] == kind]
    return found


@pytest.fixture(params=[BASE, *OVERLAYS], ids=lambda folder: folder.name)
def objects(request: pytest.FixtureRequest) -> tuple[Object, ...]:
    return build(request.param)


@pytest.fixture
def daemon_set(objects: tuple[Object, ...]) -> Object:
    return only(objects, "DaemonSet")


@pytest.fixture
def pod(daemon_set: Object) -> Object:
    spec: Object = daemon_set["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def container(pod: Object) -> Object:
    (found,) = pod["containers"]
    return dict(found)


@pytest.fixture
def configuration(objects: tuple[Object, ...]) -> Object:
    (text,) = only(objects, "ConfigMap")["data"].values()
    return tomllib.loads(text)


def containers_of(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", []), *pod["containers"]]


# -- the API


def everything() -> Iterator[Object]:
    for folder in (BASE, *OVERLAYS):
        yield from build(folder)
    for path in EXAMPLES:
        yield from yaml.safe_load_all(path.read_text())


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_fit_the_schemas_of_the_api(version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed").validate
    for each in everything():
        validate(each, version, strict=True)


def test_validator_fires_on_a_misspelled_field() -> None:
    library = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    (example,) = yaml.safe_load_all(EXAMPLES[0].read_text())
    example["spec"]["containers"][0]["volumemounts"] = []
    with pytest.raises(library.ValidationError, match="volumemounts"):
        library.validate(example, VERSIONS[0], strict=True)


def test_names_that_stand_elsewhere_are_those_of_objects(objects: tuple[Object, ...], pod: Object) -> None:
    assert pod["serviceAccountName"] == only(objects, "ServiceAccount")["metadata"]["name"]
    (configured,) = [each["configMap"]["name"] for each in pod["volumes"] if "configMap" in each]
    assert configured == only(objects, "ConfigMap")["metadata"]["name"]
    namespace = only(objects, "Namespace")["metadata"]["name"]
    assert {each["metadata"]["namespace"] for each in objects if each["kind"] != "Namespace"} == {namespace}


def test_selectors_find_the_daemon(objects: tuple[Object, ...], daemon_set: Object) -> None:
    labels = daemon_set["spec"]["template"]["metadata"]["labels"].items()
    monitor = yaml.safe_load((KUBERNETES / "components" / "podmonitor" / "podmonitor.yaml").read_text())
    for selector in (
        daemon_set["spec"]["selector"]["matchLabels"],
        only(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        monitor["spec"]["selector"]["matchLabels"],
    ):
        assert selector and selector.items() <= labels


def test_pod_monitor_joins_as_a_component(tmp_path: Path) -> None:
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    overlay = tmp_path / "kubernetes" / "overlays" / "mine"
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text("resources: [../../base]\ncomponents: [../../components/podmonitor]\n")
    built = build(overlay)
    assert only(built, "PodMonitor")["metadata"]["namespace"] == only(built, "DaemonSet")["metadata"]["namespace"]


# -- ports and probes


def test_port_is_one_everywhere(objects: tuple[Object, ...], daemon_set: Object, container: Object) -> None:
    (port,) = container["ports"]
    (told,) = [only(objects, "ConfigMap")["data"][name] for name in only(objects, "ConfigMap")["data"]]
    served = urlsplit("//" + tomllib.loads(told)["daemon"]["http"])
    assert served.port == port["containerPort"]
    assert served.hostname == "0.0.0.0"  # probes do not come from the pod's loopback
    annotations = daemon_set["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port["containerPort"])
    monitor = yaml.safe_load((KUBERNETES / "components" / "podmonitor" / "podmonitor.yaml").read_text())
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (rule,) = only(objects, "NetworkPolicy")["spec"]["ingress"]
    assert endpoint["port"] == rule["ports"][0]["port"] == port["name"]
    assert endpoint["path"] == annotations["prometheus.io/path"] == "/metrics"


def test_daemon_that_hangs_is_killed_and_one_that_is_busy_is_not_ready(container: Object) -> None:
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/healthz",
        "liveness": "/healthz",
        "readiness": "/readyz",
    }
    assert {probe["port"] for probe in probes.values()} == {container["ports"][0]["name"]}


def test_only_prometheus_may_ask(objects: tuple[Object, ...]) -> None:
    policy = only(objects, "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    ((source,),) = [rule["from"] for rule in policy["ingress"]]
    assert source["namespaceSelector"]["matchLabels"]


# -- folders


def test_every_mount_is_a_volume_and_every_volume_is_mounted(pod: Object) -> None:
    mounted = {mount["name"] for each in containers_of(pod) for mount in each["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_configured_places_are_mounted(container: Object, configuration: Object) -> None:
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert mounts[str(Path(environment["WEIGHTCACHE_CONFIG"]).parent)]["readOnly"]
    assert environment["WEIGHTCACHE_DIR"] in mounts
    assert str(Path(configuration["socket"]).parent) in mounts


def test_configuration_lies_in_the_file_that_is_named(objects: tuple[Object, ...], container: Object) -> None:
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert list(only(objects, "ConfigMap")["data"]) == [Path(environment["WEIGHTCACHE_CONFIG"]).name]


def test_folders_of_the_node_are_handed_to_the_daemon_s_user_alone(pod: Object) -> None:
    (init,) = pod["initContainers"]
    of_the_node = {volume["name"] for volume in pod["volumes"] if "hostPath" in volume}
    folders = {mount["mountPath"] for mount in init["volumeMounts"]}
    assert of_the_node == {mount["name"] for mount in init["volumeMounts"]} == {"cache", "socket"}
    user = str(pod["securityContext"]["runAsUser"])
    command = ["install", "-d", "-m", "0700", "-o", user, "-g", str(pod["securityContext"]["runAsGroup"])]
    assert init["command"][: len(command)] == command and set(init["command"][len(command) :]) == folders


def test_image_s_user_is_the_pod_s(pod: Object) -> None:
    assert pod["securityContext"]["runAsUser"] == DAEMON_USER
    assert f"USER {DAEMON_USER}:{DAEMON_USER}\n" in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_client_shares_the_socket_s_folder_and_nothing_else(path: Path) -> None:
    client = yaml.safe_load(path.read_text())["spec"]
    daemon = only(build(BASE), "DaemonSet")["spec"]["template"]["spec"]
    (shared,) = [volume["hostPath"]["path"] for volume in daemon["volumes"] if volume["name"] == "socket"]
    assert [volume.get("hostPath", {}).get("path") for volume in client["volumes"]] == [shared]
    ((mount,),) = [each["volumeMounts"] for each in client["containers"]]
    assert mount["readOnly"] and mount["mountPath"] == shared
    assert client["securityContext"]["runAsUser"] == daemon["securityContext"]["runAsUser"]
    environment = {each["name"]: each["value"] for each in client["containers"][0]["env"]}
    assert environment["WEIGHTCACHE_SOCKET"] == tomllib.loads((BASE / "weightcache.toml").read_text())["socket"]
    assert not any(client.get(name) for name in ("hostIPC", "hostPID", "hostNetwork"))


# -- rights and resources


def test_nothing_runs_with_more_rights_than_it_needs(pod: Object) -> None:
    init, daemon = containers_of(pod)
    for each in (init, daemon):
        rights = each["securityContext"]
        assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
        assert rights["capabilities"]["drop"] == ["ALL"] and not rights.get("privileged")
    assert init["securityContext"]["capabilities"]["add"] == ["CHOWN", "FOWNER"]
    assert "add" not in daemon["securityContext"]["capabilities"]
    assert pod["securityContext"]["runAsNonRoot"] and "runAsUser" not in daemon["securityContext"]
    assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    assert pod["automountServiceAccountToken"] is False
    assert not any(pod.get(name) for name in ("hostIPC", "hostPID", "hostNetwork"))


def test_images_fit_the_memory_that_is_asked_for(container: Object, configuration: Object) -> None:
    """A cgroup kills instead of refusing: what may lie in memory must be less than its limit."""
    asked, limits = container["resources"]["requests"], container["resources"]["limits"]
    budget = read_bytes(configuration["host_budget_bytes"])
    reserved = read_bytes(limits.get("hugepages-2Mi", "0"))
    assert read_bytes(limits["memory"]) >= SPARE_NBYTES + (0 if reserved else budget)
    assert not reserved or reserved >= budget
    assert {name: asked[name] for name in limits} == limits  # what is not asked for is not there when it is needed
    assert read_bytes(configuration["daemon"].get("ready_bytes", 0)) <= budget


def test_daemon_goes_to_nodes_with_gpus_and_takes_none() -> None:
    for overlay in OVERLAYS:
        pod = only(build(overlay), "DaemonSet")["spec"]["template"]["spec"]
        assert pod["nodeSelector"] == {"kubernetes.io/os": "linux", "nvidia.com/gpu.present": "true"}
        assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        assert not any("gpu" in name for each in containers_of(pod) for name in each["resources"]["limits"])


# -- the configuration


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: str(path.relative_to(ROOT)))
def test_configuration_is_understood(path: Path) -> None:
    read_configuration({}, path)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: str(path.relative_to(ROOT)))
def test_suggestion_in_a_comment_is_understood_too(path: Path, tmp_path: Path) -> None:
    lines = path.read_text().splitlines()
    suggested = [line.removeprefix("# ") if "=" in line or line.startswith("# [") else line for line in lines]
    (tmp_path / "weightcache.toml").write_text("\n".join(suggested))
    read_configuration({}, tmp_path / "weightcache.toml")
