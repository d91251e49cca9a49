"""The chunked loss against torch's, in value and gradient; and split over a vocabulary."""

import pytest
import torch
import torch.nn.functional as F

from earthshine.ops.cross_entropy import cross_entropy_sum


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_torch(chunk: int, dtype: torch.dtype, rtol: float) -> None:
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(7, 5, generator=g, dtype=dtype), torch.randn(11, 5, generator=g, dtype=dtype) * 10
    targets = torch.tensor([3, -100, 0, 10, 10, -100, 5])
    ours, theirs = [(h.clone().requires_grad_(), w.clone().requires_grad_()) for _ in range(2)]
    loss = cross_entropy_sum(*ours, targets, chunk_tokens=chunk)
    expected = F.cross_entropy(theirs[0] @ theirs[1].T, targets, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=0)
    (loss / 3).backward()
    (expected / 3).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=rtol, atol=rtol)
    with torch.no_grad():
        assert torch.equal(cross_entropy_sum(h, w, targets, chunk_tokens=chunk), loss.detach())


def test_nothing_to_predict_is_zero_with_zero_gradient() -> None:
    h = torch.randn(4, 3, requires_grad=True)
    loss = cross_entropy_sum(h, torch.randn(6, 3), torch.full((4,), -100))
    loss.backward()
    assert loss.item() == 0 and not h.grad.any()


@pytest.mark.parametrize("target", [6, -1])
def test_a_target_outside_the_vocabulary_has_no_plausible_loss(target: int) -> None:
    loss = cross_entropy_sum(torch.randn(3, 2), torch.randn(6, 2), torch.tensor([0, target, -100]))
    assert loss.isnan()


def test_huge_logits_stay_finite() -> None:
    h = torch.tensor([[1e4]], requires_grad=True)
    loss = cross_entropy_sum(h, torch.tensor([[1.0], [-1.0]]), torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4) and h.grad.isfinite().all()


def test_a_split_vocabulary_gives_the_whole_one() -> None:
    """Two shards stepped together: each reduction waits for the other's value, as ranks would."""
    import threading

    g = torch.Generator().manual_seed(1)
    h, w = torch.randn(5, 4, generator=g, dtype=torch.float64), torch.randn(6, 4, generator=g, dtype=torch.float64)
    targets = torch.tensor([0, 5, -100, 2, 3])
    barrier, slots, results = threading.Barrier(2), [None, None], [None, None]

    def rank(r: int) -> None:
        def reduce(x: torch.Tensor, op) -> torch.Tensor:
            slots[r] = x
            barrier.wait()
            out = op(torch.stack([slots[0], slots[1]]))
            barrier.wait()
            return out

        hh, ww = h.clone().requires_grad_(), w[3 * r : 3 * r + 3].clone().requires_grad_()
        loss = cross_entropy_sum(
            hh, ww, targets, chunk_tokens=2, vocab_start=3 * r,
            reduce_max=lambda x: reduce(x, lambda s: s.amax(0)), reduce_sum=lambda x: reduce(x, lambda s: s.sum(0)),
        )  # fmt: skip
        loss.backward()
        results[r] = (loss.detach(), hh.grad, ww.grad)

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    whole_h, whole_w = h.clone().requires_grad_(), w.clone().requires_grad_()
    whole = cross_entropy_sum(whole_h, whole_w, targets)
    whole.backward()
    for r in range(2):
        torch.testing.assert_close(results[r][0], whole.detach())
        torch.testing.assert_close(results[r][1], whole_h.grad)
    torch.testing.assert_close(torch.cat([results[0][2], results[1][2]]), whole_w.grad)


def test_a_step_of_any_size_scales_bf16_gradients_exactly() -> None:
    """1/513 is not a bf16 number: rounded, it would be one error common to all gradients."""
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(9, 16, generator=g).bfloat16().requires_grad_(), torch.randn(32, 16, generator=g).bfloat16()
    targets = torch.randint(0, 32, (9,), generator=g)
    (whole,) = torch.autograd.grad(cross_entropy_sum(h, w, targets), h)
    (scaled,) = torch.autograd.grad(cross_entropy_sum(h, w, targets) / 513, h)
    assert torch.equal(scaled, (whole.float() * (1 / torch.tensor(513.0))).bfloat16())
