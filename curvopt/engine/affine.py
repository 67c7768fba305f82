"""From which nodes of a graph the outputs are piecewise linear."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

# Graph nodes of functions that are piecewise linear in one argument, the others held.
PIECEWISE_LINEAR = frozenset(
    """
    Abs AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D Add Addbmm Addmm Alias AsStrided
    AvgPool2D AvgPool3D Baddbmm Bmm Cat Clamp ClampMax ClampMin Clone ConstantPadNd Convolution
    Copy Div Expand Flip Gather Hardtanh Index IndexSelect LeakyRelu Linear MaxPool2DWithIndices
    MaxPool3DWithIndices Maximum Mean Minimum Mm Mul Mv NativeDropout Neg Permute ReflectionPad1D
    ReflectionPad2D ReflectionPad3D Relu Repeat ReplicationPad1D ReplicationPad2D ReplicationPad3D
    ReshapeAlias Roll Select Slice Split SplitWithSizes Squeeze Stack Sub Sum T Threshold ToCopy
    Transpose Unbind UnsafeView Unsqueeze UpsampleNearest1D UpsampleNearest2D View Where
    """.split()
)
# Of these, the ones with several arguments whose product is taken.
PRODUCTS = frozenset("Addmm Addbmm Baddbmm Bmm Convolution Div Linear Mm Mul Mv".split())


def affine_edges(outputs: list[Tensor], nodes: list[Any]) -> set[Any]:
    """Those graph nodes from whose output the outputs are piecewise linear.

    Every node on the way must be piecewise linear, and a product must have one factor that does
    not depend on the data path.
    """
    order = _topological([output.grad_fn for output in outputs])
    data, clean = set(nodes), dict.fromkeys(order, True)
    for node in reversed(order):  # what a node consumes comes before it
        if any(following in data for following, _ in node.next_functions):
            data.add(node)
    for node in order:
        following = [n for n, _ in node.next_functions if n in data]
        name = type(node).__name__.split("Backward")[0]
        several = name in PRODUCTS and len(following) > 1
        divisor = name == "Div" and node.next_functions[1:] and node.next_functions[1][0] in data
        # A custom autograd.Function may have any name.
        linear = name in PIECEWISE_LINEAR and not isinstance(node, BackwardCFunction)
        if name == "NativeBatchNorm":
            linear = not node._saved_training
        if not (clean[node] and linear) or several or divisor:
            clean.update(dict.fromkeys(following, False))
    return {node for node in nodes if clean.get(node, False)}


def _topological(starts: list[Any]) -> list[Any]:
    """Nodes of a graph, consumers first."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack = [(node, False) for node in starts if node is not None]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(n, False) for n, _ in node.next_functions if n is not None]
    return order[::-1]
