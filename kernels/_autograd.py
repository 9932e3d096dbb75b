"""Gradients of the registered operators, at little cost to the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def register_gradient(
    name: str, forward: Callable, backward: Callable, inputs: int, differentiable: int = 1
) -> Callable:
    """Make `zoo::{name}_backward` the gradient of `zoo::{name}`.

    What `torch.library.register_autograd` does, without its share of the time of a small call, which is half. What is
    returned calls the operator without the dispatcher, another third, unless something has to see that.

    Args:
        name: That of the operator: `name(*inputs, *options)` returns a tuple of tensors, and `name_backward(*grads,
            *inputs, *outputs, *options)` the gradients of the inputs. An input may be None, and its gradient is not
            looked at then.
        forward: What runs the operator.
        backward: What runs its gradient.
        inputs: How many of the arguments are inputs: tensors, the first always present, or None.
        differentiable: How many of the outputs have a gradient, the first of them always, the others perhaps None.

    Returns:
        A function of all arguments of the operator, those with defaults too.
    """

    def below_autograd(*arguments):
        if not watched(arguments[0]):  # the dispatcher takes longer than a small map
            return forward(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.zoo, name)(*arguments)

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            outputs = below_autograd(*arguments)
            ctx.save_for_backward(*arguments[:inputs], *outputs)
            ctx.options = arguments[inputs:]
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*outputs[differentiable:])
            return outputs

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_out, *grads):
            saved = ctx.saved_tensors
            if grad_out is None:
                grad_out = torch.zeros_like(saved[inputs])
            run = getattr(torch.ops.zoo, f"{name}_backward") if watched(grad_out) else backward
            found = run(grad_out, *grads[: differentiable - 1], *saved, *ctx.options)
            found = (None if x is None else grad for x, grad in zip(saved[:inputs], found))
            return *found, *(None for _ in ctx.options)

    @torch.library.impl(f"zoo::{name}", "Autograd")
    def autograd(*arguments):
        return Operator.apply(*arguments) if needs_grad(*arguments[:inputs]) else below_autograd(*arguments)

    # `Function.apply` but for what it does for transforms, which `watched` tells of.
    apply = super(torch.autograd.Function, Operator).apply

    registered = getattr(torch.ops.zoo, name)

    def call(*arguments):
        operator = getattr(torch.ops.zoo, name)  # `zoo.lowering` puts others in its place
        if operator is not registered or not is_eager(*arguments[:inputs]):
            return operator(*arguments)
        return apply(*arguments) if needs_grad(*arguments[:inputs]) else forward(*arguments)

    return call


_KINDS = frozenset({Tensor, torch.nn.Parameter, type(None)})


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether what is computed from these is to have a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether calls on these run as they are written: nothing compiles, traces or watches them."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or watched(*tensors))


def watched(*tensors: Tensor | None) -> bool:
    """Whether something has to see the operators that run on these: a mode, a transform, a kind of tensor."""
    return (
        any(type(x) not in _KINDS or (x is not None and x.is_neg()) for x in tensors)
        or tensors[0].is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
