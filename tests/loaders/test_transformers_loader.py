"""What transformers makes of a model in a real bucket equals, to the bit, what it makes of the same folder."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hosted import Hosted, host
from models import minilm_folder
from nodes import wait_until
from reference import raw
from safetensors.torch import load_file, save_file
from servers import Bucket, Proxy
from stack_models import write_llama
from standin import StandIn, build_standin
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from weightcache import errors, windows
from weightcache.loaders import arriving, from_pretrained
from weightcache.loaders.transformers_loader import placements
from weightcache.tiers.device import close_devices

HEADER_READ = 128 << 10  # what is read of a shard to describe it, at most, while its header is small
TOKENS = torch.arange(1, 9)[None]
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights: BF16, tied embeddings, shards, a generation configuration of its own."""
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts, whose tensors are one an expert on disk and one a layer in the model."""
    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(1)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fp8(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama with layers of 8-bit floats and a scale a block, which a CPU loads by converting them back."""
    folder = tmp_path_factory.mktemp("fp8")
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors: dict[str, torch.Tensor] = {}
    for path in llama.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            tensors[name] = tensor
            if "proj" in name:
                blocks = [-(-size // 128) for size in tensor.shape]
                tensors[name] = (tensor * 64).to(torch.float8_e4m3fn)
                tensors[name + "_scale_inv"] = torch.full(blocks, 1 / 64, dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def hosted(bucket: Bucket, proxy: Proxy) -> Callable[[Path], Hosted]:
    return lambda folder: host(folder, bucket, proxy)


def assert_equal(got: Any, expected: Any) -> None:
    """Check class, every parameter and buffer, ties and the generation configuration."""
    assert type(got) is type(expected)
    theirs = dict(expected.named_parameters(remove_duplicate=False)) | dict(expected.named_buffers())
    ours = dict(got.named_parameters(remove_duplicate=False)) | dict(got.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(ours[name]) == raw(tensor), f"the bits of {name} differ"
    assert {name for name, _ in got.named_parameters()} == {name for name, _ in expected.named_parameters()}
    if got.can_generate():
        assert got.generation_config.to_dict() == expected.generation_config.to_dict()


@pytest.mark.parametrize(
    ("folder", "cls", "kwargs"),
    [
        ("llama", AutoModelForCausalLM, {}),
        ("llama", LlamaForCausalLM, {"dtype": torch.float32, "attn_implementation": "eager"}),
        ("llama", AutoModel, {"device_map": "auto", "dtype": "float16"}),
        ("llama", AutoModelForCausalLM, {"num_hidden_layers": 2, "dtype": "auto"}),
        ("mixtral", AutoModelForCausalLM, {"dtype": torch.bfloat16}),
        ("fp8", AutoModelForCausalLM, {}),
    ],
)
def test_a_model_equals_the_one_from_the_folder(
    hosted: Callable[[Path], Hosted], request: pytest.FixtureRequest, folder: str, cls: Any, kwargs: dict[str, Any]
) -> None:
    path = request.getfixturevalue(folder)
    there = hosted(path)
    got, told = from_pretrained(there.url, cls, storage_options=there.options, output_loading_info=True, **kwargs)
    expected, theirs = cls.from_pretrained(path, output_loading_info=True, **kwargs)
    assert_equal(got, expected)
    assert told == theirs
    assert raw(got(TOKENS)[0]) == raw(expected(TOKENS)[0])
    assert sum(got.weightcache_reports[0].bytes.values()) <= there.nbytes  # each byte once
    assert got.name_or_path == there.url
    assert [report.device for report in got.weightcache_reports] == ["cpu"]


def test_a_real_model_and_its_tokenizer_come_from_one_uri(hosted: Callable[[Path], Hosted]) -> None:
    path = minilm_folder()
    there = hosted(path)
    tokenizer = from_pretrained(there.url, AutoTokenizer, storage_options=there.options)
    config = from_pretrained(there.url, AutoConfig, storage_options=there.options)
    assert there.served_bytes() < 10 * HEADER_READ  # of 90 MB
    assert tokenizer.name_or_path == there.url
    assert config.to_dict() == AutoConfig.from_pretrained(path).to_dict() | {"_name_or_path": there.url}
    tokens = tokenizer(["Weights near the GPU, and not on it."], return_tensors="pt")
    assert torch.equal(
        tokens["input_ids"],
        AutoTokenizer.from_pretrained(path)(["Weights near the GPU, and not on it."], return_tensors="pt")["input_ids"],
    )
    got = from_pretrained(there.url, AutoModel, storage_options=there.options)
    expected = AutoModel.from_pretrained(path)
    assert_equal(got, expected)
    assert raw(got(**tokens).last_hidden_state) == raw(expected(**tokens).last_hidden_state)


def test_tensors_are_used_where_they_arrived(hosted: Callable[[Path], Hosted], llama: Path) -> None:
    there = hosted(llama)
    model = from_pretrained(there.url, LlamaForCausalLM, storage_options=there.options)
    memories = {each.untyped_storage().data_ptr() for each in model.parameters()}
    assert len(memories) == 1  # of the one group of tensors that it came in


@pytest.mark.parametrize("ignored", [True, False])
def test_what_does_not_fit_is_told_as_transformers_tells_it(
    hosted: Callable[[Path], Hosted], llama: Path, ignored: bool
) -> None:
    there = hosted(llama)
    kwargs = {
        "vocab_size": 100,
        "num_labels": 3,
        "ignore_mismatched_sizes": ignored,
        "output_loading_info": True,
    }
    if not ignored:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            from_pretrained(there.url, AutoModelForSequenceClassification, storage_options=there.options, **kwargs)
        return
    _, told = from_pretrained(there.url, AutoModelForSequenceClassification, storage_options=there.options, **kwargs)
    assert told == AutoModelForSequenceClassification.from_pretrained(llama, **kwargs)[1]
    assert told["missing_keys"] == {"score.weight"}
    assert [name for name, _, _ in told["mismatched_keys"]] == ["model.embed_tokens.weight"]


def test_a_model_divided_between_memory_and_disk_computes_the_same(
    hosted: Callable[[Path], Hosted], llama: Path, tmp_path: Path
) -> None:
    there = hosted(llama)
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{number}": "disk" if number else "cpu" for number in range(3)}
    got = from_pretrained(
        there.url,
        AutoModelForCausalLM,
        storage_options=there.options,
        device_map=device_map,
        offload_folder=str(tmp_path / "offloaded"),
    )
    assert got.hf_device_map == device_map
    assert got.model.layers[1].mlp.up_proj.weight.is_meta
    assert raw(got(TOKENS).logits) == raw(AutoModelForCausalLM.from_pretrained(llama)(TOKENS).logits)


def test_the_second_time_nothing_is_asked_of_the_origin(hosted: Callable[[Path], Hosted], llama: Path) -> None:
    there = hosted(llama)
    first = from_pretrained(there.url, AutoModelForCausalLM, storage_options=there.options)
    there.bucket.server.client().delete_object(Bucket=there.bucket.name, Key=f"{there.prefix}/config.json")
    again = from_pretrained(there.url, AutoModelForCausalLM, storage_options=there.options, offline=True)
    assert_equal(again, first)
    assert again.weightcache_reports[0].bytes["origin"] == 0


# -- code


@pytest.fixture
def with_code(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Llama as a model of a type of its own, whose code lies beside the weights."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    folder.mkdir()
    for path in llama.iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((llama / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE)
    return folder


def test_code_runs_only_for_a_user_who_trusts_it(hosted: Callable[[Path], Hosted], with_code: Path) -> None:
    there = hosted(with_code)
    for given in ({}, {"trust_remote_code": None}, {"trust_remote_code": False}):
        with pytest.raises(errors.ConfigError, match="trust_remote_code"):
            from_pretrained(there.url, AutoModelForCausalLM, storage_options=there.options, **given)
    model = from_pretrained(there.url, AutoModelForCausalLM, storage_options=there.options, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    expected = AutoModelForCausalLM.from_pretrained(with_code, trust_remote_code=True)
    assert raw(model(TOKENS).logits) == raw(expected(TOKENS).logits)


def test_code_of_another_repository_is_never_trusted(hosted: Callable[[Path], Hosted], with_code: Path) -> None:
    config = json.loads((with_code / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "somebody/else--own.OwnForCausalLM"
    (with_code / "config.json").write_text(json.dumps(config))
    there = hosted(with_code)
    with pytest.raises(errors.ConfigError, match="somebody/else--own"):
        from_pretrained(there.url, AutoModelForCausalLM, storage_options=there.options, trust_remote_code=True)


# -- devices


@pytest.fixture
def two_devices(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library = build_standin(tmp_path_factory.mktemp("standin"))
    monkeypatch.setenv("WEIGHTCACHE_LIBCUDA", str(library))
    standin = StandIn(library)
    standin.reset()
    standin.configure("devices=2")
    yield
    gc.collect()
    close_devices()
    assert standin.violations() == []
    standin.reset()


def test_tensors_go_to_the_devices_of_their_modules() -> None:
    names = ["model.layers.1.mlp.weight", "model.layers.10.mlp.weight", "lm_head.weight", "model.norm.weight", "other"]
    device_map = {"model.layers.1": "disk", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    assert placements(names, "", "model", device_map) == {"cpu": names}
    assert placements(names, "", "model", "auto") == {"cpu": names}


def test_each_device_gets_its_own_tensors(hosted: Callable[[Path], Hosted], llama: Path, two_devices: None) -> None:
    there = hosted(llama)

    def place(names: Any) -> dict[str, list[str]]:
        return {f"cuda:{number}": list(names[number::2]) for number in range(2)}

    with arriving.Arriving(there.url, place, {"storage_options": there.options}) as coming:
        got = {name: tensor[...] for name, tensor in coming.pending().items()}
    assert {name: raw(tensor) for name, tensor in got.items()} == {
        name: raw(tensor) for name, tensor in there.tensors.items()
    }
    assert sorted(report.device for report in coming.reports) == ["cuda:0", "cuda:1"]
    assert sum(report.tensor_bytes for report in coming.reports) == sum(each.nbytes for each in got.values())


def test_tensors_come_in_any_order_that_they_are_asked_for(
    hosted: Callable[[Path], Hosted], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WINDOW_NBYTES", 1)
    monkeypatch.setattr(arriving, "AHEAD_SHARE", 0.0)
    there = hosted(llama)
    with arriving.Arriving(there.url, "cpu", {"storage_options": there.options, "timeout_s": 60.0}) as coming:
        pending = coming.pending()
        got = {name: pending[name][...] for name in reversed(pending)}
        with pytest.raises(errors.WeightcacheError, match="handed over before"):
            pending[next(iter(pending))][...]
    assert {name: raw(tensor) for name, tensor in got.items()} == {
        name: raw(tensor) for name, tensor in there.tensors.items()
    }


def test_the_end_of_a_load_ends_those_who_wait_for_it() -> None:
    asked, may_go_on, given = threading.Event(), threading.Semaphore(0), []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(100):
            asked.set()
            may_go_on.acquire()
            given.append(number)
            yield str(number), torch.zeros(1)

    source = arriving._Source("s3://bucket/model", tensors())
    with ThreadPoolExecutor(3) as pool:
        takers = [pool.submit(source.take, name) for name in ("98", "99")]
        assert asked.wait(60)
        end = pool.submit(source.close)
        wait_until(lambda: source._failure is not None)
        may_go_on.release(100)
        for taker in takers:
            with pytest.raises(errors.WeightcacheError, match="has ended"):
                taker.result(60)
        end.result(60)
    assert given == [0]


# -- refusals


def test_what_cannot_be_done_is_refused(hosted: Callable[[Path], Hosted], llama: Path) -> None:
    there = hosted(llama)
    for cls, kwargs, error, says in (
        ("LlamaForCausalLM", {}, errors.ConfigError, "a class with from_pretrained"),
        (AutoModelForSpeechSeq2Seq, {}, errors.ConfigError, "Unrecognized configuration class"),
        (AutoModel, {"device_map": "cuda:7"}, errors.DeviceError, "torch sees 0 CUDA devices"),
        (AutoModel, {"device_map": {"": 0}}, errors.DeviceError, "no such device: 0"),
        (AutoModel, {"device_map": "gpu"}, errors.DeviceError, "gpu"),
        (AutoModel, {"revision": "main"}, errors.ConfigError, "@tag"),
        (AutoModel, {"token": "secret"}, errors.ConfigError, "^token= cannot"),
        (AutoModel, {"use_safetensors": False}, errors.ConfigError, "never pickle"),
        (AutoModel, {"subfolder": "nothing"}, errors.ConfigError, "nothing"),
    ):
        with pytest.raises(error, match=says):
            from_pretrained(there.url, cls, storage_options=there.options, **kwargs)


def test_a_folder_without_a_configuration_is_named(
    hosted: Callable[[Path], Hosted], llama: Path, tmp_path: Path
) -> None:
    for path in llama.glob("*.safetensors*"):
        (tmp_path / path.name).symlink_to(path)
    there = hosted(tmp_path)
    with pytest.raises(errors.IncompleteModelError, match=r"no config\.json"):
        from_pretrained(there.url, AutoModel, storage_options=there.options)


def test_an_error_on_the_way_reaches_the_caller(hosted: Callable[[Path], Hosted], llama: Path) -> None:
    there = hosted(llama)
    from_pretrained(
        there.url, AutoConfig, storage_options=there.options
    )  # from here on everything is known but weights
    with pytest.raises(errors.OfflineError):
        from_pretrained(there.url, AutoModel, storage_options=there.options, offline=True)
