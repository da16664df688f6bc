"""Muon against torch's, against singular values, and divided among processes."""

import copy

import pytest
import torch
import torch.distributed as dist
from forked import CONTEXT, end
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nanorecur import muon
from nanorecur.muon import Muon, orthogonalize

SHAPES = ((48, 16), (16, 48), (32, 32), (48, 16), (16, 48), (48, 16), (3, 40))


def matrices(shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(params, seed):
    """Set gradients that have a direction of their own and noise."""
    for p, gradient in zip(params, matrices([p.shape for p in params], 1000 + seed)):
        p.grad = gradient.detach() + p.detach()


def make_steps(optimizer, steps):
    params = optimizer.param_groups[0]["params"]
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


# -----------------------------------------------------------------------------
# one process


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def any_dtype(request, monkeypatch):
    """The type in which matrices are orthogonalised, here one after the other."""
    monkeypatch.setattr(muon, "product_dtype", lambda device_type: request.param)
    return request.param


@pytest.fixture
def bfloat16(monkeypatch):
    monkeypatch.setattr(muon, "product_dtype", lambda device_type: torch.bfloat16)


def test_float32_is_bfloat16_without_its_rounding(any_dtype, monkeypatch):
    stack = torch.stack(matrices(4 * [(16, 48)])).detach()
    got = orthogonalize(stack)
    assert got.dtype == any_dtype
    monkeypatch.setattr(muon, "product_dtype", lambda device_type: torch.float64)
    error = (got - orthogonalize(stack)).norm() / got.norm()
    assert error < (1e-5 if any_dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("supported", [False, True])
def test_processors_without_bfloat16_compute_in_float32(supported, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    found = muon.product_dtype.__wrapped__("cpu")
    assert found == (torch.bfloat16 if supported else torch.float32)
    assert muon.product_dtype.__wrapped__("cuda") == torch.bfloat16


def test_twenty_steps_are_those_of_torch(bfloat16):
    ours, theirs = matrices(), matrices()
    before = [p.detach().clone() for p in ours]
    make_steps(Muon(ours, lr=0.02, weight_decay=0.3, momentum=0.9), range(20))
    make_steps(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.3, momentum=0.9), range(20))
    for p, want, start in zip(ours, theirs, before):
        assert (p - want).norm() < 0.01 * (want - start).norm()  # the rounding of bfloat16


def test_the_defaults_are_those_of_torch():
    ours, theirs = Muon(matrices()), torch.optim.Muon(matrices())
    for name, value in ours.defaults.items():
        assert theirs.defaults[name] == value


def test_a_state_that_torchs_muon_saved_goes_on(bfloat16):
    ours, theirs = matrices(), matrices()
    their_muon = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.3)
    make_steps(their_muon, range(3))
    with torch.no_grad():
        torch._foreach_copy_(ours, theirs)
    our_muon = Muon(ours)
    our_muon.load_state_dict(copy.deepcopy(their_muon.state_dict()))
    start = [p.detach().clone() for p in ours]
    make_steps(our_muon, range(3, 6))
    make_steps(their_muon, range(3, 6))
    for p, want, was in zip(ours, theirs, start):
        assert (p - want).norm() < 0.01 * (want - was).norm()


def test_parameters_without_a_gradient_stay_as_they_are():
    params = matrices()
    optimizer, before = Muon(params), params[3].detach().clone()
    set_gradients(params, 0)
    params[3].grad = None
    optimizer.step()
    assert torch.equal(params[3], before)
    assert params[3] not in optimizer.state


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match="must be matrices"):
        Muon(matrices([(4, 4), (4,)]))


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_singular_values_are_brought_near_to_one_and_vectors_stay(shape, any_dtype):
    stack = torch.stack(matrices(4 * [shape])).detach()
    got = orthogonalize(stack).float()
    u, values, v = torch.linalg.svd(stack, full_matrices=False)
    in_their_basis = u.mT @ got @ v.mT
    diagonal = in_their_basis.diagonal(dim1=1, dim2=2)
    assert ((diagonal > 0.6) & (diagonal < 1.25))[values > 0.1 * values[:, :1]].all()
    assert_close(in_their_basis, torch.diag_embed(diagonal), atol=0.05, rtol=0)


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(orthogonalize(torch.zeros(2, 8, 4)).float(), torch.zeros(2, 8, 4))


def uneven(shape):
    """Return a matrix whose first rows are a hundred times longer than its last."""
    scale = torch.logspace(0, -2, shape[0]).unsqueeze(1)
    return scale * matrices([shape])[0].detach()


@pytest.mark.parametrize("shape", [(48, 16), (32, 32)])
def test_row_norm_divides_rows_by_their_average_and_keeps_the_norm(shape):
    """Two steps written out; the momentum is off, so that the gradients are what they take."""
    [p] = matrices([shape])
    optimizer = Muon([p], lr=0.5, weight_decay=0.0, momentum=0.0, row_norm=True)
    average, rate = torch.zeros(shape[0]), 0.5 * max(1, shape[0] / shape[1]) ** 0.5
    for step in range(2):
        before, p.grad = p.detach().clone(), uneven(shape).roll(step, 0)
        optimizer.step()
        plain = orthogonalize(p.grad[None])[0].float()
        average = 0.95 * average + 0.05 * plain.square().mean(1)
        rows = plain / average.sqrt().unsqueeze(1)
        want = before - rate * rows * plain.norm() / rows.norm()
        assert_close(p.detach(), want)
    assert_close(optimizer.state[p]["second_moment"], average)


def test_the_first_step_with_row_norm_has_rows_of_one_length():
    [p] = matrices([(48, 16)])
    before, p.grad = p.detach().clone(), uneven(p.shape)
    Muon([p], weight_decay=0.0, row_norm=True).step()
    lengths = (p.detach() - before).norm(dim=1)
    assert_close(lengths, lengths.mean().expand(48), atol=0, rtol=0.01)


class Launches(TorchDispatchMode):
    """Counts the operations that compute something."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += not function.is_view
        return function(*arguments, **(options or {}))


def launches(optimizer):
    """Return the operations of the second step; the first makes the state."""
    make_steps(optimizer, [0])
    with Launches() as counted:
        optimizer.step()
    return counted.count


def test_twelve_blocks_take_a_tenth_of_torchs_launches():
    shapes = 12 * [(48, 16), (16, 16), (64, 16), (16, 64)]
    assert launches(Muon(matrices(shapes))) < launches(torch.optim.Muon(matrices(shapes))) / 10


def test_tall_matrices_cost_what_wide_ones_do():
    flops = []
    for shape in ((2, 16, 48), (2, 48, 16)):
        with FlopCounterMode(display=False) as counted:
            orthogonalize(torch.ones(shape))
        flops.append(counted.get_total_flops())
    assert flops[0] == flops[1]


def test_batches_are_no_larger_than_the_bound_and_change_no_step(monkeypatch):
    whole, parts = matrices(), matrices()
    make_steps(Muon(whole), range(2))
    monkeypatch.setattr(muon, "MOST_ON_CPU", 2 * 48 * 16)
    optimizer = Muon(parts)
    make_steps(optimizer, range(2))
    assert [len(params) for params in optimizer.batches(parts)] == [2, 1, 2, 1, 1]
    for p, want in zip(parts, whole):
        assert_close(p, want, atol=1e-3, rtol=0)


# -----------------------------------------------------------------------------
# two processes


def as_one_of_two(rank, folder, sharded, row_norm):
    """Make three steps as one of two processes and save what came out; count its products."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    params, products = matrices(), []
    if sharded:
        params = [shard(p) for p in params]
    original = muon.orthogonalize

    def counted(stack):
        products.append(len(stack))
        return original(stack)

    muon.orthogonalize = counted
    optimizer = Muon(params, lr=0.02, row_norm=row_norm)
    for step in range(3):
        for p, whole in zip(params, matrices(seed=50 + step)):
            p.grad = whole.detach()
            if sharded:
                p.grad = shard(whole).detach()
        optimizer.step()
    if sharded:
        params = [p.full_tensor() for p in params]
    torch.save((params, products), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def shard(p):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    return torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))


@pytest.mark.slow
@pytest.mark.parametrize("row_norm", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_divide_a_batch_and_end_with_the_same_bits(tmp_path, sharded, row_norm):
    group = []
    for rank in (0, 1):
        group.append(
            CONTEXT.Process(target=as_one_of_two, args=(rank, tmp_path, sharded, row_norm))
        )
        group[-1].start()
    assert end(group) == [0, 0]
    (first, products), (second, _) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)
    )
    # of three, two, one and one matrices of a shape
    assert products == 3 * [2, 1, 1, 1]
    alone = matrices()
    optimizer = Muon(alone, lr=0.02, row_norm=row_norm)
    for step in range(3):
        for p, whole in zip(alone, matrices(seed=50 + step)):
            p.grad = whole.detach()
        optimizer.step()
    for a, b, want in zip(first, second, alone):
        assert torch.equal(a, b)
        assert_close(a.detach(), want.detach(), atol=1e-3, rtol=0)
