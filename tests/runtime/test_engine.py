"""The engine against transformers, against itself in other batches, and against files that it must refuse."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest

from gguf_splitquant.errors import EngineError, GGUFError
from gguf_splitquant.runtime import engine as engine_module
from gguf_splitquant.runtime.engine import Engine, EngineOptions
from gguf_splitquant.runtime.library import load_llama_cpp
from tests.gguf_files import FLOAT, convert_once, one_tensor

pytestmark = pytest.mark.engine

EXACT = EngineOptions(n_ctx=256, n_threads=1, kv="f32", flash_attention=False, repack=False)
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."


@pytest.fixture(scope="session")
def story_file(stories15m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_once(stories15m, tmp_path_factory.mktemp("engine"), FLOAT, "float")


def all_logits(path: Path, options: EngineOptions, tokens: np.ndarray, first: int = 0) -> np.ndarray:
    with Engine(path, options) as engine:
        slabs = list(engine.logits(tokens, first))
    assert all(len(slab.logits) <= options.n_batch for slab in slabs)
    starts = [slab.start for slab in slabs]
    assert starts == list(np.cumsum([first] + [len(slab.logits) for slab in slabs])[:-1])
    return np.concatenate([slab.logits for slab in slabs])


@pytest.mark.oracle
def test_logits_and_tokens_are_those_of_transformers(stories15m: Path, story_file: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories15m)
    model = transformers.AutoModelForCausalLM.from_pretrained(stories15m, dtype=torch.float32)
    with Engine(story_file, EXACT) as engine:
        tokens = engine.tokenize(STORY)
        assert tokens.tolist() == tokenizer(STORY)["input_ids"]
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
    np.testing.assert_allclose(all_logits(story_file, EXACT, tokens), expected, atol=2e-4)


def test_logits_do_not_depend_on_the_batches(story_file: Path) -> None:
    tokens = np.arange(100, 183)
    whole = all_logits(story_file, EXACT, tokens)
    assert whole.shape == (83, 32000)
    small = EngineOptions(n_ctx=256, n_batch=7, n_ubatch=3, n_threads=1, kv="f32", flash_attention=False)
    np.testing.assert_allclose(all_logits(story_file, small, tokens), whole, atol=1e-4)
    second_half = all_logits(story_file, small, tokens, first=41)
    np.testing.assert_allclose(second_half, whole[41:], atol=1e-4)


def test_sequences_share_a_copied_prefix(story_file: Path) -> None:
    with Engine(
        story_file, EngineOptions(n_ctx=64, n_threads=1, n_sequences=3, kv="f32", flash_attention=False)
    ) as engine:
        prefix = engine.tokenize("The dog was")
        endings = [engine.tokenize(text, add_special=False) for text in (" big", " not happy")]
        n = len(prefix)
        engine.decode(prefix, np.arange(n), 0, False)
        for sequence in range(1, len(endings) + 1):
            engine.copy_sequence(0, sequence)
        tokens = np.concatenate(endings)
        positions = np.concatenate([n + np.arange(len(ending)) for ending in endings])
        sequences = np.repeat([1, 2], [len(ending) for ending in endings])
        shared = engine.decode(tokens, positions, sequences, True)
        apart = []
        for ending in endings:
            whole = np.concatenate([prefix, ending])
            apart += [slab.logits[n:] for slab in engine.logits(whole)]
        np.testing.assert_allclose(shared, np.concatenate(apart), atol=1e-4)
        # 64 cells hold three such sequences only because the prefix is stored once
        engine.clear()
        engine.decode(np.full(40, 5), np.arange(40), 0, False)
        engine.copy_sequence(0, 1)
        engine.decode([5] * 10, np.arange(40, 50), 1, False)
        engine.truncate_sequence(1, 45)
        engine.decode([5] * 15, np.arange(45, 60), 1, False)


def test_tokenizing_round_trips(story_file: Path) -> None:
    with Engine(story_file, EngineOptions(vocabulary_only=True)) as engine:
        assert engine.adds_bos and engine.n_vocab == 32000
        text = "Grüße, 世界! 🦙  two  spaces\n\ttab"
        tokens = engine.tokenize(text, add_special=False)
        assert engine.bos not in tokens
        assert engine.tokenize(text).tolist() == [engine.bos, *tokens]
        assert engine.detokenize(tokens).lstrip() == text
        assert b"".join(engine.token_bytes(int(t)) for t in tokens).decode().lstrip() == text
        assert engine.tokenize("</s>", add_special=False).tolist() != [engine.eos]
        assert engine.tokenize("</s>", add_special=False, parse_special=True).tolist() == [engine.eos]
        assert "</s>" in engine.detokenize([engine.eos], special=True)
        assert engine.tokenize("", add_special=False).tolist() == []
        assert len(engine.vocabulary_digest()) == 64


def test_greedy_generation_takes_the_largest_logit(story_file: Path) -> None:
    with Engine(story_file, EXACT) as engine:
        prompt = engine.tokenize("Once upon a time")
        generated = list(engine.generate(prompt, 12))
        assert len(generated) == 12
        tokens = np.concatenate([prompt, generated])
        (slab,) = engine.logits(tokens, first=len(prompt) - 1)
        assert slab.logits.argmax(axis=-1)[:-1].tolist() == generated
        text = "".join(engine.generate_text("Once upon a time", 12))
        assert engine.detokenize(tokens[1:]).strip() == "Once upon a time" + text


def test_sampling_is_repeatable(story_file: Path) -> None:
    with Engine(story_file, EXACT) as engine:
        one, again, other = (
            "".join(engine.generate_text("One day", 20, temperature=1.0, seed=seed)) for seed in (1, 1, 2)
        )
    assert one == again != other


def test_is_silent_and_gives_the_log_back(
    story_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lib = load_llama_cpp()
    lines: list[bytes] = []
    own = lib.llama_log_callback(lambda level, text, data: lines.append(text))
    lib.llama_log_set(own, ctypes.c_void_p(0))
    with Engine(story_file, EngineOptions(n_ctx=64, n_threads=1)) as engine:
        list(engine.logits([1, 2, 3]))
    with pytest.raises(EngineError):
        Engine(of_no_architecture(tmp_path))
    assert capfd.readouterr() == ("", "")
    assert lines == []
    lib.llama_model_load_from_file(b"/no/such/file", lib.llama_model_default_params())
    assert lines


def of_no_architecture(folder: Path) -> Path:
    """A sound GGUF file that llama.cpp cannot load."""
    return one_tensor(folder / "unheard-of.gguf", "unheard-of", "a.weight")


def text_file(folder: Path) -> Path:
    path = folder / "notes.gguf"
    path.write_text("These are only notes.")
    return path


def test_refuses_what_is_not_a_model(tmp_path: Path, story_file: Path) -> None:
    with pytest.raises(EngineError, match=r"gone\.gguf: no such file"):
        Engine(tmp_path / "gone.gguf")
    with pytest.raises(GGUFError, match=r"notes\.gguf: is not GGUF: it begins with b'Thes'"):
        Engine(text_file(tmp_path))
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(story_file.read_bytes()[:-100_000])
    with pytest.raises(GGUFError, match=r"truncated\.gguf: is truncated"):
        Engine(truncated)


def test_names_the_command_for_a_split_file_and_an_unpatched_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # tensors that no library knows stand for sub-layers that an unpatched one does not know
    path = tmp_path / "split.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("splitquant.version", 1)
    for name in ("blk.0.attn_q.weight", "blk.0.attn_q.split1.weight"):
        writer.add_tensor(name, np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(engine_module, "is_patched", lambda _: False)
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    with pytest.raises(EngineError, match=r"has split tensors.*; run `gguf-splitquant build-runtime`$"):
        Engine(path)
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", "/opt/llama")
    with pytest.raises(EngineError, match=r"\(/opt/llama\).* and unset LLAMA_CPP_LIB_PATH$"):
        Engine(path)
    monkeypatch.setattr(engine_module, "is_patched", lambda _: True)
    with pytest.raises(EngineError, match=r"llama\.cpp cannot load it"):
        Engine(path)


def test_a_full_context_is_an_error_that_says_so(story_file: Path) -> None:
    with Engine(story_file, EngineOptions(n_ctx=32, n_threads=1)) as engine:
        size = engine.n_ctx
        with pytest.raises(EngineError, match=f"the context of {size} tokens is full; use a larger context"):
            list(engine.logits(np.full(size + 1, 5)))
        assert size == 256 and engine.n_batch == 32
        assert len(list(engine.logits(np.full(size, 5)))) == 8
        with pytest.raises(EngineError, match="the prompt has no tokens"):
            list(engine.generate([], 4))
        with pytest.raises(ValueError, match="33 tokens in a batch of at most 32"):
            engine.decode(np.zeros(33), np.arange(33), 0, False)
        # a token beyond the vocabulary
        with pytest.raises(EngineError, match="cannot decode"):
            engine.decode([32000], 0, 0, True)
    engine.close()


def test_a_context_that_llama_cpp_refuses(story_file: Path) -> None:
    # what llama.cpp refuses without taking memory first
    with pytest.raises(EngineError, match=r"cannot make a context of 64 tokens: n_batch and n_ubatch cannot"):
        Engine(story_file, EngineOptions(n_ctx=64, n_batch=0, n_ubatch=0))


def test_more_sequences_than_a_batch_holds_are_refused_before_llama_cpp_aborts() -> None:
    with pytest.raises(EngineError, match="64 sequences in batches of 32"):
        EngineOptions(n_batch=32, n_ubatch=32, n_sequences=64)
