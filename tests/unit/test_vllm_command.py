"""What `weightcache vllm serve` hands to vLLM, and what it refuses to."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from weightcache.cli.vllm import check_arguments, name_of, pinned, serve_command
from weightcache.errors import ConfigError

REVISION = "blake3:" + "0" * 64


def test_command_names_folder_load_format_uri_and_what_the_model_is_called() -> None:
    command = serve_command(Path("/kept/llama"), "s3://b/llama", {"anon": True}, "llama", ["--port", "1"])
    extra = json.dumps({"uri": "s3://b/llama", "storage_options": {"anon": True}})
    vllm = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", "/kept/llama"]
    own = ["--load-format", "weightcache", "--model-loader-extra-config", extra, "--served-model-name", "llama"]
    assert command == [*vllm, *own, "--port", "1"]


@pytest.mark.parametrize("given", [["--served-model-name", "mine"], ["--served_model_name=mine"]])
def test_name_that_the_user_gives_stands(given: list[str]) -> None:
    command = serve_command(Path("/kept/llama"), "s3://b/llama", {}, "llama", given)
    assert command[-len(given) - 1 :] == ['{"uri": "s3://b/llama"}', *given]


@pytest.mark.parametrize(
    "given",
    [
        ["--load-format", "auto"],
        ["--port", "1", "--load_format=auto"],
        ["--model-loader-extra-config.uri", "s3://other"],
        ["--model", "other"],
    ],
)
def test_what_the_uri_says_already_is_refused(given: list[str]) -> None:
    with pytest.raises(ConfigError, match="is set by weightcache vllm serve itself"):
        check_arguments(given)


def test_other_arguments_pass() -> None:
    check_arguments(["--model-impl", "vllm", "--tensor-parallel-size=2", "--hf-overrides.model", "x", "load-format"])


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("s3://bucket/llama-3-8b", "llama-3-8b"),
        ("s3://bucket/llama-3-8b/", "llama-3-8b"),
        ("wc://prod/llama@v1", "llama"),
        ("./llama", "llama"),
        (".", "model"),
    ],
)
def test_model_is_called_by_the_last_part_of_its_uri(uri: str, name: str) -> None:
    assert name_of(uri) == name


@pytest.mark.parametrize(
    ("uri", "exact"),
    [
        ("s3://b/registry/llama@v1", f"s3://b/registry/llama@{REVISION}"),
        ("wc://prod/llama@v1", f"wc://prod/llama@{REVISION}"),
        ("wc://prod/llama", f"wc://prod/llama@{REVISION}"),
        ("s3://b/llama", "s3://b/llama"),
        ("s3://b/odd@name/", "s3://b/odd@name/"),
        ("hf://org/name@main", "hf://org/name@main"),
        ("abfs://container@account.dfs.core.windows.net/llama", "abfs://container@account.dfs.core.windows.net/llama"),
    ],
)
def test_ranks_are_given_the_revision_that_a_tag_named(uri: str, exact: str) -> None:
    assert pinned(uri, REVISION) == exact
