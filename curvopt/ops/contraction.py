"""Any product of one parameter with data, by the letters of its einsum."""

from __future__ import annotations

import math

from torch import Size, Tensor

from curvopt.axes.layout import Layout
from curvopt.errors import Uncovered
from curvopt.ops.use import UseView
from curvopt.structures import Outer, Permuted, Structure


def contraction(
    use: UseView, out: str, data: Tensor, data_letters: str, shape: Size, letters: str
) -> Structure:
    """Structure of the parameter in ``out = einsum(data, parameter)``.

    Each letter of the parameter is an output axis O (in ``out``), an input axis I (in the data), or
    a group axis G (in both); the letters that output and data share beside it are tokens T.

    Args:
        use: cotangent and sample axis.
        out: letters of the output.
        data: the other operand.
        data_letters: its letters.
        shape: the parameter's shape.
        letters: its letters.
    """
    cotangent, data = use.raw, data.to(use.dtype)
    layout = use.layout
    if layout.kind == "gather" and layout.axes > 1:
        raise use.on_samples(shape)
    if layout.n == 1:  # the whole batch is one sample: every axis is a token's
        cotangent, data = cotangent.unsqueeze(1), data.unsqueeze(0)
        out, data_letters, layout = "*" + out, "*" + data_letters, Layout("time", 1, 1)
        sample = "*"
    else:
        sample = out[1 if layout.kind == "time" else 0]
    sizes = dict(zip(out, cotangent.shape[1:], strict=True))
    # Axes of size 1 that were broadcast are no axes of that operand.
    data, data_letters = _squeeze(data, data_letters, sizes)
    kept = [i for i, c in enumerate(letters) if shape[i] != 1 or sizes.get(c, 1) == 1]
    inner_letters = "".join(letters[i] for i in kept)
    inner_shape = [shape[i] for i in kept]
    if sample in inner_letters or sample not in data_letters:
        raise Uncovered(f"{use.op} has its samples on an axis of a parameter {list(shape)}")

    axis = out.index(sample) + 1
    cotangent, data = cotangent.movedim(axis, 1), data.movedim(data_letters.index(sample), 0)
    out, data_letters = out.replace(sample, ""), data_letters.replace(sample, "")
    if layout.kind != "time":
        cotangent, data = layout.split(cotangent, 1), layout.split(data)
        out, data_letters = "_" + out, "_" + data_letters
    alone = [i + 1 for i, c in enumerate(data_letters) if c not in out and c not in inner_letters]
    if alone:
        data = data.sum(alone)
        data_letters = "".join(c for c in data_letters if c in out or c in inner_letters)

    groups = "".join(c for c in inner_letters if c in out and c in data_letters)
    outputs = "".join(c for c in inner_letters if c in out and c not in data_letters)
    inputs = "".join(c for c in inner_letters if c not in out and c in data_letters)
    tokens = "".join(c for c in out if c not in inner_letters)
    left = _arrange(cotangent, out, 2, groups, tokens, outputs)
    right = _arrange(data, data_letters, 1, groups, tokens, inputs)

    order = groups + outputs + inputs
    if inner_letters == groups + inputs + outputs:
        return Outer(left, right, shape, transposed=True)
    if inner_letters == order:
        return Outer(left, right, shape)
    ordered = Size(inner_shape[inner_letters.index(c)] for c in order)
    return Permuted(Outer(left, right, ordered), [order.index(c) for c in inner_letters], shape)


def _squeeze(tensor: Tensor, letters: str, sizes: dict[str, int]) -> tuple[Tensor, str]:
    gone = [i for i, c in enumerate(letters) if tensor.shape[i] == 1 and sizes.get(c, 1) != 1]
    letters = "".join(c for i, c in enumerate(letters) if i not in gone)
    return tensor.squeeze(gone) if gone else tensor, letters


def _arrange(tensor: Tensor, letters: str, lead: int, *parts: str) -> Tensor:
    """Axes in the order of the parts, each part flattened to one axis."""
    sizes = dict(zip(letters, tensor.shape[lead:], strict=True))
    order = [lead + letters.index(c) for part in parts for c in part]
    tensor = tensor.permute(*range(lead), *order)
    return tensor.reshape(
        *tensor.shape[:lead], *(math.prod(sizes[c] for c in part) for part in parts)
    )
