from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from research.deploy.graph import record_graph
from research.models.blocks import Add


class Residual(nn.Module):
    """A residual layer; `bare` leaves the add to an operator."""

    def __init__(self, bare: bool = False, twice: bool = False, bare_output: bool = False) -> None:
        super().__init__()
        self.conv, self.relu, self.add = nn.Conv2d(3, 3, 1), nn.ReLU(), Add()
        self.bare, self.twice, self.bare_output = bare, twice, bare_output

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = y + x if self.bare else self.add(y, b=x)
        y = self.relu(self.relu(y) if self.twice else y)
        return y * 2 if self.bare_output else y


def test_nodes_are_the_calls_in_order_with_their_inputs() -> None:
    graph = record_graph(Residual(), torch.randn(2, 3, 4, 4))
    calls = [(node.name, node.inputs) for node in graph.nodes]
    assert calls == [("conv", ("input",)), ("add", ("conv", "input")), ("relu", ("add",))]
    assert (graph.output, graph.input_shape, graph.output_shape) == ("relu", (2, 3, 4, 4), (2, 3, 4, 4))


def test_quantized_layers_are_leaves(quantized: Callable[..., tuple[nn.Module, dict[str, Any], Tensor]]) -> None:
    outputs = [{"match": r"layer1\.0\.add", "quantizer": {"name": "minmax", "bits": 8, "init": "minmax"}}]
    lsq = {"name": "lsq", "bits": 4}
    net, _, x = quantized("resnet8", {"weight": lsq, "input": lsq, "outputs": outputs})
    graph = record_graph(net, x)
    names = [node.name for node in graph.nodes]
    assert names[0] == "conv1" and graph.output == names[-1] == "fc"
    assert "layer1.0.add" in names
    assert not [name for name in names if "quantizer" in name or "module" in name]
    for index, node in enumerate(graph.nodes):
        assert set(node.inputs) <= {"input", *names[:index]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bare": True}, "relu reads a tensor that no module made"),
        ({"bare_output": True}, "the network's output reads a tensor that no module made"),
        ({"twice": True}, "relu is called twice"),
    ],
)
def test_operations_that_no_module_names_are_refused(options: dict[str, bool], message: str) -> None:
    net = Residual(**options)
    with pytest.raises(ValueError, match=message):
        record_graph(net, torch.randn(2, 3, 4, 4))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
