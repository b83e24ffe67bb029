"""Writes the checkpoints of cases.py with transformers, and converts them with llama.cpp's own converter.

A process of its own, for two reasons: the converter brings its own gguf-py, and importing torch once is slow
enough.

    python -m tests.sources.official_run CONVERT_HF_TO_GGUF.PY FOLDER [NAME=EXISTING_CHECKPOINT ...]
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.runtime.logits_process import DECODED, PROMPT
from tests.sources.cases import SIZES, Case
from tests.sources.family_cases import ALL_CASES

TEXT = ["the quick brown fox jumps over the lazy dog, 1234 times; it's what they've done", "hello world"] * 20
# <|endoftext|>: where it is missing, transformers' Qwen2 class invents it, with an id of its own
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|endoftext|>"]


def write_checkpoint(case: Case, folder: Path) -> None:
    """Random weights, a trained tokenizer, the other files."""
    import torch
    import transformers

    torch.manual_seed(len(folder.name))
    model_class = getattr(transformers, case.architecture)
    fields = {**SIZES, **case.config}
    dropped = {name for name in SIZES if fields[name] is None}
    config = model_class.config_class(**{name: fields[name] for name in fields.keys() - dropped})
    model = model_class(config)
    for name, parameter in model.named_parameters():
        if case.std:
            torch.nn.init.normal_(parameter, std=case.std)
        elif parameter.ndim == 1 or name.endswith("A_log"):
            parameter.data += 0.1 * torch.randn(parameter.shape)
        else:
            torch.nn.init.normal_(parameter, std=case.gain * parameter.shape[-1] ** -0.5)
    if case.logits:
        tokens = torch.tensor([[*PROMPT, *DECODED]])
        with torch.no_grad():
            logits = model.eval()(tokens, use_cache=False).logits[0]
        np.save(folder.with_name(f"{folder.name}.logits.npy"), logits.numpy())
    model.to(getattr(torch, case.dtype)).save_pretrained(folder, max_shard_size=case.shard_size)
    if case.stored:
        restore(folder / "model.safetensors", {"fused": fused, "bare": bare}[case.stored])
    edited = json.loads((folder / "config.json").read_text())
    edited.update(case.config_edits)
    edited = {
        name: value for name, value in edited.items() if name not in case.config_edits or value is not None
    }
    (folder / "config.json").write_text(json.dumps(edited))
    {"bpe": write_bpe, "sentencepiece": write_sentencepiece, "llama_hf": write_llama_hf}[case.tokenizer](
        case, folder
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **case.tokenizer_config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, text in case.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def restore(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write the tensors of a file in another form."""
    from safetensors.torch import load_file, save_file

    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)


def fused(tensors: dict[str, Any]) -> dict[str, Any]:
    """The experts of a layer as two tensors."""
    import torch

    made = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in {name.split(".mlp.")[0] for name in tensors if ".experts." in name}:
        n_experts = 1 + max(int(n.split(".")[5]) for n in tensors if n.startswith(f"{layer}.mlp.experts."))

        def stack(matrix: str, layer: str = layer, n_experts: int = n_experts) -> Any:
            names = [f"{layer}.mlp.experts.{expert}.{matrix}.weight" for expert in range(n_experts)]
            return torch.stack([tensors[name] for name in names])

        made[f"{layer}.mlp.experts.gate_up_proj"] = torch.cat([stack("gate_proj"), stack("up_proj")], dim=1)
        made[f"{layer}.mlp.experts.down_proj"] = stack("down_proj")
    return made


def bare(tensors: dict[str, Any]) -> dict[str, Any]:
    """GPT-2 without its head's prefix."""
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def write_bpe(case: Case, folder: Path) -> None:
    """Byte-level BPE of 300 tokens, with added tokens beyond them and a gap up to the vocabulary's size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=case.pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet))
    )
    tokenizer.add_tokens(
        [AddedToken("<|tool|>", normalized=False), AddedToken("plain added", normalized=True)]
    )
    tokenizer.add_tokens([AddedToken("with\u2581mark", normalized=False)])
    level = processors.ByteLevel(trim_offsets=False)
    if case.post_processor == "template":
        template = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
        )
        tokenizer.post_processor = processors.Sequence([level, template])
    elif case.post_processor == "byte_level":
        tokenizer.post_processor = level
    elif case.post_processor == "roberta":
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    tokenizer.save(str(folder / "tokenizer.json"))


def write_sentencepiece(_case: Case, folder: Path) -> None:
    """A SentencePiece BPE model of 300 pieces with byte fallback."""
    import sentencepiece

    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT),
            model_writer=file,
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            control_symbols=["<ctl>"],
            user_defined_symbols=["<user>"],
            minloglevel=2,
        )


def write_llama_hf(_case: Case, folder: Path) -> None:
    """A SentencePiece model as tokenizer.json: byte tokens, byte fallback."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "a",
        "b",
        "ab",
        "c",
    ]
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[("a", "b")],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<0xFFF>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_with_tokenizer_of(source: Path, folder: Path) -> None:
    """A tiny model of a real checkpoint's architecture, with its tokenizer and its vocabulary's size."""
    real = json.loads((source / "config.json").read_text())
    sizes = {"vocab_size": real["vocab_size"], "hidden_size": 8, "head_dim": 8}
    case = Case(real["architectures"][0], "bfloat16", "bpe", config=sizes)
    write_checkpoint(case, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


def main(converter: Path, folder: Path, *existing: str) -> None:
    """Write and convert all: FOLDER/NAME is the checkpoint, FOLDER/NAME.OUTTYPE.gguf the file."""
    sys.path.insert(0, str(converter.parent))
    # first on the path before anything imports gguf: the converter's own
    sys.path.insert(0, str(converter.parent / "gguf-py"))
    import convert_hf_to_gguf
    from conversion.base import ModelBase, TextModel

    detect, load = TextModel.get_vocab_base_pre, ModelBase.load_hparams

    def load_raw(source: Path, _is_mistral_format: bool) -> Any:
        return json.loads((source / "config.json").read_text())

    def convert(name: str, case: Case) -> None:
        pre = case.pre
        TextModel.get_vocab_base_pre = (lambda _self, _tokenizer: pre) if pre else detect
        ModelBase.load_hparams = staticmethod(load_raw if case.raw_config else load)
        for outtype in case.outtypes:
            out = folder / f"{name}.{outtype}.gguf"
            sys.argv = [
                "convert_hf_to_gguf.py",
                str(folder / name),
                "--outtype",
                outtype,
                "--outfile",
                str(out),
            ]
            convert_hf_to_gguf.main()

    for name, case in ALL_CASES.items():
        write_checkpoint(case, folder / name)
        if not case.no_official:
            convert(name, case)
    for argument in existing:
        name, _, source = argument.partition("=")
        write_with_tokenizer_of(Path(source), folder / name)
        convert(name, Case("", "", "", outtypes=("bf16",)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
