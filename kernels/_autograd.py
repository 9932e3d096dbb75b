"""Gradients of the registered operators, at little cost to the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._functorch import TransformType, is_legacy_batchedtensor
from torch.autograd import forward_ad


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
        if not watched(*arguments[:inputs]):  # the dispatcher takes longer than a small map
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
        def backward(ctx, grad_out, *grads):
            saved = ctx.saved_tensors
            if grad_out is None:
                grad_out = torch.zeros_like(saved[inputs])
            arguments = grad_out, *grads[: differentiable - 1], *saved, *ctx.options
            found = Gradient.apply(*arguments) if torch.is_grad_enabled() else gradient(*arguments)
            found = (None if x is None else grad for x, grad in zip(saved[:inputs], found))
            return *found, *(None for _ in ctx.options)

    def gradient(*arguments):
        of_outputs = arguments[:differentiable]  # several at once with `is_grads_batched`
        seen = watched(*of_outputs) or any(x is not None and is_legacy_batchedtensor(x) for x in of_outputs)
        return (getattr(torch.ops.zoo, f"{name}_backward") if seen else backward)(*arguments)

    class Gradient(torch.autograd.Function):
        """A gradient that shall be differentiated. `once_differentiable` lets `torch.autograd.grad` pass it by."""

        @staticmethod
        def forward(ctx, *arguments):
            return tuple(gradient(*arguments))

        @staticmethod
        def backward(ctx, *_):
            raise NotImplementedError(f"{name} has gradients of first order; backend='reference' also has higher ones")

    @torch.library.impl(f"zoo::{name}", "Autograd")
    def autograd(*arguments):
        if transformed():
            raise NotImplementedError(
                f"{name} under torch.func or forward-mode AD needs backend='reference', which 'auto' is where "
                "nothing compiles"
            )
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


def differentiable_gradient(function: Callable, inputs: tuple[Tensor, ...], grad_out: Tensor) -> list[Tensor | None]:
    """Gradients of `function(*inputs)`, in torch's own operators, that can be differentiated again."""
    wanted = [x for x in inputs if x.requires_grad]
    with torch.enable_grad():
        grads = iter(torch.autograd.grad(function(*inputs), wanted, grad_out, create_graph=True))
    return [next(grads) if x.requires_grad else None for x in inputs]


def made_of_operators(grad_out: Tensor) -> bool:
    """Whether a gradient is made of operators: to be differentiated, or because it is several at once."""
    return torch.is_grad_enabled() or is_legacy_batchedtensor(grad_out)


_KINDS = frozenset({Tensor, torch.nn.Parameter, type(None)})


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether what is computed from these is to have a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether calls on these run as they are written: nothing compiles, traces or watches them."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or watched(*tensors))


_DIFFERENTIATE = frozenset({TransformType.Grad, TransformType.Jvp})


def transformed() -> bool:
    """Whether torch.func or forward-mode AD differentiates what runs, which takes operators of torch's own."""
    stack = torch._C._functorch.get_interpreter_stack()
    return forward_ad._current_level >= 0 or (stack is not None and any(x.key() in _DIFFERENTIATE for x in stack))


def watched(*tensors: Tensor | None) -> bool:
    """Whether something has to see the operators that run on these: a mode, a transform, a kind of tensor."""
    return (
        any(type(x) not in _KINDS or (x is not None and x.is_neg()) for x in tensors)
        or tensors[0].is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )
