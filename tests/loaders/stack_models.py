"""Own tiny checkpoints of random weights, as the stacks themselves write them.

Never imports weightcache.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, LlamaConfig, LlamaForCausalLM

LETTERS = "abcdefghijklmnop"


def write_llama(folder: Path) -> None:
    """Write a Llama: BF16, tied embeddings, three shards, a generation configuration of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config.update(max_new_tokens=17, do_sample=True, top_k=7)
    model.save_pretrained(folder, max_shard_size="400KB")


def unet(seed: int) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def write_unet(folder: Path, seed: int) -> None:
    unet(seed).save_pretrained(folder)


def write_stable_diffusion(folder: Path) -> None:
    """Write a Stable Diffusion: components of diffusers and of transformers, a tokenizer, a scheduler."""
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    beside = folder.parent / f"{folder.name}-words"
    beside.mkdir(parents=True)
    (beside / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (beside / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    pipeline = StableDiffusionPipeline(
        unet=unet(0),
        vae=vae,
        text_encoder=CLIPTextModel(config),
        tokenizer=CLIPTokenizer(str(beside / "vocab.json"), str(beside / "merges.txt"), model_max_length=16),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def write_lora(folder: Path) -> None:
    """Write a LoRA of the pipeline's UNet whose scale stands in the file's metadata alone."""
    tuned = unet(0)
    torch.manual_seed(5)
    tuned.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(tuned),
        unet_lora_adapter_metadata=tuned.peft_config["default"].to_dict(),
    )
