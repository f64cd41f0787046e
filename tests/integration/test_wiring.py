"""How hosts are reached: proxies, addresses, certificates, redirects, a bandwidth that is kept, connections that are kept."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from children import wait_until
from forward_proxy import ForwardProxy
from hostile import ALWAYS, Answer, Fault, HostileServer, Peer, make_certificates, objects_of
from reference import assert_same, tensors_of

import weightcache
from weightcache.errors import (
    AccessDeniedError,
    ConfigError,
    DeadlineError,
    OriginError,
    OriginUnreachableError,
    WeightcacheError,
)
from weightcache.origins.pace import throttle
from weightcache.origins.plane import Wiring
from weightcache.origins.web import WebOrigin

MIB = 1 << 20
N_TENSORS = 4
SHAPES: models.Shapes = {f"layer.{number}.weight": ("F32", (256, 1024)) for number in range(N_TENSORS)}
SECRET = "hush-7f3a9c"
PROXY_PASSWORD = "p@ss:w/rd%+"
WEIGHTS = r"^GET \S+\.safetensors\S* "
WIRES = ("s3", "http", "tls-s3", "tls-http")
PLAIN_WIRES = ("s3", "http")
TLS_WIRES = ("tls-s3", "tls-http")

Options = dict[str, Any]
Certificates = tuple[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tensors of 1 MiB, each a chunk and a request."""
    folder = tmp_path_factory.mktemp("model")
    models.write_safetensors(folder / "model.safetensors", SHAPES)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, torch.Tensor]:
    return tensors_of(folder)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def servers(folder: Path, certificates: Certificates) -> Iterator[dict[str, HostileServer]]:
    """An honest server over TCP, and one over TLS."""
    objects = objects_of(folder, "bucket/model")
    with HostileServer(objects) as plain, HostileServer(objects, certificates[1]) as tls:
        yield {"s3": plain, "http": plain, "tls-s3": tls, "tls-http": tls}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTCACHE_RANGE_BYTES", "1MiB")
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("SSL_CERT_", "REQUESTS_CA_")):
            monkeypatch.delenv(name)


class Site:
    """A model at a server, over one wire."""

    def __init__(self, server: HostileServer, wire: str, ca: str) -> None:
        server.reset()
        self.server = server
        self.is_s3 = wire.endswith("s3")
        self.endpoint = server.endpoint
        self._verify = {"verify": ca} if wire.startswith("tls") else {}

    @property
    def url(self) -> str:
        return f"{'s3:/' if self.is_s3 else self.endpoint}/bucket/model"

    def options(self, **more: Any) -> Options:
        """Return storage options; `verify` and `proxies` are put where they belong."""
        given = self._verify | more
        if not self.is_s3:
            return given
        options: Options = {"key": "key", "secret": SECRET, "endpoint_url": self.endpoint}
        if "proxies" in given:
            options["config_kwargs"] = {"proxies": given.pop("proxies")}
        return options | {"client_kwargs": given}

    def load(self, **more: Any) -> dict[str, torch.Tensor]:
        """Load without the disk tier; return copies of the tensors."""
        options = self.options(**more)
        with weightcache.load_model(self.url, "cpu", storage_options=options, cache="none", timeout_s=30) as model:
            return {name: model[name].clone() for name in model}

    def fail(self, **more: Any) -> WeightcacheError:
        """Load; return the error that must come of it."""
        with pytest.raises(WeightcacheError) as caught:
            self.load(**more)
        return caught.value


@pytest.fixture
def site(servers: dict[str, HostileServer], certificates: Certificates) -> Callable[[str], Site]:
    return lambda wire: Site(servers[wire], wire, certificates[0])


def told(error: BaseException) -> str:
    """Return all that an error and its causes show."""
    shown, each = "", error
    while each is not None:
        shown += f"{each!r} {each} {vars(each)}\n"
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)  # type: ignore[assignment]
    return shown


def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Write the configuration file."""
    (tmp_path / "weightcache.toml").write_text(text)
    monkeypatch.setenv("WEIGHTCACHE_CONFIG", str(tmp_path / "weightcache.toml"))


# -- proxies


@pytest.fixture(params=["open", "login"])
def forward(request: pytest.FixtureRequest) -> Iterator[ForwardProxy]:
    with ForwardProxy("us er", PROXY_PASSWORD) if request.param == "login" else ForwardProxy() as proxy:
        yield proxy


def check_all_went_through(proxy: ForwardProxy, site: Site, wire: str) -> None:
    if wire.startswith("tls"):
        assert set(proxy.asked) == {f"CONNECT {site.server.address}"}
    else:
        assert len(proxy.asked) == len(site.server.requests)
        assert {each.partition("/bucket")[0] for each in proxy.asked} <= {
            f"{method} {site.endpoint}" for method in ("GET", "HEAD")
        }
    heads = site.server.heads
    assert not [head for head in heads if head.get("Proxy-Authorization")]


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("spell", [str.upper, str.lower], ids=["upper", "lower"])
def test_the_environment_names_the_proxy(
    site: Callable[[str], Site],
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, torch.Tensor],
    wire: str,
    spell: Callable[[str], str],
) -> None:
    here = site(wire)
    with ForwardProxy("us er", PROXY_PASSWORD) as proxy:
        monkeypatch.setenv(spell("https_proxy" if wire.startswith("tls") else "http_proxy"), proxy.url)
        assert_same(here.load(), expected)
        check_all_went_through(proxy, here, wire)


@pytest.mark.parametrize("wire", WIRES)
def test_storage_options_name_the_proxy(
    site: Callable[[str], Site],
    forward: ForwardProxy,
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, torch.Tensor],
    wire: str,
) -> None:
    here = site(wire)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # options come before the environment
    assert_same(here.load(proxies={"http": forward.url, "https": forward.url}), expected)
    check_all_went_through(forward, here, wire)


@pytest.mark.parametrize("wire", ["s3", "tls-http"])
@pytest.mark.parametrize("spell", [str.upper, str.lower], ids=["upper", "lower"])
@pytest.mark.parametrize("named", ["127.0.0.1", "*", "elsewhere.example, 127.0.0.1", "127.0.0.1:{port}"])
def test_hosts_in_no_proxy_are_reached_directly(
    site: Callable[[str], Site],
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, torch.Tensor],
    wire: str,
    spell: Callable[[str], str],
    named: str,
) -> None:
    here = site(wire)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(spell(name), "http://127.0.0.1:1")
    monkeypatch.setenv(spell("no_proxy"), named.format(port=here.server.port))
    assert_same(here.load(), expected)


@pytest.mark.parametrize("wire", PLAIN_WIRES)
def test_other_hosts_in_no_proxy_change_nothing(
    site: Callable[[str], Site], monkeypatch: pytest.MonkeyPatch, expected: dict[str, torch.Tensor], wire: str
) -> None:
    with ForwardProxy() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", "elsewhere.example,127.0.0.1:1,127.0.0.10")
        assert_same(site(wire).load(), expected)
        assert proxy.asked


@pytest.mark.parametrize("wire", WIRES)
def test_an_empty_choice_of_proxies_is_none(
    site: Callable[[str], Site], monkeypatch: pytest.MonkeyPatch, expected: dict[str, torch.Tensor], wire: str
) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert_same(site(wire).load(proxies={}), expected)


def test_a_proxy_may_be_named_without_a_scheme(
    site: Callable[[str], Site], monkeypatch: pytest.MonkeyPatch, expected: dict[str, torch.Tensor]
) -> None:
    with ForwardProxy("user", "word") as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removeprefix("http://"))
        assert_same(site("http").load(), expected)


@pytest.mark.parametrize("wire", WIRES)
def test_g27_a_proxy_that_wants_another_login_is_named_without_its_password(
    site: Callable[[str], Site], caplog: pytest.LogCaptureFixture, wire: str
) -> None:
    caplog.set_level("DEBUG", "weightcache")
    with ForwardProxy("user", "right") as proxy:
        wrong = f"http://user:{SECRET}@{proxy.address}"
        error = site(wire).fail(proxies={"http": wrong, "https": wrong})
        assert isinstance(error, AccessDeniedError)
        assert len(proxy.asked) == 1
        assert f"the proxy {proxy.address}" in str(error)
        assert "407" in str(error)
        assert SECRET not in told(error) + caplog.text
        [login] = proxy.logins
        assert login.removeprefix("Basic ") not in told(error) + caplog.text


@pytest.mark.parametrize("wire", WIRES)
def test_g27_a_proxy_that_refuses_is_named_without_its_password(
    site: Callable[[str], Site], caplog: pytest.LogCaptureFixture, wire: str
) -> None:
    caplog.set_level("DEBUG", "weightcache")
    with ForwardProxy("user", SECRET, refuses=502) as proxy:
        error = site(wire).fail(proxies={"http": proxy.url, "https": proxy.url})
        assert isinstance(error, OriginUnreachableError)
        assert len(proxy.asked) == 3
        assert f"the proxy {proxy.address}" in str(error)
        assert "502" in str(error)
        assert SECRET not in told(error) + caplog.text


@pytest.mark.parametrize("wire", WIRES)
def test_g27_a_proxy_that_is_not_there_is_named_without_its_password(
    site: Callable[[str], Site], caplog: pytest.LogCaptureFixture, wire: str
) -> None:
    caplog.set_level("DEBUG", "weightcache")
    with ForwardProxy() as proxy:
        address = proxy.address
    away = f"http://user:{SECRET}@{address}"
    error = site(wire).fail(proxies={"http": away, "https": away})
    assert isinstance(error, OriginUnreachableError)
    assert f"the proxy {address}" in str(error)
    assert SECRET not in told(error) + caplog.text


@pytest.mark.parametrize("wire", PLAIN_WIRES)
@pytest.mark.parametrize(
    "proxy",
    [
        f"https://user:{SECRET}@127.0.0.1:1",
        f"socks5://user:{SECRET}@127.0.0.1:1",
        f"http://user:{SECRET}/x@127.0.0.1:1",
        f"http://user:{SECRET}@127.0.0.1:port",
        f"http://user:{SECRET}@",
    ],
)
def test_g27_a_proxy_that_cannot_be_used_is_a_setting_that_cannot_be_used(
    site: Callable[[str], Site], wire: str, proxy: str
) -> None:
    error = site(wire).fail(proxies={"http": proxy})
    assert isinstance(error, ConfigError)
    assert "http" in str(error)
    assert SECRET not in told(error)


# -- addresses


@pytest.fixture
def six(folder: Path) -> Iterator[HostileServer]:
    try:
        server = HostileServer(objects_of(folder, "bucket/model"), host="::1")
    except OSError as exc:
        pytest.skip(f"this machine has no IPv6 loopback: {exc}")
    with server:
        yield server


@pytest.mark.parametrize("wire", PLAIN_WIRES)
def test_ipv6_addresses_are_reached(six: HostileServer, expected: dict[str, torch.Tensor], wire: str) -> None:
    here = Site(six, wire, "")
    assert here.endpoint == f"http://[::1]:{six.port}"
    assert_same(here.load(), expected)
    assert {head.get("Host") for head in six.heads} == {f"[::1]:{six.port}"}


def test_ipv6_addresses_are_reached_through_a_proxy(six: HostileServer, expected: dict[str, torch.Tensor]) -> None:
    with ForwardProxy() as proxy:
        assert_same(Site(six, "http", "").load(proxies={"http": proxy.url}), expected)
        assert proxy.asked


class Names:
    """Answers for `weights.test` with addresses of this machine; counts how often it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, addresses: Sequence[str]) -> None:
        self.addresses = list(addresses)
        self.n_asked = 0
        self._resolve = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._answer)

    def _answer(self, host: Any, port: Any, *arguments: Any, **kwargs: Any) -> Any:
        if host != "weights.test":
            return self._resolve(host, port, *arguments, **kwargs)
        self.n_asked += 1
        return [found for each in self.addresses for found in self._resolve(each, port, *arguments, **kwargs)]


DEAD = "127.0.0.2"  # the servers listen at 127.0.0.1 alone


def list_named(server: HostileServer, n_times: int = 1) -> list[list[str] | WeightcacheError]:
    """List the model by the name `weights.test`, on a loop that asks Python's own resolver."""

    async def run() -> list[list[str] | WeightcacheError]:
        got: list[list[str] | WeightcacheError] = []
        origin = WebOrigin(f"http://weights.test:{server.port}/bucket/model", {}, Wiring(5.0), throttle(0))
        try:
            for _ in range(n_times):
                try:
                    got.append([stat.path for stat in await origin.list()])
                except WeightcacheError as exc:
                    got.append(exc)
        finally:
            await origin.close()
        return got

    return asyncio.run(run())


@pytest.mark.parametrize("addresses", [[DEAD, "127.0.0.1"], [DEAD, DEAD, "127.0.0.1", DEAD], ["127.0.0.1", DEAD]])
def test_a_dead_address_of_a_name_is_passed_over(
    site: Callable[[str], Site], monkeypatch: pytest.MonkeyPatch, addresses: list[str]
) -> None:
    names = Names(monkeypatch, addresses)
    assert list_named(site("http").server, 3) == [["model.safetensors"]] * 3
    assert names.n_asked == 1


def test_a_name_whose_addresses_are_all_dead_is_looked_up_again(
    site: Callable[[str], Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = site("http").server
    names = Names(monkeypatch, [DEAD])
    [error] = list_named(server)
    assert isinstance(error, OriginError)
    assert f"weights.test:{server.port}" in str(error)
    looked_up = names._answer

    def move(*arguments: Any, **kwargs: Any) -> Any:
        found = looked_up(*arguments, **kwargs)
        names.addresses = ["127.0.0.1"]
        return found

    monkeypatch.setattr(socket, "getaddrinfo", move)
    failed, listed = list_named(server, 2)
    assert isinstance(failed, OriginError)
    assert listed == ["model.safetensors"]


# -- redirects


def send_to(location: str) -> Fault:
    """Redirect to a location; `{path}` stands for the path asked for."""

    async def fault(answer: Answer, peer: Peer) -> None:
        assert peer.exchange is not None
        answer.head.start = "HTTP/1.1 307 Temporary Redirect"
        for name in ("Content-Range", "ETag"):
            answer.head.remove(name)
        answer.head.set("Location", location.replace("{path}", peer.exchange.path))
        answer.replace_body(b"")
        await peer.answer(answer)

    return fault


def with_headers(site: Site) -> Options:
    headers = {"Authorization": f"Bearer {SECRET}", "X-Token": SECRET, "Cookie": f"session={SECRET}"}
    return {} if site.is_s3 else {"headers": headers}


@pytest.mark.parametrize("wire", PLAIN_WIRES)
@pytest.mark.parametrize("spelt", ["localhost", "LocalHost", "localhost:{port}"])
def test_g28_a_redirect_to_a_configured_host_is_followed_without_credentials(
    site: Callable[[str], Site],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, torch.Tensor],
    wire: str,
    spelt: str,
) -> None:
    here = site(wire)
    with HostileServer(objects_of(folder, "bucket/model")) as other:
        configure(tmp_path, monkeypatch, f'redirect_hosts = ["{spelt.format(port=other.port)}"]')
        here.server.script(WEIGHTS, send_to(f"http://localhost:{other.port}/bucket/model/model.safetensors"), ALWAYS)
        assert_same(here.load(**with_headers(here)), expected)
        assert len(other.heads) >= N_TENSORS
        assert {head.get("Host") for head in other.heads} == {f"localhost:{other.port}"}
        for head in other.heads:
            assert (head.get("Range") or "").startswith("bytes=")
            assert head.get("If-Match")
            assert [name for name in ("Authorization", "X-Token", "Cookie") if head.get(name)] == []
            assert SECRET not in head.encode().decode("latin-1")


@pytest.mark.parametrize("wire", PLAIN_WIRES)
def test_g28_a_redirect_to_a_host_that_is_not_configured_is_not_followed(
    site: Callable[[str], Site], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wire: str
) -> None:
    here = site(wire)
    with HostileServer(objects_of(folder, "bucket/model")) as other:
        configure(tmp_path, monkeypatch, 'redirect_hosts = ["elsewhere.example", "localhost:1"]')
        here.server.script(WEIGHTS, send_to(f"http://localhost:{other.port}{{path}}"), ALWAYS)
        error = here.fail(**with_headers(here))
        assert isinstance(error, OriginError)
        assert "redirect_hosts" in str(error)
        assert SECRET not in told(error)
        assert other.heads == []


def test_g28_a_redirect_back_does_not_bring_credentials_back(
    site: Callable[[str], Site],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, torch.Tensor],
) -> None:
    here = site("http")
    here.server.objects["back/model.safetensors"] = here.server.objects["bucket/model/model.safetensors"]
    with HostileServer(objects_of(folder, "bucket/model")) as other:
        configure(tmp_path, monkeypatch, 'redirect_hosts = ["localhost"]')
        here.server.script(r"^GET /bucket" + WEIGHTS[5:], send_to(f"http://localhost:{other.port}{{path}}"), ALWAYS)
        other.script(WEIGHTS, send_to(f"{here.endpoint}/back/model.safetensors"), ALWAYS)
        assert_same(here.load(**with_headers(here)), expected)
    back = [head for head in here.server.heads if "/back/" in head.start]
    assert back
    assert all(SECRET not in head.encode().decode() for head in back)
    del here.server.objects["back/model.safetensors"]


@pytest.mark.parametrize(
    "location", ["/moved/model.safetensors", "../../moved/model.safetensors", "{endpoint}/moved/a b/größe"]
)
def test_a_redirect_within_the_host_keeps_the_headers(
    site: Callable[[str], Site], expected: dict[str, torch.Tensor], location: str
) -> None:
    here = site("http")
    content = here.server.objects["bucket/model/model.safetensors"]
    moved = {"moved/model.safetensors": content, "moved/a b/größe": content}
    here.server.objects |= moved
    spelt = location.format(endpoint=here.endpoint).encode().decode("latin-1")  # UTF-8, as servers send it
    here.server.script(r"^GET /bucket" + WEIGHTS[5:], send_to(spelt), ALWAYS)
    assert_same(here.load(**with_headers(here)), expected)
    got = [head for head in here.server.heads if "/moved/" in head.start]
    assert len(got) >= N_TENSORS
    assert all(head.get("Authorization") == f"Bearer {SECRET}" and head.get("X-Token") == SECRET for head in got)
    for name in moved:
        del here.server.objects[name]


@pytest.mark.parametrize("wire", PLAIN_WIRES)
@pytest.mark.parametrize(
    "location", ["http://[::1", "http://127.0.0.1:x/", "ftp://127.0.0.1/", "file:///etc/passwd", "//:80/"]
)
def test_g28_a_redirect_to_what_is_no_url_is_an_error_of_the_origin(
    site: Callable[[str], Site], wire: str, location: str
) -> None:
    here = site(wire)
    here.server.script(WEIGHTS, send_to(location), ALWAYS)
    error = here.fail()
    assert type(error) is OriginError
    assert "redirects to" in str(error)


def test_g28_tls_is_not_left(site: Callable[[str], Site], servers: dict[str, HostileServer]) -> None:
    here = site("tls-http")
    here.server.script(WEIGHTS, send_to(f"{servers['http'].endpoint}{{path}}"), ALWAYS)
    servers["http"].reset()
    error = here.fail(**with_headers(here))
    assert "without TLS" in str(error)
    assert servers["http"].heads == []


# -- headers of one's own


def test_headers_of_ones_own_come_in_place_of_ours(site: Callable[[str], Site]) -> None:
    here = site("http")
    here.load(headers={"user-agent": "mine/1", "X-Empty": ""})
    for head in here.server.heads:
        assert [value for name, value in head.headers if name.lower() == "user-agent"] == ["mine/1"]
        assert head.get("X-Empty") == ""


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {SECRET}\n"},
        {"Authorization": f"Bearer {SECRET}\r\nX-More: 1"},
        {"Authorization": f" {SECRET}"},
        {"Authorization": f"{SECRET}ß"},
        {"Range": "bytes=0-1"},
        {"host": "elsewhere.example"},
        {"X Y": "1"},
        {"": "1"},
    ],
    ids=repr,
)
def test_g27_a_header_that_cannot_be_sent_is_refused_and_not_repeated(
    site: Callable[[str], Site], headers: dict[str, str]
) -> None:
    here = site("http")
    error = here.fail(headers=headers)
    assert isinstance(error, ConfigError)
    assert SECRET not in told(error)
    assert here.server.heads == []


# -- certificates


@pytest.mark.parametrize("wire", TLS_WIRES)
@pytest.mark.parametrize("form", [str, Path], ids=["str", "Path"])
def test_verify_may_be_a_file(
    site: Callable[[str], Site],
    certificates: Certificates,
    expected: dict[str, torch.Tensor],
    wire: str,
    form: Callable[[str], object],
) -> None:
    assert_same(site(wire).load(verify=form(certificates[0])), expected)


@pytest.mark.parametrize("wire", TLS_WIRES)
def test_verify_may_be_a_folder(
    site: Callable[[str], Site],
    certificates: Certificates,
    expected: dict[str, torch.Tensor],
    tmp_path: Path,
    wire: str,
) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl command, which gives a certificate's file in such a folder its name")
    command = [openssl, "x509", "-hash", "-noout", "-in", certificates[0]]
    name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / "trusted").mkdir()
    shutil.copy(certificates[0], tmp_path / "trusted" / f"{name}.0")
    assert_same(site(wire).load(verify=str(tmp_path / "trusted")), expected)


@pytest.mark.parametrize("wire", TLS_WIRES)
@pytest.mark.parametrize("shown", ["unknown-ca", "wrong-name"])
def test_verify_may_be_false(
    site: Callable[[str], Site], expected: dict[str, torch.Tensor], wire: str, shown: str
) -> None:
    here = site(wire)
    here.server.show(shown)
    assert_same(here.load(verify=False), expected)


@pytest.mark.parametrize("wire", TLS_WIRES)
def test_verify_true_trusts_what_the_system_trusts(
    site: Callable[[str], Site], certificates: Certificates, expected: dict[str, torch.Tensor], wire: str
) -> None:
    error = site(wire).fail(verify=True)
    assert "not trusted" in str(error)
    assert "verify" in str(error)


@pytest.mark.parametrize("wire", TLS_WIRES)
@pytest.mark.parametrize("content", [None, "not PEM"], ids=["missing", "broken"])
def test_certificates_that_cannot_be_read_are_a_setting_that_cannot_be_used(
    site: Callable[[str], Site], tmp_path: Path, wire: str, content: str | None
) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    error = site(wire).fail(verify=str(path))
    assert isinstance(error, ConfigError)
    assert str(path) in str(error)


@pytest.mark.parametrize("by", ["environment", "file"])
def test_s3_trusts_the_ca_bundle_of_aws(
    site: Callable[[str], Site],
    certificates: Certificates,
    expected: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    by: str,
) -> None:
    if by == "environment":
        monkeypatch.setenv("AWS_CA_BUNDLE", certificates[0])
    else:
        (tmp_path / "config").write_text(f"[default]\nca_bundle = {certificates[0]}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert_same(site("tls-s3").load(verify=None), expected)


# -- bandwidth


@pytest.mark.parametrize("wire", WIRES)
def test_the_bandwidth_set_is_not_exceeded(
    site: Callable[[str], Site],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, torch.Tensor],
    wire: str,
) -> None:
    here = site(wire)
    configure(tmp_path, monkeypatch, f"max_bytes_per_s = {N_TENSORS * MIB}")
    monkeypatch.setenv("WEIGHTCACHE_CONNECTIONS", "1")
    began = time.monotonic()
    loaded = here.load()
    # What comes last is not waited for: at most one range, counted as it came.
    assert time.monotonic() - began > (N_TENSORS - 1) / N_TENSORS
    assert_same(loaded, expected)


@pytest.mark.parametrize("wire", PLAIN_WIRES)
def test_a_connection_that_rests_for_the_bandwidth_has_not_stalled(
    site: Callable[[str], Site],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, torch.Tensor],
    wire: str,
) -> None:
    here = site(wire)
    configure(tmp_path, monkeypatch, f"max_bytes_per_s = {2 * MIB}")
    monkeypatch.setenv("WEIGHTCACHE_REQUEST_TIMEOUT_S", "0.3")
    options = here.options()
    with weightcache.load_model(here.url, "cpu", storage_options=options, cache="none", timeout_s=30) as model:
        assert_same(model, expected)
        assert model.report.n_retries == 0


# -- connections


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("n_connections", [1, 3])
def test_connections_are_used_again_and_closed_at_the_end(
    site: Callable[[str], Site],
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, torch.Tensor],
    wire: str,
    n_connections: int,
) -> None:
    monkeypatch.setenv("WEIGHTCACHE_CONNECTIONS", str(n_connections))
    here = site(wire)
    wait_until(lambda: here.server.n_open == 0)
    before = here.server.n_accepted
    assert_same(here.load(), expected)
    assert len(here.server.heads) > n_connections
    assert here.server.n_accepted - before <= n_connections
    wait_until(lambda: here.server.n_open == 0)


@pytest.mark.parametrize("wire", WIRES)
def test_a_failed_load_closes_its_connections(site: Callable[[str], Site], wire: str) -> None:
    here = site(wire)

    async def silent(answer: Answer, peer: Peer) -> None:
        await peer.wait_gone()

    here.server.script(WEIGHTS, silent, ALWAYS)
    with pytest.raises(WeightcacheError):
        weightcache.load_model(here.url, "cpu", storage_options=here.options(), cache="none", timeout_s=0.5)
    wait_until(lambda: here.server.n_open == 0)


@pytest.mark.parametrize("wire", WIRES)
def test_a_load_that_ends_while_its_connections_rest_closes_them(
    site: Callable[[str], Site], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wire: str
) -> None:
    here = site(wire)
    configure(tmp_path, monkeypatch, f"max_bytes_per_s = {MIB // 16}")
    with pytest.raises(DeadlineError):
        weightcache.load_model(here.url, "cpu", storage_options=here.options(), cache="none", timeout_s=0.5)
    wait_until(lambda: here.server.n_open == 0)
