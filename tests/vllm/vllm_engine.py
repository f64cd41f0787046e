"""Own a vLLM engine on the processor, in this process or in one of its own, and the models that it is tried with.

As a program it reads a line of JSON for each answer: `{"engine": {…}}` first, then `{"reload": …}` or `{}`; it answers with
tokens.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import models

PROMPTS = [[5, 6, 7], [100, 3], [17]]
N_TOKENS = 12
HEADER_NBYTES = 128 << 10  # what is read of each shard to know its header: for vLLM's configuration, and for its ranks
# Tokens are compared: float32, so that no other order of additions decides, and wide random weights, so that they differ.
CONFIG: dict[str, Any] = models.TINY_CONFIG | {
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 512,
}
Tokens = list[list[int]]


def write_llama(folder: Path, seed: int) -> Path:
    """Write a random Llama of some 4 MB in several shards, with a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(folder, max_shard_size="1MB")
    (folder / "tokenizer.json").write_text(json.dumps(models.word_tokenizer()))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def make(**options: Any) -> Any:
    """Make an engine. `model` is needed; `uri` and `storage_options` choose the load format weightcache."""
    from vllm import LLM

    extra = {name: options.pop(name) for name in ("uri", "storage_options") if name in options}
    if extra:
        options |= {"load_format": "weightcache", "model_loader_extra_config": extra}
    return LLM(enforce_eager=True, max_model_len=64, dtype="float32", kv_cache_memory_bytes=64 << 20, **options)


def generate(engine: Any) -> Tokens:
    """Return what a model goes on with after each prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=N_TOKENS, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def reload(engine: Any, path: str | None = None) -> None:
    """Fill the model again, from another place if one is given."""
    engine.collective_rpc("reload_weights", kwargs={"weights_path": path} if path else {})


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's log is in the way
    engine = make(**json.loads(sys.stdin.readline())["engine"])
    print(json.dumps(generate(engine)), file=answers, flush=True)
    for line in sys.stdin:
        reload(engine, json.loads(line)["reload"])
        print(json.dumps(generate(engine)), file=answers, flush=True)


if __name__ == "__main__":
    main()
