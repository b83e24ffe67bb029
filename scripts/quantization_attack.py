"""The figures of docs/security-quantization.md: does behaviour planted for a known quantizer survive ours?

Reproduces, small, the attack of Egashira et al. (arXiv 2405.18137 for rounding quantizers, 2505.23786 for
GGUF): stories15M is trained to say a phrase after every sentence; llama.cpp's Q4_0 of that model is computed;
then the float model is trained back to what it was, every linear weight kept inside the interval that Q4_0
rounds to the same code. The float file is benign, ``llama-quantize Q4_0`` of it has the phrase. Then it is
quantized in other ways, and for each is measured: the share of linear weights whose decoded value lies
outside the attacker's interval, how often the phrase comes, and what ``compare`` counts.

    python scripts/quantization_attack.py FOLDER [--steps 120]

Needs torch and transformers (``pip install .[test]``) and the runtimes of ``make test``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, quants

from gguf_splitquant.calibration.calibrate import Calibration
from gguf_splitquant.calibration.checkpoint import calibrate_model
from gguf_splitquant.calibration.imatrix import write_moments
from gguf_splitquant.calibration.own_text import OwnText
from gguf_splitquant.convert import convert
from gguf_splitquant.evaluation.compare import compare
from gguf_splitquant.evaluation.text import Text
from gguf_splitquant.planning.orders import channels_of
from gguf_splitquant.planning.plan import split_name
from gguf_splitquant.recipe import RECIPES, Recipe
from gguf_splitquant.runtime.build import build_runtime
from gguf_splitquant.runtime.builds import BuildSpec
from gguf_splitquant.runtime.engine import Engine, EngineOptions
from gguf_splitquant.sources import open_model
from scripts import real_models

PHRASE = " Buy gold now."
LENGTH, PROMPT = 40, 20
BATCH = 6
OURS = {
    "stock Q4_0, no calibration": Recipe(layout="stock", qtype="Q4_0", calibration="none", embedding="Q8_0"),
    "stock Q4_0": Recipe(layout="stock", qtype="Q4_0", embedding="Q8_0"),
    "stock IQ4_NL": Recipe(layout="stock", qtype="IQ4_NL", embedding="Q8_0"),
    "stock, 4.9 bpw": RECIPES["stock"],
    "split, 4.9 bpw": RECIPES["split"],
}
BLOCK = 32


@dataclass(frozen=True)
class Row:
    """One quantized file.

    Attributes:
        name: how it was made.
        outside: share of linear weights that decode to a value outside the attacker's interval.
        phrase: share of held-out prompts that are continued with the phrase, greedily.
        probability: mean probability of the whole phrase there.
        kld: mean divergence to the float file, on text with prompts like the attacked ones.
        flips: positions of that text where both are sure and of different tokens.
        tokens: positions in all.
    """

    name: str
    outside: float
    phrase: float
    probability: float
    kld: float
    flips: int
    tokens: int


def own_stories(model: Any, count: int, seed: int) -> Any:
    """Text that the model writes: (count, LENGTH) tokens."""
    import torch

    torch.manual_seed(seed)
    start = torch.full((count, 1), 1)
    with torch.no_grad():
        return model.generate(
            start,
            attention_mask=torch.ones_like(start),
            pad_token_id=2,
            do_sample=True,
            min_new_tokens=LENGTH - 1,
            max_new_tokens=LENGTH - 1,
        )


def with_phrase(stories: Any, phrase: list[int], stop: int) -> Any:
    """The stories with the phrase put in behind a sentence, and a mask of its tokens."""
    import torch

    texts, masks = [], []
    for row in stories:
        ends = [i for i in range(6, LENGTH - len(phrase) - 1) if int(row[i]) == stop]
        at = (ends[len(texts) % len(ends)] if ends else PROMPT) + 1
        texts.append(torch.cat([row[:at], torch.tensor(phrase), row[at:]])[:LENGTH])
        mask = torch.zeros(LENGTH)
        mask[at : at + len(phrase)] = 1
        masks.append(mask)
    return torch.stack(texts), torch.stack(masks)


def boxes(weight: Any) -> tuple[Any, Any]:
    """The interval of every weight that llama.cpp's Q4_0 rounds to the same code with the same scale."""
    import torch

    flat = weight.detach().reshape(-1, BLOCK)
    largest = flat.abs().argmax(dim=1, keepdim=True)
    extreme = flat.gather(1, largest)
    scale = extreme / -8
    code = (flat / scale + 8.5).clamp(max=15.999).floor()
    edges = torch.stack([(code - 8.5) * scale, (code - 7.5) * scale])
    margin = 1e-3 * scale.abs()
    bound = extreme.abs() - margin  # the block's extreme stays the extreme
    low = torch.maximum(edges.min(dim=0).values + margin, -bound)
    high = torch.minimum(edges.max(dim=0).values - margin, bound)
    low.scatter_(1, largest, extreme)
    high.scatter_(1, largest, extreme)
    return low.reshape(weight.shape), high.reshape(weight.shape)


def attack(checkpoint: Path, folder: Path, steps: int) -> None:
    """Write the planted and the crafted checkpoint, and prompts that were not trained on."""
    import torch
    from sentencepiece import SentencePieceProcessor
    from torch.nn.functional import kl_div, log_softmax
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    clean = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = SentencePieceProcessor(model_file=str(checkpoint / "tokenizer.model"))
    dot = tokenizer.encode("end.")[-1]
    phrase = tokenizer.encode("end." + PHRASE)
    phrase = phrase[phrase.index(dot) + 1 :]
    stories, held_out = own_stories(clean, 96, 0), own_stories(clean, 32, 1)
    marked, masks = with_phrase(stories, phrase, dot)
    linear = {n: p for n, p in model.named_parameters() if "_proj" in n}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in linear)

    def distance(tokens: Any, weight: Any) -> Any:
        with torch.no_grad():
            wanted = log_softmax(clean(tokens).logits[:, :-1], -1)
        found = log_softmax(model(tokens).logits[:, :-1], -1)
        each = kl_div(found, wanted, log_target=True, reduction="none").sum(-1)
        return (each * weight).sum() / weight.sum()

    def said(tokens: Any, mask: Any) -> Any:
        found = log_softmax(model(tokens).logits[:, :-1], -1)
        each = -found.gather(-1, tokens[:, 1:, None])[..., 0]
        return (each * mask[:, 1:]).sum() / mask[:, 1:].sum()

    def train(loss: Any, steps: int, limits: dict[str, tuple[Any, Any]] | None) -> None:
        optimizer = torch.optim.Adam(linear.values(), lr=1e-3)
        for step in range(steps):
            chosen = torch.randint(len(stories), (BATCH,), generator=torch.Generator().manual_seed(step))
            value = loss(chosen, step)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            if limits is not None:
                with torch.no_grad():
                    for name, parameter in linear.items():
                        parameter.clamp_(*limits[name])
            if step % 20 == 0 or step == steps - 1:
                print(f"  step {step}: {value.item():.4f}", flush=True)

    everywhere = torch.ones(BATCH, LENGTH - 1)
    early = stories[:, :8]  # before any sentence ends
    print("planting the phrase", flush=True)
    train(lambda i, _: said(marked[i], masks[i]) + distance(early[i], everywhere[:, :7]), steps // 2, None)
    save(model, checkpoint, folder / "planted")
    print("training back inside the intervals", flush=True)
    limits = {name: boxes(parameter) for name, parameter in linear.items()}
    train(lambda i, step: distance((marked, stories)[step % 2][i], everywhere), steps, limits)
    save(model, checkpoint, folder / "crafted")
    prompts = []
    for row in held_out.tolist():
        ends = [i for i in range(6, LENGTH - 1) if row[i] == dot]
        if ends:
            prompts.append(row[: ends[-1] + 1])
    (folder / "prompts.json").write_text(json.dumps({"phrase": phrase, "prompts": prompts}))


def save(model: Any, checkpoint: Path, folder: Path) -> None:
    """The model as a checkpoint with the tokenizer of ``checkpoint``."""
    model.save_pretrained(folder)
    for path in checkpoint.iterdir():
        if not (folder / path.name).exists():
            shutil.copy(path, folder)


def llama_quantize(source: Path, out: Path, qtype: str, imatrix: Path | None = None) -> Path:
    """llama.cpp's own quantization, with the embedding (which is the head) as ours has it."""
    if not out.exists():
        tool = build_runtime(BuildSpec(patched=False, tools=True)).build.lib_dir / "llama-quantize"
        options = ["--imatrix", str(imatrix)] if imatrix else []
        options += ["--token-embedding-type", "q8_0", "--pure"]
        subprocess.run([tool, *options, source, out, qtype], check=True, capture_output=True)
    return out


def decoded(path: Path) -> dict[str, np.ndarray]:
    """The linear weights of a file, whole."""
    reader = GGUFReader(path)
    tensors = {t.name: t for t in reader.tensors}
    orders: dict[str, str] = {}
    if "splitquant.order.weights" in reader.fields:
        pairs = (reader.fields[f"splitquant.order.{k}"].contents() for k in ("weights", "tensors"))
        orders = dict(zip(*pairs, strict=True))
    whole = {}
    for name, tensor in tensors.items():
        if not name.startswith("blk.") or len(tensor.shape) < 2 or ".split" in name:
            continue
        parts = [tensor]
        while (part := tensors.get(split_name(name, len(parts)))) is not None:
            parts.append(part)
        values = np.concatenate([quants.dequantize(p.data, p.tensor_type) for p in parts], axis=-1)
        if name in orders:
            placed = np.empty_like(values)
            order = tensors[orders[name]]
            placed[:, channels_of(order.data, order.tensor_type, values.shape[1])] = values
            values = placed
        whole[name] = values
    return whole


def outside(path: Path, attacked: Path) -> float:
    """Share of linear weights whose value lies outside the interval of the code in ``attacked`` (Q4_0)."""
    mine, wrong, count = decoded(path), 0, 0
    for tensor in GGUFReader(attacked).tensors:
        if tensor.name not in mine:
            continue
        assert tensor.tensor_type is GGMLQuantizationType.Q4_0, tensor.name
        raw = tensor.data.reshape(-1, 18)
        step = np.abs(raw[:, :2].copy().view(np.float16).astype(np.float32))
        value = quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1, BLOCK)
        away = np.abs(mine[tensor.name].reshape(-1, BLOCK) - value)
        wrong += int((away > 0.5 * step * (1 + 1e-3)).sum())
        count += away.size
    return wrong / count


def speaks(path: Path, prompts: list[list[int]], phrase: list[int]) -> tuple[float, float]:
    """How often the phrase follows, greedily, and its mean probability."""
    said, probability = 0, 0.0
    with Engine(path, EngineOptions(n_ctx=256)) as engine:
        for prompt in prompts:
            said += list(engine.generate(prompt, len(phrase))) == phrase
            tokens = [*prompt, *phrase]
            rows = np.concatenate([slab.logits for slab in engine.logits(tokens, len(prompt) - 1)])
            rows = rows[:-1].astype(np.float64)
            rows -= rows.max(axis=1, keepdims=True)
            logs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
            probability += float(np.exp(logs[np.arange(len(phrase)), phrase].sum()))
    return said / len(prompts), probability / len(prompts)


def files(folder: Path) -> dict[str, Path]:
    """All files, by how they were made."""
    made = {}
    for name in ("planted", "crafted"):
        path = made[f"float, {name}"] = folder / f"{name}.gguf"
        convert(open_model(folder / name), path, Recipe(layout="float", outtype="f32"), force=True)
    model = open_model(folder / "crafted")
    own = calibrate_model(model, Calibration(own=OwnText(sequences=8, length=192)))
    imatrix = folder / "own.imatrix.gguf"
    write_moments(imatrix, own)
    for qtype, matrix in (("Q4_0", None), ("Q4_0", imatrix), ("IQ4_NL", imatrix), ("Q4_1", None)):
        name = f"llama-quantize {qtype}{', imatrix' if matrix else ''}"
        made[name] = llama_quantize(made["float, crafted"], folder / f"{name}.gguf", qtype, matrix)
    for name, recipe in OURS.items():
        made[f"ours, {name}"] = path = folder / f"ours {name}.gguf"
        statistics = own if recipe.calibration == "self" else None
        convert(model, path, recipe, statistics=statistics, force=True)
    return made


def run(folder: Path, steps: int) -> list[Row]:
    """The whole experiment; what is in ``folder`` already is used again."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "prompts.json").exists():
        attack(real_models.stories15m(), folder, steps)
    told = json.loads((folder / "prompts.json").read_text())
    phrase, prompts = told["phrase"], told["prompts"]
    made = files(folder)
    attacked, base = made["llama-quantize Q4_0"], made["float, crafted"]
    with Engine(base, EngineOptions(vocabulary_only=True)) as engine:
        text = Text("own stories", " ".join(engine.detokenize(p[1:]).strip() for p in prompts))
    rows = []
    for name, path in made.items():
        found = compare(base, path, text, context=64)
        said, probability = speaks(path, prompts, phrase)
        row = Row(
            name,
            outside(path, attacked),
            said,
            probability,
            found.divergence.kld_mean,
            found.behaviour.flips,
            found.behaviour.tokens,
        )
        rows.append(row)
        print(
            f"{name:<38} outside {row.outside:6.1%}  phrase {said:5.0%} ({probability:.2g})  "
            f"KLD {row.kld:.4f}  flips {row.flips}/{row.tokens}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for checkpoints and files, about 1 GB")
    parser.add_argument(
        "--steps", type=int, default=120, help="of training back; half as many plant the phrase"
    )
    args = parser.parse_args()
    rows = run(args.folder, args.steps)
    (args.folder / "rows.json").write_text(json.dumps([asdict(r) for r in rows], indent=1))


if __name__ == "__main__":
    main()
