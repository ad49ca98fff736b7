"""ONNX export: a graph written node by node, with integer weights and QuantizeLinear/DequantizeLinear in between.

Runtimes find an integer kernel where an operation stands between both, so quantizers work as early as is exact
(`research.deploy.placement`); none is added, since that would be another network than the trained one. Activation
codes are uint8, weights int8: the types of the fast kernels.

Codes narrower than 8 bits stay in int8/uint8 containers with a Clip on the codes (QCDQ), which every runtime of the
last years reads; the 4-bit types of opset 21 run, but on none of the runtimes tried faster than float. Opset 17 is
the least that has everything (per-axis DequantizeLinear 13, integer Clip 12, BatchNormalization 15).
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper
from torch import Tensor, nn

from research.deploy.deployed import deployed
from research.deploy.emitters import emit_node
from research.deploy.graph import INPUT, Graph, record_graph
from research.deploy.placement import place
from research.deploy.qdq import GraphBuilder
from research.runs.files import atomic_write_bytes

OPSET = 17
IR_VERSION = 8
OUTPUT = "output"


def export_onnx(net: nn.Module, example: Tensor, path: Path | str) -> onnx.ModelProto:
    """Write a network as ONNX; the batch dimension is free, the input is called ``input``, the result ``output``.

    Quantized weights are integer initializers; a batch-norm behind them goes into their scales, another one stays a
    node of its own, and layers without quantizers stay float. The file is checked by ONNX's own checker before it is
    written.

    Args:
        net: a finalised network (or a float one); it stays as it is.
        example: a batch of float inputs, on the device of ``net``; only its shape matters.
        path: the file.

    Raises:
        ValueError: a module or quantizer without an ONNX form, a tensor that no module made, or no right to write.
    """
    graph, builder = build_graph(net, example)
    model = helper.make_model(
        helper.make_graph(
            builder.nodes,
            type(net).__name__,
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", *graph.input_shape[1:]])],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", *graph.output_shape[1:]])],
            list(builder.constants.values()),
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="flatbit",
    )
    onnx.checker.check_model(model, full_check=True)
    atomic_write_bytes(Path(path), model.SerializeToString())
    return model


def build_graph(net: nn.Module, example: Tensor) -> tuple[Graph, GraphBuilder]:
    """The recorded network in deployed form and the nodes that stand for it, the last one called ``output``."""
    graph = record_graph(deployed(net), example)
    builder = GraphBuilder(place(graph))
    values = {INPUT: INPUT}
    for node in graph.nodes:
        values[node.name] = emit_node(builder, node, [values[name] for name in node.inputs])
    builder.node("Identity", [values[graph.output]], OUTPUT)
    builder.keep_what_leads_to(OUTPUT)
    return graph, builder
