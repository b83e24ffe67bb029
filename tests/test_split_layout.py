"""The split layout, end to end: salient channels in types of their own, in the patched engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter, quants

from gguf_splitquant.calibration.imatrix import read_imatrix, write_moments
from gguf_splitquant.calibration.moments import Moments
from gguf_splitquant.convert import convert
from gguf_splitquant.evaluation.compare import compare
from gguf_splitquant.evaluation.contents import read_contents
from gguf_splitquant.evaluation.text import read_text
from gguf_splitquant.planning.orders import channels_of
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.sources.model import SourceModel
from tests.gguf_files import FLOAT

pytestmark = pytest.mark.engine

SPLIT = Recipe(layout="split", target_bpw=4.5)


@pytest.fixture(scope="module")
def files(
    stories: SourceModel, stories_moments: Moments, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("split")
    made = {name: folder / f"{name}.gguf" for name in ("float", "split", "stock", "one")}
    convert(stories, made["float"], FLOAT)
    convert(stories, made["split"], SPLIT, statistics=stories_moments)
    convert(stories, made["stock"], Recipe(layout="stock", target_bpw=4.5), statistics=stories_moments)
    convert(stories, made["one"], Recipe(layout="stock", qtype="IQ4_NL"), statistics=stories_moments)
    return made


def divergence(files: dict[str, Path], name: str) -> float:
    return compare(files["float"], files[name], read_text(None), limit_tokens=1024).divergence.kld_mean


def test_planning_and_splitting_each_lower_the_divergence_at_the_same_size(files: dict[str, Path]) -> None:
    sizes = {name: read_contents(files[name]).linear_bpw for name in ("split", "stock", "one")}
    assert sizes["one"] == 4.5
    assert 0.995 * 4.5 <= sizes["split"] <= 4.5 and 0.995 * 4.5 <= sizes["stock"] <= 4.5
    klds = {name: divergence(files, name) for name in sizes}
    assert klds["split"] < klds["stock"] < klds["one"]


def test_clusters_partition_the_weight_and_orders_are_shared(files: dict[str, Path]) -> None:
    reader = GGUFReader(files["split"])
    tensors = {t.name: t for t in reader.tensors}
    weights = reader.fields["splitquant.order.weights"].contents()
    orders = reader.fields["splitquant.order.tensors"].contents()
    assert len(weights) == len(orders) > 0
    for name, order in zip(weights, orders, strict=True):
        stem = name.removesuffix(".weight")
        clusters = [tensors[name]]
        while f"{stem}.split{len(clusters)}.weight" in tensors:
            clusters.append(tensors[f"{stem}.split{len(clusters)}.weight"])
        assert len(clusters) > 1
        widths = [int(c.shape[0]) for c in clusters]
        channels = channels_of(tensors[order].data, tensors[order].tensor_type, sum(widths))
        assert channels is not None and sorted(channels) == list(range(sum(widths)))
    assert len(set(orders)) < len(orders)


def test_the_engine_computes_what_the_file_says(
    stories: SourceModel, files: dict[str, Path], tmp_path: Path
) -> None:
    """The clusters put back together as a plain F32 file: only activations are rounded differently."""
    reader = GGUFReader(files["split"])
    tensors = {t.name: t for t in reader.tensors}
    pairs = (reader.fields[f"splitquant.order.{k}"].contents() for k in ("weights", "tensors"))
    order_of = dict(zip(*pairs, strict=True))
    writer = GGUFWriter(tmp_path / "whole.gguf", stories.architecture)
    for key, value in stories.metadata.items():
        if key != "general.architecture":
            writer.kv_data[0][key] = value
    for source in stories.tensors:
        parts, index = [tensors[source.name]], 1
        while (name := f"{source.name.removesuffix('.weight')}.split{index}.weight") in tensors:
            parts.append(tensors[name])
            index += 1
        values = np.concatenate([quants.dequantize(p.data, p.tensor_type) for p in parts], axis=-1)
        if source.name in order_of:
            whole = np.empty_like(values)
            order = tensors[order_of[source.name]]
            whole[:, channels_of(order.data, order.tensor_type, values.shape[1])] = values
            values = whole
        writer.add_tensor(source.name, values.reshape(source.shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = compare(tmp_path / "whole.gguf", files["split"], read_text(None), limit_tokens=512).divergence
    # measured 0.003: Q8 activations, as an unsplit quantized file shows
    assert found.kld_mean < 0.01 < divergence(files, "split")


def test_an_imatrix_of_the_same_text_is_better_than_none_and_worse_than_feedback(
    stories: SourceModel, stories_moments: Moments, files: dict[str, Path], tmp_path: Path
) -> None:
    write_moments(tmp_path / "own.gguf", stories_moments)
    importance = read_imatrix(tmp_path / "own.gguf")
    assert importance.input_of("blk.1.attn_v.weight") == importance.input_of("blk.1.attn_q.weight")
    made = {**files, "imatrix": tmp_path / "imatrix.gguf", "none": tmp_path / "none.gguf"}
    one = Recipe(layout="stock", qtype="IQ4_NL")
    convert(stories, made["imatrix"], one, statistics=importance)
    convert(stories, made["none"], one)
    assert divergence(made, "one") < divergence(made, "imatrix") < divergence(made, "none")
