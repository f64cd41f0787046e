"""`weightcache vllm serve` serves a model from a bucket, and adapters that are asked for by name from beside it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import vllm_engine as engine
from hosted import host
from nodes import wait_until
from servers import Bucket, Proxy
from vllm_engine import Tokens

READY_TIMEOUT_S = 400.0  # three processes that import vLLM, one after the other
END_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 120.0


def write_adapter(folder: Path) -> None:
    """Write a LoRA adapter, large enough to be heard, for the queries of every layer."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(3)
    folder.mkdir()
    form = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(form | {"base_model_name_or_path": "models/one"}))
    width = engine.CONFIG["hidden_size"]
    tensors = {}
    for layer in range(engine.CONFIG["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors |= {f"{name}.lora_A.weight": torch.randn(8, width), f"{name}.lora_B.weight": torch.randn(width, 8)}
    save_file(tensors, folder / "adapter_model.safetensors")


class Served:
    """`weightcache vllm serve` of a URI, ready after `wait`."""

    def __init__(self, log: Path, uri: str, *arguments: str) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.log = log
        own = ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager"]
        own += ["--max-model-len", "64", "--kv-cache-memory-bytes", str(64 << 20), *arguments]
        with log.open("w") as file:
            command = [sys.executable, "-m", "weightcache", "vllm", "serve", uri, *own]
            self.process = subprocess.Popen(command, stdout=file, stderr=file)

    def wait(self) -> None:
        wait_until(self._is_ready, READY_TIMEOUT_S)

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-5000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=ANSWER_TIMEOUT_S):
                return True
        except OSError:
            return False

    def ask(self, path: str, **form: Any) -> bytes:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(form).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as answer:
                body: bytes = answer.read()
        except urllib.error.HTTPError as exc:
            raise AssertionError(f"{exc.read().decode()}\n{self.log.read_text()[-5000:]}") from exc
        return body

    def tokens(self, model: str) -> Tokens:
        """Return what a model goes on with after each prompt."""
        asked = {"temperature": 0, "max_tokens": engine.N_TOKENS, "ignore_eos": True, "return_token_ids": True}
        answer = json.loads(self.ask("/v1/completions", model=model, prompt=engine.PROMPTS, **asked))
        return [choice["token_ids"] for choice in answer["choices"]]


@contextmanager
def served(log: Path, uri: str, *arguments: str) -> Iterator[Served]:
    server = Served(log, uri, *arguments)
    try:
        server.wait()
        yield server
    finally:
        server.process.terminate()
        server.process.wait(END_TIMEOUT_S)


def test_serves_a_bucket_and_the_adapters_in_it(
    folders: tuple[Path, Path],
    expected: tuple[Tokens, Tokens],
    bucket: Bucket,
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_adapter(tmp_path / "tuned")
    bucket.upload(tmp_path / "tuned", "loras/tuned")
    hosted = host(folders[0], bucket, proxy, "models/one")
    (tmp_path / "weightcache.toml").write_text(f'loras = "{bucket.url}/loras"\n')
    monkeypatch.setenv("WEIGHTCACHE_CONFIG", str(tmp_path / "weightcache.toml"))
    for name, value in hosted.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    with served(tmp_path / "vllm.log", hosted.url, "--enable-lora", "--max-lora-rank", "8") as server:
        assert server.tokens("one") == expected[0]
        assert hosted.served_bytes() <= 1.01 * hosted.nbytes + hosted.n_shards * engine.HEADER_NBYTES
        tuned = server.tokens("tuned")
        server.ask("/v1/load_lora_adapter", lora_name="as vLLM reads it", lora_path=str(tmp_path / "tuned"))
        assert tuned == server.tokens("as vLLM reads it") != expected[0]
        with pytest.raises(AssertionError, match="does not exist"):
            server.tokens("missing")
