"""Names of models: what is understood, what is refused, and that no refusal repeats a secret."""

from __future__ import annotations

import pytest

from weightcache.errors import UnsafeFormatError, UriError
from weightcache.uri import Name, parse_uri

SCHEMES = ("s3", "gs", "hf", "http", "https", "memory")


def parse(uri: str) -> Name:
    return parse_uri(uri, SCHEMES, "/models-here")


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
        ("/models/llama@v1", Name("file", "/models/llama@v1")),
        ("/models/model.safetensors", Name("file", "/models", "model.safetensors")),
        ("model.safetensors", Name("file", "/models-here", "model.safetensors")),
        ("/model.safetensors", Name("file", "/", "model.safetensors")),
        ("s3://bucket/llama", Name("s3", "s3://bucket/llama")),
        ("s3://bucket/llama///", Name("s3", "s3://bucket/llama")),
        ("s3://bucket", Name("s3", "s3://bucket")),
        ("S3://bucket/Llama", Name("s3", "s3://bucket/Llama")),
        ("s3://bucket/llama@v1", Name("s3", "s3://bucket/llama@v1")),
        ("s3://bucket/llama:v1@blake3:00", Name("s3", "s3://bucket/llama:v1@blake3:00")),
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


@pytest.mark.parametrize("uri", ["s3://bucket/m", "s3://bucket/m/model.safetensors", "/m", "/m/a.safetensors"])
def test_name_is_written_as_it_was_read(uri: str) -> None:
    assert str(parse(uri)) == uri
    assert parse(str(parse(uri))) == parse(uri)


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


def test_unknown_logical_name_is_refused() -> None:
    with pytest.raises(UriError, match="unknown logical name 'wc://prod/llama@tag'"):
        parse("wc://prod/llama@tag")


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


def test_azure_container_before_the_host_is_no_user() -> None:
    uri = "abfs://models@account.dfs.core.windows.net/llama"
    assert str(parse_uri(uri, {"abfs"}, "/")) == uri
    with pytest.raises(UriError, match="credentials"):
        parse_uri("abfs://user:key@account.dfs.core.windows.net/llama", {"abfs"}, "/")
