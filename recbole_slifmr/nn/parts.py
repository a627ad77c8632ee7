"""A loss over a large batch, part by part, free of RecBole.

Every part is differentiated as soon as it is computed, and only the sum of the gradients is kept: memory follows the
size of a part, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Terms = Callable[[list[Tensor], Any], Tensor]


def sum_over_parts(
    terms: Terms, parts: Sequence[Any], inputs: Sequence[Tensor], parameters: Sequence[Tensor]
) -> Tensor:
    """Return the terms of a loss, summed over the parts of a batch, ``[T]``.

    The gradient is that of the *sum* of the terms, each of which carries an equal share of it: only the sum of what is
    returned may be differentiated.

    Args:
        terms: takes stand-ins for ``inputs`` and a part; returns the part's terms, ``[T]``.
        parts: of the batch.
        inputs: tensors that all parts are computed from; they may have been computed from others.
        parameters: what else the terms depend on; leaves of the graph.
    """
    if not torch.is_grad_enabled():
        return torch.stack([terms(list(inputs), part) for part in parts]).sum(0)
    total, values = _SumOverParts.apply(terms, parts, len(inputs), *inputs, *parameters)
    return values + (total - total.detach()) / len(values)


class _SumOverParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: Terms, parts: Sequence[Any], n_inputs: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors[:n_inputs]]
        wanted = [tensor for tensor in [*inputs, *tensors[n_inputs:]] if tensor.requires_grad]
        sums: list[Tensor | None] = [None] * len(wanted)
        values = []
        for part in parts:
            with torch.enable_grad():
                found = terms(inputs, part)
                gradients = torch.autograd.grad(found.sum(), wanted, allow_unused=True)
            values.append(found.detach())
            for k, gradient in enumerate(gradients):
                before = sums[k]
                if before is None:  # a gradient may be shared with another: only a copy may be added to
                    sums[k] = None if gradient is None else gradient.clone(memory_format=torch.contiguous_format)
                elif gradient is not None:
                    before.add_(gradient)
        ctx.gradients = sums
        value = torch.stack(values).sum(0)
        ctx.mark_non_differentiable(value)
        return value.sum(), value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gradients = iter(ctx.gradients)
        found = [next(gradients) if needed else None for needed in ctx.needs_input_grad[3:]]
        return (None, None, None, *(None if gradient is None else gradient * grads[0] for gradient in found))
