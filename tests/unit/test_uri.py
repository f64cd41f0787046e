"""Names of models: what is understood, what is refused, and that no refusal repeats a secret."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import examples

from weightcache.errors import UnsafeFormatError, UriError, WeightcacheError
from weightcache.uri import Name, parse_uri

SCHEMES = ("s3", "gs", "hf", "http", "https", "memory", "abfs")
STORES = ("prod", "staging")
DIGEST = "blake3:" + "0123456789abcdef" * 4

folders = st.lists(st.text("ab.-_", min_size=1, max_size=4).filter(lambda part: part != "."), max_size=3)
words = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}(\.[A-Za-z0-9_-]{1,5})?", fullmatch=True).filter(
    lambda word: not word.endswith((".pt", ".bin", ".pth", ".pkl", ".ckpt"))
)
revisions = words | st.from_regex(r"blake3:[0-9a-f]{64}", fullmatch=True)


def parse(uri: str) -> Name:
    return parse_uri(uri, SCHEMES, "/models-here", STORES)


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("/models/llama", Name("file", "/models/llama")),
        ("models/llama", Name("file", "/models-here/models/llama")),
        ("./llama/", Name("file", "/models-here/llama")),
        ("//models//.//llama", Name("file", "/models/llama")),
        ("/", Name("file", "/")),
        ("file:///models/llama", Name("file", "/models/llama")),
        ("/a b/ü", Name("file", "/a b/ü")),
        ("/models/llama@v1/", Name("file", "/models/llama@v1")),
        ("/models/llama@v1/.", Name("file", "/models/llama@v1")),
        ("/llama@v1/adapter", Name("file", "/llama@v1/adapter")),
        ("/models/model.safetensors", Name("file", "/models", "model.safetensors")),
        ("model.safetensors", Name("file", "/models-here", "model.safetensors")),
        ("/model.safetensors", Name("file", "/", "model.safetensors")),
        ("s3://bucket/llama", Name("s3", "s3://bucket/llama")),
        ("s3://bucket/llama///", Name("s3", "s3://bucket/llama")),
        ("s3://bucket", Name("s3", "s3://bucket")),
        ("S3://bucket/Llama", Name("s3", "s3://bucket/Llama")),
        ("s3://bucket/llama@v1/", Name("s3", "s3://bucket/llama@v1")),
        ("s3://bucket/llama@v1//", Name("s3", "s3://bucket/llama@v1")),
        ("s3://bucket/llama:v1", Name("s3", "s3://bucket/llama:v1")),
        ("s3://bucket/m@v1/model.safetensors", Name("s3", "s3://bucket/m@v1", "model.safetensors")),
        ("s3://bucket/m/model@v1.safetensors", Name("s3", "s3://bucket/m", "model@v1.safetensors")),
        ("s3://bucket/m/model.safetensors", Name("s3", "s3://bucket/m", "model.safetensors")),
        ("s3://bucket/model.safetensors", Name("s3", "s3://bucket", "model.safetensors")),
        ("hf://org/name@main", Name("hf", "hf://org/name@main")),
        ("http://127.0.0.1:8000/m", Name("http", "http://127.0.0.1:8000/m")),
        ("http://[::1]:8000/m", Name("http", "http://[::1]:8000/m")),
        ("gs://bucket/what?", Name("gs", "gs://bucket/what?")),
    ],
)
def test_name_is_understood(uri: str, name: Name) -> None:
    assert parse(uri) == name


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("s3://bucket/registry/llama-3-8b@v3", Name("s3", "s3://bucket/registry", None, "llama-3-8b", "v3")),
        (f"s3://bucket/registry/llama@{DIGEST}", Name("s3", "s3://bucket/registry", None, "llama", DIGEST)),
        ("s3://bucket/llama@v1", Name("s3", "s3://bucket", None, "llama", "v1")),
        ("S3://bucket/Llama@V1", Name("s3", "s3://bucket", None, "Llama", "V1")),
        ("http://127.0.0.1:8000/r/m@v1", Name("http", "http://127.0.0.1:8000/r", None, "m", "v1")),
        ("http://[::1]:8000/m@v1", Name("http", "http://[::1]:8000", None, "m", "v1")),
        ("abfs://c@host.example/r/m@v1", Name("abfs", "abfs://c@host.example/r", None, "m", "v1")),
        ("memory://r/m@v1", Name("memory", "memory://r", None, "m", "v1")),
        ("/models/llama@v1", Name("file", "/models", None, "llama", "v1")),
        ("/llama@v1", Name("file", "/", None, "llama", "v1")),
        ("llama@v1", Name("file", "/models-here", None, "llama", "v1")),
        ("file:///models/llama@v1", Name("file", "/models", None, "llama", "v1")),
        ("/m@x/llama@v1", Name("file", "/m@x", None, "llama", "v1")),
        ("wc://prod/llama-3-8b@v3", Name("wc", "wc://prod", None, "llama-3-8b", "v3")),
        ("wc://prod/llama-3-8b", Name("wc", "wc://prod", None, "llama-3-8b", "latest")),
        (f"wc://staging/m@{DIGEST}", Name("wc", "wc://staging", None, "m", DIGEST)),
        ("WC://prod/m", Name("wc", "wc://prod", None, "m", "latest")),
        ("wc://prod", Name("wc", "wc://prod")),
        ("wc://prod/", Name("wc", "wc://prod")),
    ],
)
def test_model_in_a_registry_is_understood(uri: str, name: Name) -> None:
    assert parse(uri) == name


@pytest.mark.parametrize(
    "path",
    [
        "llama@",
        "@v1",
        "llama@v1@v2",
        "llama@v 1",
        ".llama@v1",
        "llama@.v1",
        "llama@-v1",
        "lla..ma@v1",
        "llama@v1..2",
        "llama:8b@v1",
        "llämä@v1",
        "llama@" + "v" * 129,
        "l" * 129 + "@v1",
        "llama@blake3:00",
        f"llama@{DIGEST.upper()}",
        f"llama@{DIGEST}0",
        "llama@sha256:" + "0" * 64,
    ],
)
def test_model_or_revision_with_a_name_that_cannot_be_one_is_refused(path: str) -> None:
    for prefix, hint in (("s3://bucket/r/", "write a slash behind it"), ("/r/", "write a slash"), ("wc://prod/", "")):
        with pytest.raises(UriError, match=f"not a model in a registry: .*expected MODEL@TAG.*{hint}") as caught:
            parse(prefix + path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/", "llama/", "a/b", "a/b@v1", "llama@v1/", "..", "m?x=1", "m#x"])
def test_logical_name_of_anything_but_a_model_is_refused(path: str) -> None:
    with pytest.raises(UriError, match="not a model in a registry: 'wc://prod/"):
        parse(f"wc://prod/{path}")


def test_longest_names_are_understood() -> None:
    assert parse(f"wc://prod/{'l' * 128}@{'v' * 128}").revision == "v" * 128


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/m",
        "s3://bucket/m/model.safetensors",
        "s3://bucket/registry/m@v1",
        "s3://bucket/m@v1/",
        "/m",
        "/a.safetensors",
        "/m/a.safetensors",
        "/m@v1",
        "/m@v1/",
        "hf://org/name@main",
        "abfs://c@host.example",
        "wc://prod/m@latest",
        "wc://prod",
    ],
)
def test_name_is_written_as_it_was_read(uri: str) -> None:
    assert str(parse(uri)) == uri


def test_logical_name_says_its_store() -> None:
    names = ("wc://prod/m@v1", "wc://prod", "s3://prod/m@v1", "/prod/m")
    assert [parse(uri).store for uri in names] == ["prod", "prod", "", ""]


def test_equal_models_have_equal_names() -> None:
    assert str(parse("wc://prod/m")) == str(parse("wc://prod/m@latest"))
    assert str(parse("./m@v1")) == str(parse("/models-here//m@v1"))
    assert str(parse("/m@v1/")) != str(parse("/m@v1"))


@examples
@given(st.sampled_from(["s3://bucket", "https://host:8000", "memory://r", ""]), folders, words, revisions)
def test_every_model_in_a_registry_is_found_again(origin: str, parts: list[str], model: str, revision: str) -> None:
    root = "/".join([origin, *parts])
    name = parse(f"{root}/{model}@{revision}")
    assert (name.root, name.model, name.revision, name.file) == (root or "/", model, revision, None)
    assert parse(str(name)) == name
    assert parse(f"wc://prod/{model}@{revision}") == Name("wc", "wc://prod", None, model, revision)


@examples
@given(
    st.sampled_from(["s3://", "gs://b/", "hf://", "wc://prod/", "memory://", "/", ""]),
    st.text("aZ0@/.:-_#?[]", max_size=12),
)
@example("s3://", "b/a@0/")
@example("/", "a@0/./")
@example("s3://", "b//.safetensors")
def test_whatever_is_understood_is_written_so_that_it_is_found_again(origin: str, rest: str) -> None:
    try:
        name = parse(origin + rest)
    except WeightcacheError:
        return
    assert parse(str(name)) == name


@pytest.mark.parametrize("uri", ["", " ", " s3://bucket/m", "/models/llama\n", "a\0b", "s3://a\0b"])
def test_name_that_is_empty_or_padded_is_refused(uri: str) -> None:
    with pytest.raises(UriError, match="not a model's name"):
        parse(uri)


@pytest.mark.parametrize("uri", ["s3://", "s3:///", "hf://", "s3://bucket/m?versionId=3", "s3://bucket/m#x"])
def test_url_that_names_no_folder_is_refused(uri: str) -> None:
    with pytest.raises(UriError, match="names no folder"):
        parse(uri)


def test_unknown_scheme_is_refused_with_the_nearest() -> None:
    with pytest.raises(UriError, match=r"unknown scheme in 's4://bucket/m' \(did you mean 's3'\?\)"):
        parse("s4://bucket/m")


def test_unknown_logical_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UriError, match=r"unknown logical name 'wc://prd/llama@tag'.*\(did you mean 'prod'\?\)"):
        parse("wc://prd/llama@tag")


@pytest.mark.parametrize("uri", ["wc://", "wc:///", "wc:///llama", "wc://PROD/llama", "wc://prod?x/llama"])
def test_logical_name_without_a_known_store_is_refused(uri: str) -> None:
    with pytest.raises(UriError, match=r"unknown logical name 'wc://.*; configured are prod, staging"):
        parse(uri)


def test_logical_name_where_no_stores_are_configured_says_how() -> None:
    with pytest.raises(UriError, match=r"unknown logical name 'wc://prod/m': no stores .*\[\[stores.NAME.replicas\]\]"):
        parse_uri("wc://prod/m", SCHEMES, "/")


def test_broken_url_is_refused() -> None:
    with pytest.raises(UriError, match="not a URL"):
        parse("http://[::1/m")


@pytest.mark.parametrize("ending", [".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"])
@pytest.mark.parametrize("folder", ["/models", "s3://bucket/m"])
def test_g19_pickle_file_is_refused_with_how_to_convert(folder: str, ending: str) -> None:
    with pytest.raises(UnsafeFormatError, match=rf"model{ending} is a pickle.*save_file"):
        parse(f"{folder}/model{ending}")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA:HUSH@bucket/m",
        "s3://HUSH@bucket/m",
        "s3://:HUSH@bucket/m",
        "https://user:HUSH@host:8080/m",
        "s4://user:HUSH@host/m",
        "wc://user:HUSH@prod/m",
        "wc://user:HUSH@prod/m@v1",
        "wc://HUSH@prod/m@v1",
        "wc://prod/m?token=HUSH",
        "wc://prd/m?token=HUSH",
        "s3://AKIA:HUSH@bucket/m@v1",
        "s3://AKIA:HU/SH@bucket/m@v1",
        "s3://HUSH@bucket",
        "https://host/m@v1?token=HUSH",
        "s3://AKIA:HU/SH@bucket/m",
        "s3://AKIA:HU?SH@bucket/m",
        "s3://AKIA:HU#SH@bucket/m",
        "s3://AKIA:H@HUSH@bucket/m",
        "s3://AKIA:A@HU/SH@bucket/m",
        " s3://AKIA:HUSH@bucket/m",
        "s3://AKIA:HUSH@bucket/m\0",
        "http://user:HUSH@[::1/m",
        "https://host/m?token=HUSH",
    ],
)
def test_g27_secret_in_a_uri_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(UriError) as caught:
        parse(uri)
    told = f"{caught.value} {caught.value.facts} {caught.value.__cause__}"
    assert not [word for word in ("HUSH", "HU/", "HU?", "HU#", "AKIA:H") if word in told]


@pytest.mark.parametrize("uri", ["x" * 5000 + " ", "s4://" + "x" * 5000, "http://[" + "x" * 5000])
def test_message_stays_one_short_line(uri: str) -> None:
    with pytest.raises(UriError) as caught:
        parse(uri)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@examples
@given(
    st.sampled_from(SCHEMES), st.text("aB3/@:+=", max_size=8), st.sampled_from(["", "/m", "/m@v1", "/r/m@v1", "/m@v1/"])
)
def test_g27_user_and_secret_before_a_host_are_refused_whatever_is_named(scheme: str, secret: str, path: str) -> None:
    with pytest.raises(UriError, match="credentials in the URI"):
        parse(f"{scheme}://user:x{secret}@host{path}")


def test_azure_container_before_the_host_is_no_user() -> None:
    uri = "abfs://models@account.dfs.core.windows.net/llama"
    assert str(parse_uri(uri, {"abfs"}, "/")) == uri
    with pytest.raises(UriError, match="credentials"):
        parse_uri("abfs://user:key@account.dfs.core.windows.net/llama", {"abfs"}, "/")
