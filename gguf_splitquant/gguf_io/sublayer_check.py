"""Whether the sub-layers of a file fit together: names, shapes, and the orders of channels.

llama.cpp (patched) refuses what it cannot run, by the architecture's shapes; here a file is refused by its
own word, before any library opens it: a number left out, a row too many, an order that is no permutation. The
format is in docs/format.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from gguf import GGMLQuantizationType

from ..bounded import open_regular
from ..errors import GGUFError
from ..planning.orders import ORDER_TYPES, channels_of
from .header import GGUFHeader, TensorEntry
from .metadata import FORMAT_VERSION, KEY_LAYOUT, KEY_ORDER_TENSORS, KEY_ORDER_WEIGHTS, KEY_VERSION

_EXTRA = re.compile(r"(.*)\.split([^.]*)\.(weight|bias)", re.DOTALL)
_NUMBER = re.compile(r"[1-9][0-9]{0,5}", re.ASCII)
_AGAIN = "make the file again"


def check_sublayers(header: GGUFHeader) -> None:
    """Check everything that a file says about its sub-layers; files without any pass.

    Args:
        header: of the file; of the data only the orders of channels are read.

    Raises:
        GGUFError: sub-layers or orders do not fit together, or are of a later version of the format.
    """
    tensors = {tensor.name: tensor for tensor in header.tensors}
    groups = _groups(header, tensors)
    orders = _orders(header)
    if not groups and not orders:
        _refuse_unused_orders(header, tensors, ())
        return
    version = header.metadata.get(KEY_VERSION, FORMAT_VERSION)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        cause = f"has version {str(version)[:40]} of the format, and 1 to {FORMAT_VERSION} are known"
        raise GGUFError(header.path, cause, "update gguf-splitquant")
    for name, group in groups.items():
        _check_shapes(header, name, group, ordered=name in orders)
    for weight, order in orders.items():
        _check_order(header, weight, order, orders, groups, tensors)
    _refuse_unused_orders(header, tensors, set(orders.values()))
    for order, weight in {order: weight for weight, order in orders.items()}.items():
        _check_permutation(tensors[order], _channels(groups[weight]))


def _groups(header: GGUFHeader, tensors: Mapping[str, TensorEntry]) -> dict[str, list[TensorEntry]]:
    """Weights that are split, each with its sub-layers in order, the first under the weight's own name."""
    extras: dict[str, dict[int, TensorEntry]] = {}
    for tensor in header.tensors:
        match = _EXTRA.fullmatch(tensor.name)
        if match is None:
            continue
        if _NUMBER.fullmatch(match[2]) is None or match[3] != "weight":
            raise _misfit(header, tensor.name, "is no name of a sub-layer")
        weight = f"{match[1]}.weight"
        if _EXTRA.fullmatch(weight):
            raise _misfit(header, tensor.name, "is a sub-layer of a sub-layer")
        if weight not in tensors:
            raise _misfit(header, tensor.name, f"is a sub-layer of {weight}, which is missing")
        extras.setdefault(weight, {})[int(match[2])] = tensor
    groups = {}
    for weight, parts in extras.items():
        for number in range(1, len(parts) + 1):
            if number not in parts:
                name = f"{weight.removesuffix('.weight')}.split{number}.weight"
                raise _misfit(header, name, f"is missing, of {len(parts) + 1} or more sub-layers of {weight}")
        groups[weight] = [tensors[weight], *(parts[number] for number in sorted(parts))]
    return groups


def _orders(header: GGUFHeader) -> dict[str, str]:
    """The order of each weight that has one."""
    weights, orders = (header.metadata.get(key) for key in (KEY_ORDER_WEIGHTS, KEY_ORDER_TENSORS))
    if weights is None and orders is None:
        return {}
    if not isinstance(weights, list) or not isinstance(orders, list):
        raise _misfit(header, KEY_ORDER_WEIGHTS, f"and {KEY_ORDER_TENSORS} are not two lists of names")
    if len(weights) != len(orders):
        raise _misfit(header, KEY_ORDER_WEIGHTS, f"names {len(weights)} weights, for {len(orders)} orders")
    found = dict(zip(weights, orders, strict=True))
    if len(found) != len(weights):
        raise _misfit(header, KEY_ORDER_WEIGHTS, "names a weight twice")
    return found


def _check_shapes(header: GGUFHeader, name: str, group: Sequence[TensorEntry], *, ordered: bool) -> None:
    first = group[0].shape
    said = header.metadata.get(KEY_LAYOUT)
    layout = said if isinstance(said, str) else ""
    alike = layout == "value"
    if layout == "stock":
        raise _misfit(header, name, "has sub-layers, in a file whose layout is 'stock'")
    for tensor in group:
        same = tensor.shape == first if alike else tensor.shape[:-1] == first[:-1]
        if not same or len(tensor.shape) != len(first):
            raise _misfit(header, tensor.name, f"has the shape {list(tensor.shape)}, beside {list(first)}")
        if 0 in tensor.shape:
            raise _misfit(header, tensor.name, "has no channels")
    by_channel = ordered or any(tensor.shape != first for tensor in group) or layout == "split"
    if by_channel and (len(first) < 2 or name == "token_embd.weight" or "norm" in name):
        raise _misfit(header, name, "is split by channel, and is no weight of a linear layer")


def _check_order(
    header: GGUFHeader,
    weight: str,
    order: str,
    orders: Mapping[str, str],
    groups: Mapping[str, Sequence[TensorEntry]],
    tensors: Mapping[str, TensorEntry],
) -> None:
    group, tensor = groups.get(weight), tensors.get(order)
    if weight not in tensors:
        raise _misfit(header, weight, "has a channel order, but is missing")
    if group is None:
        raise _misfit(header, weight, "has a channel order, but is not split")
    if tensor is None:
        raise _misfit(header, order, f"is missing, the channel order of {weight}")
    owner = f"{order.removesuffix('.order')}.weight"
    if not order.endswith(".order") or orders.get(owner) != order:
        raise _misfit(header, order, f"cannot be the channel order of {weight}: {owner} does not use it")
    channels = _channels(group)
    if owner in groups and _channels(groups[owner]) != channels:
        cause = f"is the channel order of {owner}, which reads another number of channels than {weight}"
        raise _misfit(header, order, cause)
    if tensor.qtype not in ORDER_TYPES:
        raise _misfit(header, order, f"is {tensor.qtype.name}: a channel order is I8 or I32")
    by_two = tensor.qtype is GGMLQuantizationType.I8 and channels % 2 == 0
    if tensor.shape != (channels,) and not (by_two and tensor.shape == (channels // 2,)):
        cause = f"has the shape {list(tensor.shape)}, and {weight} reads {channels} channels"
        raise _misfit(header, order, cause)


def _refuse_unused_orders(
    header: GGUFHeader, tensors: Mapping[str, TensorEntry], used: Sequence[str] | set[str]
) -> None:
    for name in tensors:
        if name.endswith(".order") and name not in used:
            raise _misfit(header, name, "is a channel order that no weight uses")


def _channels(group: Sequence[TensorEntry]) -> int:
    return sum(part.shape[-1] for part in group)


def _check_permutation(tensor: TensorEntry, channels: int) -> None:
    """Clusters always give one: of them nothing has to be read."""
    if tensor.qtype is GGMLQuantizationType.I8:
        return
    with open_regular(tensor.file) as file:
        file.seek(tensor.offset)
        stored = np.frombuffer(file.read(tensor.nbytes), "<i4")
    if channels_of(stored, tensor.qtype, channels) is None:
        cause = f"tensor {tensor.name} is not a permutation of 0 to {channels - 1}"
        raise GGUFError(tensor.file, cause, _AGAIN)


def _misfit(header: GGUFHeader, name: str, cause: str) -> GGUFError:
    return GGUFError(header.path, f"{name[:200]} {cause}", _AGAIN)
