"""What diffusers makes of a pipeline in a real bucket equals, to the bit, what it makes of the same folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoModel,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from hosted import Hosted, host
from reference import raw
from servers import Bucket, Proxy
from stack_models import write_lora, write_stable_diffusion, write_unet
from transformers import CLIPTextModel

import weightcache
from weightcache import errors
from weightcache.loaders import from_pretrained


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion of random weights: components of diffusers and of transformers, a tokenizer, a scheduler."""
    folder = tmp_path_factory.mktemp("stable") / "pipeline"
    write_stable_diffusion(folder)
    return folder


@pytest.fixture
def hosted(bucket: Bucket, proxy: Proxy) -> Callable[..., Hosted]:
    return lambda folder, prefix="models/tiny": host(folder, bucket, proxy, prefix)


def assert_equal(got: Any, expected: Any) -> None:
    """Check class, every parameter and buffer."""
    assert type(got) is type(expected)
    ours, theirs = (dict(each.named_parameters()) | dict(each.named_buffers()) for each in (got, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(ours[name]) == raw(tensor), f"the bits of {name} differ"
    assert got.training is expected.training is False


def drawn(pipeline: Any) -> bytes:
    image = pipeline(
        "a b", num_inference_steps=2, height=16, width=16, output_type="pt", generator=torch.manual_seed(3)
    )
    return raw(image.images)


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (DiffusionPipeline, {}),
        (StableDiffusionPipeline, {"dtype": torch.bfloat16, "device_map": "cpu"}),
    ],
)
def test_a_pipeline_equals_the_one_from_the_folder(
    hosted: Callable[..., Hosted], stable: Path, cls: Any, kwargs: dict[str, Any]
) -> None:
    there = hosted(stable)
    got = from_pretrained(there.url, cls, storage_options=there.options, **kwargs)
    expected = cls.from_pretrained(str(stable), **kwargs)
    for name in ("unet", "vae", "text_encoder"):
        assert_equal(getattr(got, name), getattr(expected, name))
    assert drawn(got) == drawn(expected)
    assert got.scheduler.config == expected.scheduler.config
    assert len(got.weightcache_reports) == 1
    assert got.name_or_path == there.url


def test_a_component_is_swapped_and_the_others_are_read_alone(
    hosted: Callable[..., Hosted], stable: Path, tmp_path: Path
) -> None:
    write_unet(tmp_path / "tuned", seed=7)
    tuned, there = hosted(tmp_path / "tuned", "models/tuned"), hosted(stable)
    own = from_pretrained(tuned.url, UNet2DConditionModel, storage_options=tuned.options)
    got = from_pretrained(there.url, DiffusionPipeline, storage_options=there.options, unet=own)
    assert got.unet is own
    expected = DiffusionPipeline.from_pretrained(stable, unet=UNet2DConditionModel.from_pretrained(tmp_path / "tuned"))
    assert drawn(got) == drawn(expected)
    others = sum(
        (stable / name).stat().st_size
        for name in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
    )
    assert got.weightcache_reports[0].bytes["origin"] <= others


@pytest.mark.parametrize(
    ("cls", "subfolder"),
    [(UNet2DConditionModel, "unet"), (AutoModel, "vae"), (AutoModel, "text_encoder"), (CLIPTextModel, "text_encoder")],
)
def test_a_component_comes_alone(hosted: Callable[..., Hosted], stable: Path, cls: Any, subfolder: str) -> None:
    there = hosted(stable)
    got = from_pretrained(there.url, cls, storage_options=there.options, subfolder=subfolder)
    assert_equal(got, cls.from_pretrained(str(stable), subfolder=subfolder))
    assert got.weightcache_reports[0].tensor_bytes == sum(each.nbytes for each in got.state_dict().values())


def test_a_pipeline_without_text_comes_too(hosted: Callable[..., Hosted], tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    DDPMPipeline(model, DDPMScheduler(num_train_timesteps=10)).save_pretrained(tmp_path)
    there = hosted(tmp_path)
    got = from_pretrained(there.url, DDPMPipeline, storage_options=there.options)
    assert_equal(got.unet, DDPMPipeline.from_pretrained(tmp_path).unet)
    memories = {each.untyped_storage().data_ptr() for each in got.unet.parameters()}
    assert len(memories) == 1  # as the tensors arrived, without a copy


def test_what_cannot_be_done_is_refused(hosted: Callable[..., Hosted], stable: Path) -> None:
    there = hosted(stable)
    for cls, kwargs, error, says in (
        (DiffusionPipeline, {"device_map": "balanced"}, errors.ConfigError, "name a device"),
        (DiffusionPipeline, {"device_map": "cuda:5"}, errors.DeviceError, "torch sees 0"),
        (DiffusionPipeline, {"variant": "fp16"}, errors.ConfigError, "folder of its own"),
        (UNet2DConditionModel, {}, errors.IncompleteModelError, r"config\.json"),
        (UNet2DModel, {"subfolder": "unet"}, errors.ConfigError, "cannot be built"),
        (UNet2DConditionModel, {"subfolder": "unet", "dtype": "half"}, errors.ConfigError, r"torch\.bfloat16"),
    ):
        with pytest.raises(error, match=says):
            from_pretrained(there.url, cls, storage_options=there.options, **kwargs)


def test_a_lora_is_pulled_and_put_on(hosted: Callable[..., Hosted], stable: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "lora")
    lora, there = hosted(tmp_path / "lora", "models/lora"), hosted(stable)
    got = from_pretrained(there.url, DiffusionPipeline, storage_options=there.options)
    without = drawn(got)
    weightcache.pull(lora.url, tmp_path / "pulled", storage_options=lora.options)
    got.load_lora_weights(str(tmp_path / "pulled"))
    expected = DiffusionPipeline.from_pretrained(str(stable))
    expected.load_lora_weights(str(tmp_path / "lora"))
    assert drawn(got) == drawn(expected) != without
