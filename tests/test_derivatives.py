"""Derivatives of the public functions: first ones, of what, how often, and what the kernels refuse."""

import weakref

import numpy as np
import pytest
import torch
from targets import on_all_targets, on_native_targets
from test_functional import Case, loss_and_gradient

from pseudoseg_fast import functional, reference


@on_all_targets
def test_gradcheck(target):
    case = Case((1, 3, 3, 2, 2, 2, 5, 4), torch.float64, target.device, spread=1.0)
    noise = (
        1e-12 if target == ("eager", "cuda") else 0.0
    )  # PyTorch adds up gradients of a resizing in any order
    for name, logits, args, options in case.losses():
        for reduction in ("mean", "none"):

            def function(x, name=name, args=args, options=options, reduction=reduction):
                call = getattr(functional, name)
                return call(x, *args, **options, reduction=reduction, backend=target.backend)

            assert torch.autograd.gradcheck(function, (logits.requires_grad_(),), nondet_tol=noise)
    assert torch.autograd.gradcheck(
        lambda x: functional.dice_loss(x, case.labels, backend=target.backend),
        (case.student.requires_grad_(),),
        nondet_tol=noise,
    )


def test_gradcheck_of_refine_cam():
    q, k, cam = (torch.randn(2, 5, d, dtype=torch.float64, requires_grad=True) for d in (3, 3, 2))
    mask = torch.rand(2, 5) > 0.3
    assert torch.autograd.gradcheck(lambda *args: functional.refine_cam(*args, mask=mask), (q, k, cam))


@on_all_targets
def test_gradients_of_wide_logits_and_large_weights_are_finite(target):
    """A GradScaler's factor reaches unreduced losses."""
    logits = 0.5 * torch.randn(1, 3, 4, 40, device=target.device)
    logits[..., 20:] -= 75
    labels = torch.randint(0, 3, (1, 16, 160), device=target.device)
    options = {"reduction": "none", "backend": target.backend}
    upstream = torch.full((1, 16, 160), 2.0**24, device=target.device)
    _, gradient = loss_and_gradient(functional.cross_entropy, logits, (labels,), options, upstream)
    _, truth = loss_and_gradient(
        reference.cross_entropy, logits.double().cpu(), (labels.cpu(),), {"reduction": "none"}, upstream.cpu()
    )
    torch.testing.assert_close(gradient.cpu().double() / 2**24, truth / 2**24, rtol=1e-4, atol=1e-5)


@on_all_targets
def test_labels_may_come_from_inference_mode_and_change_after_forward(target):
    case = Case((2, 3, 5, 4, 3, 2, 9, 14), device=target.device)
    losses = [*case.losses(), ("dice_loss", case.student, (case.labels,), {})]
    for name, logits, args, options in losses:
        call = getattr(functional, name)
        options = options | {"backend": target.backend}
        expected = loss_and_gradient(call, logits, args, options)
        if target.backend != "eager" or name != "soft_cross_entropy":  # whose target PyTorch saves
            with torch.inference_mode():
                inferred = [value.clone() for value in args]
            torch.testing.assert_close(loss_and_gradient(call, logits, inferred, options), expected)
        if target.backend == "eager" or name == "dice_loss":
            continue
        changed = [value.clone() for value in args]
        student = logits.detach().requires_grad_()
        loss = call(student, *changed, **options)
        for value in changed:
            value.zero_()
        assert torch.equal(torch.autograd.grad(loss, student)[0], expected[1]), name


@on_native_targets
def test_labels_that_changed_before_their_gradient_is_computed_are_refused(target):
    case = Case((2, 3, 5, 4, 3, 2, 9, 14), device=target.device)
    student = case.student.requires_grad_()
    for name, _, args, options in case.losses():
        call = getattr(functional, name)
        loss = call(student, *args, **options, reduction="none", backend=target.backend).sum()
        args[0].zero_()
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation|written to since forward"):
            loss.backward()
        loss = call(student, *args, **options, backend=target.backend)
        loss.backward(retain_graph=True)
        args[0].zero_()
        with pytest.raises(RuntimeError, match="was written to since forward"):
            loss.backward()


def test_a_loss_that_is_kept_keeps_no_label():
    """Losses that are added up would keep the labels of all steps."""
    student = torch.randn(1, 3, 4, 4, requires_grad=True)
    label = np.full((1, 3, 64, 64), 1 / 3, np.float32)
    alive = weakref.ref(label)
    loss = functional.soft_cross_entropy(student, torch.from_numpy(label), backend="cpp")
    del label
    assert alive() is not None
    loss.backward()
    assert alive() is None


@on_native_targets
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_of_losses_are_refused(target, reduction):
    case = Case((2, 3, 4, 4, 2, 2, 9, 9), device=target.device)
    student = case.student.requires_grad_()
    for name, _, args, options in case.losses():
        call = getattr(functional, name)
        loss = call(student, *args, **options, reduction=reduction, backend=target.backend).sum()
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        with pytest.raises(RuntimeError, match=f"kernels of {name} have no second derivative"):
            (loss + gradient.square().sum()).backward()


@on_native_targets
def test_transforms_of_torch_func_and_forward_mode_run_on_eager(target):
    case = Case((2, 3, 4, 4, 2, 2, 9, 9), torch.float64, target.device)
    student, labels, tangent = case.student, case.labels, torch.randn_like(case.student)
    gradient = torch.func.grad(lambda x: functional.cross_entropy(x, labels))(student)
    torch.testing.assert_close(
        gradient, loss_and_gradient(functional.cross_entropy, student, (labels,), {})[1]
    )
    _, along = torch.func.jvp(lambda x: functional.cross_entropy(x, labels), (student,), (tangent,))
    torch.testing.assert_close(along, (gradient * tangent).sum())

    def compiled(x, t):
        return torch.func.jvp(lambda x: functional.cross_entropy(x, labels), (x,), (t,))[1]

    torch.testing.assert_close(torch.compile(compiled, backend="aot_eager")(student, tangent), along)
    with pytest.raises(RuntimeError, match=r"no derivatives for torch\.func"):
        torch.func.grad(lambda x: functional.cross_entropy(x, labels, backend=target.backend))(student)
    student.requires_grad_()
    loss = functional.cross_entropy(student, labels, backend=target.backend)
    batch = torch.tensor([1.0, 2.0], dtype=torch.float64, device=target.device)
    (both,) = torch.autograd.grad(loss, student, batch, is_grads_batched=True)
    torch.testing.assert_close(both, torch.stack([gradient, 2 * gradient]))


@on_all_targets
def test_upstream_gradient_scales_and_graph_is_reusable(target):
    case = Case((2, 3, 4, 4, 2, 2, 9, 9), device=target.device)
    for name, logits, args, options in case.losses():
        options = options | {"backend": target.backend}
        function = getattr(functional, name)
        _, once = loss_and_gradient(function, logits, args, options)
        leaf = logits.detach().requires_grad_()
        loss = function(leaf, *args, **options)
        (-2.5 * loss).backward(retain_graph=True)
        loss.backward()
        torch.testing.assert_close(leaf.grad, -1.5 * once, msg=name)
        unreduced = function(leaf, *args, **options, reduction="none")
        (gradient,) = torch.autograd.grad(unreduced.sum(), leaf)  # an expanded upstream gradient
        _, expected = loss_and_gradient(function, logits, args, options | {"reduction": "sum"})
        torch.testing.assert_close(gradient, expected, msg=name)
