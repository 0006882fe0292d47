"""ONNX models, read by the package `onnx`: the tensors in them. Nothing of the graph is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from bnfreeze.checkpoints.limits import MAX_NAME_LENGTH, MAX_TENSORS, check_limit
from bnfreeze.checkpoints.modules import LayerSettings, Model, plain_number
from bnfreeze.checkpoints.pickled import Content
from bnfreeze.checkpoints.reading import OpenFile
from bnfreeze.checkpoints.source import Source
from bnfreeze.checkpoints.stored_tensor import (
    DescribedTensor,
    StoredTensor,
    numbered,
    packed_tensor,
)
from bnfreeze.errors import CorruptCheckpointError, UnsupportedFormatError, damaged

# What protobuf itself can hold; larger models keep their tensors in files beside.
_MOST_BYTES: Final = 2**31
# ONNX's numbers for dtypes.
_DTYPES: Final = numbered("float32 uint8 int8 uint16 int16 int32 int64", first=1) | numbered(
    "bool float16 float64 uint32 uint64 complex64 complex128 bfloat16", first=9
)
_EXTERNAL: Final = 1
_NORM: Final = "BatchNormalization"
# What a BatchNormalization node is given, after its input.
_PARTS: Final = ("weight", "bias", "running_mean", "running_var")
_UNREAD: Final = "compute their statistics, or lie in functions, and were not read."
_FOLDED: Final = (
    "There is no BatchNormalization node in the graph. Exporters fold batch norm into the "
    "convolution before it."
)


def read_onnx(file: OpenFile) -> Content:
    """The tensors by name, and for each BatchNormalization node a norm layer.

    A layer is named as its tensors are, or else as its node.

    Raises:
        UnsupportedFormatError: the package `onnx` is not installed.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise UnsupportedFormatError(
            "An ONNX model. To read it, install the package onnx: pip install 'bnfreeze[onnx]'."
        ) from None
    check_limit(file.source.size, _MOST_BYTES, "bytes of an ONNX model")
    try:
        model = onnx.ModelProto.FromString(file.source.read())
    except DecodeError:
        raise damaged("it begins as ONNX, and is none.") from None
    graphs = list(_with_subgraphs(model.graph))
    nodes = [node for graph in graphs for node in graph.node]
    # Protobuf gives bytes for a text that is no UTF-8.
    if any(type(text) is not str for graph in graphs for text in _texts(graph)):
        raise damaged("a name in it is no text.")
    stored = [proto for graph in graphs for proto in graph.initializer]
    for node in nodes:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.HasField("t") and node.output:
                attribute.t.name = node.output[0]
                stored.append(attribute.t)
    check_limit(len(stored), MAX_TENSORS, "tensors")
    tensors: dict[str, StoredTensor] = {}
    for proto in stored:
        check_limit(len(proto.name), MAX_NAME_LENGTH, "characters of a tensor's name")
        if proto.name not in tensors:
            tensors[proto.name] = _tensor(proto, file)
        elif len(graphs) == 1:
            raise CorruptCheckpointError(f"Ambiguous: {proto.name!r:.200} is there twice.")
        else:
            tensors[proto.name] = DescribedTensor("uint8", (0,), "several branches have the name")
    layers: dict[str, LayerSettings] = {}
    unread = sum(node.op_type == _NORM for one in model.functions for node in one.node)
    for name, node_name, parts, settings in _norm_layers(nodes, tensors):
        name = node_name if name in layers else name
        layers[name] = settings
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        unread += "running_mean" not in parts or "running_var" not in parts
    remarks: tuple[str, ...] = () if layers else (_FOLDED,)
    if unread:
        remarks = (f"{unread} of its {_NORM} nodes {_UNREAD}",)
    return Content(Model(tensors, layers), remarks=remarks)


def _with_subgraphs(graph: Any) -> Iterator[Any]:
    """The graph, and those of the branches and loops in it."""
    waiting = [graph]
    while waiting:
        one = waiting.pop()
        yield one
        attributes = (attribute for node in one.node for attribute in node.attribute)
        waiting += [attribute.g for attribute in attributes if attribute.HasField("g")]


def _texts(graph: Any) -> Iterator[object]:
    yield from (tensor.name for tensor in graph.initializer)
    for node in graph.node:
        yield from (node.name, node.op_type, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def _norm_layers(
    nodes: list[Any], tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, str, dict[str, StoredTensor], LayerSettings]]:
    """The name of each norm layer, that of its node, its tensors, and its settings."""
    same = {
        node.output[0]: node.input[0]
        for node in nodes
        if node.op_type == "Identity" and node.output and node.input
    }
    for number, node in enumerate(nodes):
        if node.op_type != _NORM or len(node.input) < 5:
            continue
        # An exporter writes equal tensors once.
        given = dict(zip(_PARTS, (same.get(name, name) for name in node.input[1:5]), strict=True))
        parts = {part: tensors[name] for part, name in given.items() if name in tensors}
        own = [name.rpartition(".")[0] for part, name in given.items() if name.endswith(f".{part}")]
        asked = [name for name in node.input[1:5] if name.endswith(".running_mean")]
        node_name = f"{node.name or _NORM}:{number}"
        name = asked[0].rpartition(".")[0] if asked else own[0] if own else node_name
        values = {attribute.name: attribute for attribute in node.attribute}
        # ONNX keeps this share of the old value; torch takes the rest from the new one.
        kept = values["momentum"].f if "momentum" in values else 0.9
        settings = LayerSettings(
            class_name=_NORM,
            eps=plain_number(values["epsilon"].f if "epsilon" in values else 1e-5),
            momentum=plain_number(round(1 - kept, 6)),
            training=bool(values["training_mode"].i) if "training_mode" in values else False,
            in_graph=True,
        )
        yield name, node_name, parts, settings


def _tensor(proto: Any, file: OpenFile) -> StoredTensor:
    dtype = _DTYPES.get(proto.data_type)
    if dtype is None:
        return DescribedTensor("uint8", (0,), "its elements are of a kind that torch has not")
    if proto.data_location == _EXTERNAL:
        data = _beside(proto, file)
    elif proto.HasField("raw_data"):
        data = Source.of(proto.raw_data)
    else:
        from onnx import numpy_helper

        try:
            data = Source.of(numpy_helper.to_array(proto).tobytes())
        except (ValueError, TypeError):
            raise damaged(f"{proto.name!r:.200} is no tensor.") from None
    return packed_tensor(dtype, tuple(proto.dims), data)


def _beside(proto: Any, file: OpenFile) -> Source:
    """The bytes of a tensor that lies in another file."""
    entries = {entry.key: entry.value for entry in proto.external_data}
    try:
        source = file.beside(entries.get("location", "")).source
        offset = int(entries.get("offset", "0"))
        return source.part(offset, int(entries.get("length", source.size - offset)))
    # Protobuf gives bytes for a text that is no UTF-8.
    except (TypeError, ValueError):
        raise damaged(f"{proto.name!r:.200} lies nowhere.") from None
