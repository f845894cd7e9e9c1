"""How the tokens of a microbatch are cut, against plain indexing; messages are those of the collectives."""

import pytest
import torch

from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.parallel.token_runs import TokenRuns
from tests.support import Layout, build_mesh


def runs_of(batch: int, sequence: int, size: int) -> list[TokenRuns]:
    return [TokenRuns(batch, sequence, Axis("tensor", tuple(range(size)), rank)) for rank in range(size)]


@pytest.mark.parametrize(("batch", "sequence", "size"), [(2, 5, 4), (3, 13, 2), (1, 8, 4), (1, 1, 4), (4, 6, 3)])
def test_runs_one_behind_another_are_all_tokens_and_the_padding(batch, sequence, size):
    ids = torch.arange(1, batch * sequence + 1).view(batch, sequence)
    runs = runs_of(batch, sequence, size)
    assert {each.length for each in runs} == {-(-batch * sequence // size)}
    joined = torch.cat([each.of_rank(ids) for each in runs], 1)
    assert joined.shape == (1, size * runs[0].length)
    assert joined[0, : batch * sequence].tolist() == list(range(1, batch * sequence + 1))
    assert joined[0, batch * sequence :].eq(0).all()
    assert [n for each in runs for n in each.own] == list(range(size * runs[0].length))


def test_rows_cut_away_the_padding_and_give_it_no_gradient():
    (runs, *_) = runs_of(2, 5, 4)
    padded = torch.randn(1, 12, 3, requires_grad=True)
    rows = runs.rows(padded)
    assert torch.equal(rows, padded[0, :10].view(2, 5, 3))
    rows.sum().backward()
    assert padded.grad[0, :10].eq(1).all()
    assert padded.grad[0, 10:].eq(0).all()
    assert torch.equal(runs.rows(runs.padded(rows)), rows)
    assert runs.padded(torch.ones(2, 5, dtype=torch.long), value=7)[0, 10:].tolist() == [7, 7]


def gathered_and_fetched(size: int) -> tuple[torch.Tensor, ...]:
    axis = build_mesh(Layout(tensor=size)).tensor
    runs = TokenRuns(2, 5, axis)
    whole = torch.arange(30.0).view(2, 5, 3)
    own = runs.of_rank(whole).clone().requires_grad_()
    gathered, fetched = runs.gather(own), runs.fetch(own, torch.tensor([9, 0, 5, 0, 2]))
    (gathered * whole).sum().backward()
    of_gathered, own.grad = own.grad, None
    (fetched * torch.arange(1.0, 6.0)[:, None]).sum().backward()
    return gathered.detach(), fetched.detach(), of_gathered, own.grad


def test_gathering_and_fetching_give_all_ranks_the_same_and_each_its_own_gradient(ranks):
    size, whole = 4, torch.arange(30.0).view(2, 5, 3)
    weights = torch.zeros(12).index_add(0, torch.tensor([9, 0, 5, 0, 2]), torch.arange(1.0, 6.0))
    answers = ranks.run(size, gathered_and_fetched, size)
    for gathered, fetched, _, _ in answers:
        assert torch.equal(gathered, whole)
        assert torch.equal(fetched, whole.view(10, 3)[[9, 0, 5, 0, 2]])
    assert torch.equal(torch.cat([answer[2] for answer in answers], 1)[0, :10], whole.view(10, 3))
    assert torch.equal(torch.cat([answer[3] for answer in answers], 1)[0], weights[:, None].expand(12, 3))
