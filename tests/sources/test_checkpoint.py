"""Checkpoint folders that are incomplete, of the wrong kind, or at odds with themselves."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguf_splitquant.errors import CheckpointError, SplitQuantError, TokenizerError, UnsupportedModelError
from gguf_splitquant.sources import open_model

from .handmade import (
    CONFIG,
    header_of,
    llama_shapes,
    write_checkpoint,
    write_index,
    write_safetensors,
    write_shards,
)


def refused(folder: Path, kind: type[SplitQuantError], message: str, fix: str) -> SplitQuantError:
    """The error of opening ``folder``: of that class, naming the thing and the next step, in one line."""
    with pytest.raises(kind, match=message) as caught:
        open_model(folder)
    assert type(caught.value) is kind
    assert fix in caught.value.fix
    assert "\n" not in str(caught.value)
    return caught.value


def edit_config(folder: Path, **fields: Any) -> None:
    write_config(folder, {**json.loads((folder / "config.json").read_text()), **fields})


def write_config(folder: Path, fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps(fields))


def test_sound_checkpoints_open(tmp_path: Path) -> None:
    """The base of every test below is sound."""
    model = open_model(write_checkpoint(tmp_path / "one"))
    (tmp_path / "two").mkdir()
    write_shards(tmp_path / "two")
    sharded = open_model(tmp_path / "two")
    assert {t.name for t in model.tensors} == {t.name for t in sharded.tensors}
    assert model.architecture == "llama" and model.tied_head
    assert model.n_params == 300 * 16 + 3 * 16 + 2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 24


# --- what is given


def test_not_a_checkpoint_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", CheckpointError, "nowhere: no such folder", "config.json")
    refused(tmp_path, CheckpointError, r"config\.json: not found", "download")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    refused(tmp_path / "model.safetensors", CheckpointError, "neither a GGUF file nor a checkpoint", "folder")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.pth").write_bytes(b"x")
    refused(tmp_path / "model.pth", UnsupportedModelError, "a pickle", "safetensors")


def test_no_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, CheckpointError, "no model.*safetensors file", "safetensors format")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    refused(tmp_path, UnsupportedModelError, "a LoRA adapter", "merge")


class _Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "c.pth", "m.pt"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(pickle.dumps(_Bomb()))
    refused(tmp_path, UnsupportedModelError, f"{name}: a pickle.*never opened", "save_pretrained")


def test_a_pickle_beside_safetensors_is_left_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    assert open_model(tmp_path).architecture == "llama"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
    ],
)
def test_damaged_json(tmp_path: Path, content: bytes, message: str) -> None:
    write_shards(tmp_path)
    for name in ("model.safetensors.index.json", "config.json"):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path, CheckpointError, rf"{name}: {message}", "download")


# --- architecture and quantization


def test_unknown_architecture(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, architectures=["BertModel"])
    error = refused(tmp_path, UnsupportedModelError, "BertModel is not supported", "--official-converter")
    assert "(supported: " in error.cause
    for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"):
        assert name in error.cause


def test_unknown_architecture_names_the_closest(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, architectures=["Qwen3NextForCausalLM"])
    refused(tmp_path, UnsupportedModelError, r"\(closest: Qwen3ForCausalLM, ", "--official-converter")


@pytest.mark.parametrize("value", [None, [], {}, "LlamaForCausalLM", [3]])
def test_no_architecture(tmp_path: Path, value: Any) -> None:
    write_checkpoint(tmp_path, architectures=value)
    refused(tmp_path, CheckpointError, "config.json: no list 'architectures'", "config.json")


@pytest.mark.parametrize(
    ("settings_", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
        ({"quant_method": "awq", "bits": 4}, "awq, 4 bits"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_algo": "NVFP4"}, "NVFP4"),
        ({"who": "knows"}, "no method that is known"),
        ("gptq", "gptq"),
    ],
)
def test_quantized_by_config(tmp_path: Path, settings_: Any, named: str) -> None:
    write_checkpoint(tmp_path, quantization_config=settings_)
    refused(tmp_path, UnsupportedModelError, f"config.json: .*already quantized.*{named}", "original float")


def test_an_empty_quantization_config_is_none(tmp_path: Path) -> None:
    assert open_model(write_checkpoint(tmp_path, quantization_config={})).n_params


@pytest.mark.parametrize(("name", "method"), [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")])
def test_quantized_by_file(tmp_path: Path, name: str, method: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / name).write_text("{}")
    refused(tmp_path, UnsupportedModelError, f"{name}: .*already quantized.*{method}", "original float")


@pytest.mark.parametrize(
    ("suffix", "method"),
    [
        ("qweight", "GPTQ or AWQ"),
        ("qzeros", "GPTQ or AWQ"),
        ("weight.absmax", "bitsandbytes"),
        ("SCB", "bitsandbytes"),
        ("weight_packed", "compressed-tensors"),
        ("weight_scale_inv", "fp8"),
    ],
)
def test_quantized_by_tensor(tmp_path: Path, suffix: str, method: str) -> None:
    write_checkpoint(tmp_path)
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    write_safetensors(tmp_path / "model.safetensors", header_of({**llama_shapes(), name: [4]}))
    refused(
        tmp_path, UnsupportedModelError, f"model.safetensors: tensor {name}: .*{method}", "original float"
    )


# --- shards and index


def test_shards_without_index(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    refused(tmp_path, CheckpointError, "index.json: not found, but there are shards", "download")


def test_one_shard_without_index_is_not_a_whole(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    refused(tmp_path, CheckpointError, "index.json: not found, but there are shards", "download")


def test_missing_shard(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, CheckpointError, r"model-00002-of-00002\.safetensors: missing", "download")


def test_index_names_a_tensor_that_its_shard_lacks(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path)
    write_index(tmp_path, {**weight_map, "lm_head.weight": "model-00002-of-00002.safetensors"})
    refused(tmp_path, CheckpointError, "00002-of-00002.safetensors: lacks lm_head.weight", "download")


@pytest.mark.parametrize("elsewhere", [None, "model-00002-of-00002.safetensors"])
def test_shard_holds_a_tensor_that_the_index_puts_elsewhere(tmp_path: Path, elsewhere: str | None) -> None:
    weight_map = write_shards(tmp_path)
    name = "model.norm.weight"
    weight_map.pop(name)
    write_index(tmp_path, {**weight_map, **({name: elsewhere} if elsewhere else {})})
    place = elsewhere or "nowhere"
    refused(tmp_path, CheckpointError, f"00001-of-.*{name}: model.*index.json puts it .*{place}", "again")


@pytest.mark.parametrize(
    "shard",
    [
        *(
            "../model.safetensors",
            "/etc/x.safetensors",
            "a/b.safetensors",
            "a\\b.safetensors",
            "C:x.safetensors",
        ),
        *("pytorch_model.bin", "", 5, None, ["m.safetensors"], "x\0.safetensors"),
    ],
)
def test_index_that_leads_out_of_the_folder(tmp_path: Path, shard: Any) -> None:
    weight_map = write_shards(tmp_path)
    write_index(tmp_path, {**weight_map, "lm_head.weight": shard})
    refused(
        tmp_path, CheckpointError, r"index\.json: lm_head.weight is in .*, not a \*\.safetensors", "again"
    )


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_index_without_map(tmp_path: Path, weight_map: Any) -> None:
    write_shards(tmp_path)
    write_index(tmp_path, weight_map)
    refused(tmp_path, CheckpointError, r"index\.json: no map 'weight_map'", "download")


# --- tensors against config


def test_missing_tensor(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    shapes = llama_shapes()
    del shapes["model.layers.0.mlp.up_proj.weight"]
    write_safetensors(tmp_path / "model.safetensors", header_of(shapes))
    refused(
        tmp_path, CheckpointError, "model.layers.0.mlp.up_proj.weight is missing$|up_proj.* missing;", "again"
    )
    edit_config(tmp_path, attention_bias=True)
    refused(tmp_path, CheckpointError, "is missing, 5 in all", "download")


def test_missing_head(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tie_word_embeddings=False)
    refused(tmp_path, CheckpointError, "tensor lm_head.weight is missing", "tie_word_embeddings")


def test_unknown_tensor(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    shapes = {**llama_shapes(), "model.layers.0.mlp.router.weight": [4, 16], "z.weight": [3]}
    write_safetensors(tmp_path / "model.safetensors", header_of(shapes))
    refused(
        tmp_path,
        CheckpointError,
        "tensor model.layers.0.mlp.router.weight: not a tensor of LlamaForCausalLM .* nor are 1 more",
        "num_hidden_layers",
    )


def test_old_buffers_are_left_out(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    shapes = {**llama_shapes(), "model.layers.0.self_attn.rotary_emb.inv_freq": [2]}
    write_safetensors(tmp_path / "model.safetensors", header_of(shapes))
    assert len(open_model(tmp_path).tensors) == len(llama_shapes())


def test_shape_that_contradicts_the_config(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, intermediate_size=25)
    refused(
        tmp_path, CheckpointError, r"down_proj.weight: shape \[16, 24\], but .* has to be \[16, 25\]", "again"
    )
    edit_config(tmp_path, intermediate_size=24, vocab_size=301)
    refused(tmp_path, CheckpointError, r"embed_tokens.weight: shape \[300, 16\]", "again")


def test_integer_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, dtype="I64")
    refused(tmp_path, CheckpointError, "stored as I64, not as F32, F16 or BF16", "float checkpoint")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 12}, "num_hidden_layers is 12, the checkpoint has 11 tensors"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, not an integer from 1 to 512"),
        ({"vocab_size": 10**9}, "vocab_size is 1000000000, not an integer from 1 to 4194304"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers is 10+, not an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, not an integer from 1 up"),
        ({"hidden_size": -16}, "hidden_size is -16, not an integer"),
        ({"hidden_size": None}, "no field 'hidden_size'"),
        ({"hidden_size": 16.0}, "hidden_size is 16.0, not an integer"),
        ({"num_attention_heads": True}, "num_attention_heads is true, not an integer"),
        ({"num_attention_heads": 3}, "num_attention_heads 3 is not a multiple of num_key_value_heads 2"),
        ({"num_attention_heads": 6}, "hidden_size 16 is not a multiple of num_attention_heads 6"),
        ({"vocab_size": "300"}, 'vocab_size is "300", not an integer'),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is .*, not true or false"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, not a number above zero"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN, not a number"),
        ({"rope_theta": "big"}, 'rope_theta is "big", not a number'),
        ({"rope_scaling": [1]}, "rope_scaling is .*, not an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: no field 'factor'"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "no field 'original_max_position_embeddings'"),
    ],
)
def test_config_fields(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    write_config(write_checkpoint(tmp_path), {**CONFIG, **fields})
    refused(tmp_path, CheckpointError, message, "")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"type": "longrope"}}, "rope type longrope is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
    ],
)
def test_unsupported_config(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    write_config(write_checkpoint(tmp_path), {**CONFIG, **fields})
    refused(tmp_path, UnsupportedModelError, message, "")


# --- tokenizer and metadata


def test_no_tokenizer(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    refused(tmp_path, TokenizerError, "neither tokenizer.model, tokenizer.json", "download")
    (tmp_path / "tekken.json").write_text("{}")
    refused(tmp_path, TokenizerError, "tekken.json: .*Mistral's own format", "tokenizer.json")


def test_model_card_that_is_not_yaml(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    refused(tmp_path, CheckpointError, "README.md: .*not valid YAML", "README.md")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "generation_config.json",
            '{"top_k": "many"}',
            "general.sampling.top_k would be 'many', not a int32",
        ),
        (
            "generation_config.json",
            '{"temperature": 1e39}',
            "general.sampling.temp would be '1e.39', not a float32",
        ),
        ("generation_config.json", '{"min_p": NaN}', "general.sampling.min_p would be 'nan', not a float32"),
        ("README.md", "---\ntags: [[1], 2]\n---\n", "general.tags would be"),
        ("README.md", "---\nlicense: [[1], 2]\n---\n", "README.md, .* a value of a wrong type"),
    ],
)
def test_metadata_that_gguf_cannot_hold(tmp_path: Path, name: str, text: str, message: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / name).write_text(text)
    refused(tmp_path, CheckpointError, message, "README.md")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([*CONFIG, "head_dim", "rope_scaling", "rope_parameters", "rope_theta", "attention_bias"]),
    json_values,
)
def test_any_config_value_is_read_or_refused(tmp_path: Path, field: str, value: Any) -> None:
    """No value of any field that is used ends in anything but a model or an error for the user."""
    if not (tmp_path / "config.json").is_file():
        write_checkpoint(tmp_path)
    write_config(tmp_path, {**CONFIG, field: value})
    try:
        open_model(tmp_path)
    except SplitQuantError as error:
        assert "config.json" in str(error) or "tensor" in str(error)
