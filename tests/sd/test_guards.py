"""Guards of compiled code: evaluated once a run, and again wherever they could fail."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sd.features import has, missing
from sd.optimise.compile import Compiler
from sd.optimise.guards import GuardedOnce

pytestmark = pytest.mark.skipif(not has("cache_entries"), reason=str(missing("cache_entries")))


class Scaling(nn.Module):
    """Counts how often its compiled method is called with all guards evaluated."""

    def __init__(self):
        super().__init__()
        self.factor, self.offset, self.evaluated = nn.Parameter(torch.tensor(2.0), requires_grad=False), 0, 0
        compiled = Compiler("default", "eager")(self.scale)

        def counted(*arguments):
            self.evaluated += 1
            return compiled(*arguments)

        self.guarded = GuardedOnce(self.scale, counted, self)

    def scale(self, x, others):
        return x * self.factor + self.offset + sum(others)


@pytest.fixture
def net():
    torch._dynamo.reset()
    yield Scaling()
    torch._dynamo.reset()


def test_a_run_evaluates_its_guards_once(net):
    others = (torch.ones(3), torch.ones(3))
    for runs in (1, 2):
        call = net.guarded.of_run(net.guarded)
        for value in range(4):
            assert call(torch.full((3,), value), others).tolist() == [2 * value + 2] * 3
        assert net.evaluated == runs


@pytest.mark.parametrize(
    "one, other",
    [
        ((torch.ones(3), (torch.ones(3),)), (torch.ones(4), (torch.ones(4),))),
        ((torch.ones(3), (torch.ones(3),)), (torch.ones(3, dtype=torch.float64), (torch.ones(3),))),
        ((torch.ones(3), (torch.ones(3),)), (torch.ones(3), (torch.ones(3), torch.ones(3)))),
        ((torch.ones(2, 2), ()), (torch.ones(2, 2).t(), ())),
        ((torch.ones(3), (1,)), (torch.ones(3), (True,))),
    ],
    ids=["shape", "dtype", "length", "strides", "type"],
)
def test_arguments_of_another_kind_have_their_own_code(net, one, other):
    call = net.guarded.of_run(net.guarded)
    for x, others in (one, other, one, other):
        assert torch.equal(call(x, others), net.scale(x, others))
    assert net.evaluated == 2


def test_settings_that_change_within_a_run_are_seen(net):
    call, x = net.guarded.of_run(net.guarded), torch.ones(3)
    call(x, ())
    with torch.no_grad():
        call(x, ())
    net.factor.data = net.factor.data.double()
    assert call(x, ()).dtype == torch.float32  # a scalar does not promote
    assert net.evaluated == 3


def test_a_change_between_runs_is_seen(net):
    x = torch.ones(3)
    assert net.guarded.of_run(net.guarded)(x, ()).tolist() == [2.0] * 3
    net.offset = 5
    for _ in range(2):
        assert net.guarded(x, ()).tolist() == [7.0] * 3  # in no run
    assert net.guarded.of_run(net.guarded)(x, ()).tolist() == [7.0] * 3
    assert net.evaluated == 4


def test_networks_that_share_their_code_keep_their_weights(net):
    other, x = Scaling(), torch.ones(3)
    other.factor.fill_(5.0)
    calls = [network.guarded.of_run(network.guarded) for network in (net, other)]
    assert [call(x, ()).tolist() for _ in range(2) for call in calls] == 2 * [[2.0] * 3, [5.0] * 3]


def test_where_torch_shall_not_compile_every_call_is_eager(net):
    net.guarded(torch.ones(3), ())  # Dynamo has code
    net.evaluated = 0
    with torch.compiler.set_stance("force_eager"):
        call = net.guarded.of_run(net.guarded)
        assert [call(torch.ones(3), ()).tolist() for _ in range(3)] == 3 * [[2.0] * 3]
    assert net.evaluated == 3
