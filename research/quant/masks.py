"""Which tensors a compiled forward pass keeps for the backward pass: no masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy


class KeepNoMasks(CustomPartitionerFn):
    """The compiler's own partition, but with the elementwise boolean tensors that backward needs computed anew there.

    The compiler would keep such a mask because it has a quarter of the bytes of the numbers that it compares. But its
    kernels for processors write booleans one by one: 14 ns an element where a float costs 0.5 (torch 2.13).
    """

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Forward and backward graph of a graph of both."""
        gm.graph = fx_graph_cse(gm.graph)  # a mask that both passes compute becomes one node
        mark_masks(gm.graph)
        return min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)

    def uuid(self) -> Any:
        """The key of this pass in the compiler's cache."""
        return get_hash_for_files((__file__,))


def mark_masks(graph: fx.Graph) -> None:
    """Mark the masks of a graph of both passes on which the backward pass depends."""
    backward: set[fx.Node] = set()
    for node in graph.nodes:
        if (node.op == "placeholder" and "tangents" in str(node.target)) or backward & set(node.all_input_nodes):
            backward.add(node)
    for node in reversed(graph.nodes):
        if node not in backward and _is_mask(node) and any(user in backward or _is_marked(user) for user in node.users):
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE


def _is_mask(node: fx.Node) -> bool:
    value = node.meta.get("val")
    elementwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return elementwise and isinstance(value, Tensor) and value.dtype == torch.bool and value.ndim > 0


def _is_marked(node: fx.Node) -> bool:
    return node.meta.get("recompute") == CheckpointPolicy.MUST_RECOMPUTE
