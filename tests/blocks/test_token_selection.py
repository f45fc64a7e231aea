"""Which tokens are selected: shares, forced positions, filling up, ties, and the score of TokenSeek."""

from typing import Any

import pytest
import torch
import transformers as t
from stock_models import TEXT, batch_for, made
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from shoestring import Recipe
from shoestring.blocks import TokenTune
from shoestring.blocks.token_selection import ends, seek_scores, select
from shoestring.recipe import attached_to


def lengths_to_mask(*lengths: int, width: int = 10) -> Tensor:
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


def nothing(mask: Tensor) -> Tensor:
    return torch.zeros_like(mask)


def test_the_highest_scores_are_kept_in_order_of_position():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7, 0.3]])
    allowed = torch.ones(1, 5, dtype=torch.bool)
    chosen = select(scores, allowed, nothing(allowed), 0.4)
    assert chosen.kept.tolist() == [[1, 3]]
    assert chosen.rest.tolist() == [[0, 2, 4]]
    assert chosen.order.tolist() == [[1, 3, 0, 2, 4]]
    assert chosen.mask.tolist() == [[False, True, False, True, False]]
    assert not chosen.filled_up
    assert not chosen.everything


def test_ties_go_to_the_earlier_position():
    allowed = torch.ones(1, 6, dtype=torch.bool)
    assert select(torch.zeros(1, 6), allowed, nothing(allowed), 0.5).kept.tolist() == [[0, 1, 2]]


def test_forced_positions_come_before_higher_scores_and_count():
    scores = torch.tensor([[0.0, 3.0, 2.0, 1.0, 0.5]])
    allowed = torch.ones(1, 5, dtype=torch.bool)
    forced = torch.tensor([[True, False, False, False, True]])
    assert select(scores, allowed, forced, 0.6).kept.tolist() == [[0, 1, 4]]
    assert select(scores, allowed, forced, 0.2).kept.tolist() == [[0, 4]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 1.0])
def test_each_sample_has_its_share_and_is_filled_up_to_the_longest(seed, fraction):
    allowed = lengths_to_mask(10, 7, 3, 1, 0)
    scores = torch.rand(allowed.shape, generator=torch.Generator().manual_seed(seed))
    chosen = select(scores, allowed, nothing(allowed), fraction)
    expected = [min(max(round(n * fraction), 1), n) for n in (10, 7, 3, 1, 0)]
    assert chosen.mask.sum(1).tolist() == expected
    assert chosen.valid.sum(1).tolist() == expected
    assert not (chosen.mask & ~allowed).any()
    assert chosen.kept.shape == (5, max(expected))
    assert chosen.filled_up == (min(expected) < max(expected))
    assert torch.equal(chosen.order.sort(1).values, torch.arange(10).expand(5, -1))
    assert (chosen.kept.diff(dim=1) > 0).all()
    assert (chosen.rest.diff(dim=1) > 0).all()


def test_everything_means_every_token_of_every_sample():
    whole, padded = lengths_to_mask(10, 10), lengths_to_mask(10, 9)
    assert select(torch.rand(2, 10), whole, nothing(whole), 1.0).everything
    assert not select(torch.rand(2, 10), padded, nothing(padded), 1.0).everything
    assert not select(torch.rand(2, 10), whole, nothing(whole), 0.9).everything


def test_draws_are_even_over_positions():
    allowed = torch.ones(4000, 8, dtype=torch.bool)
    scores = torch.rand(4000, 8, generator=torch.Generator().manual_seed(0))
    drawn = select(scores, allowed, nothing(allowed), 0.25).mask.float().mean(0)
    torch.testing.assert_close(drawn, torch.full((8,), 0.25), atol=0.03, rtol=0)


def test_ends_are_the_first_and_last_allowed_position():
    allowed = torch.tensor([[True, True, True, False], [False, True, True, True], [False, False, True, False]])
    both = [[True, False, True, False], [False, True, False, True], [False, False, True, False]]
    assert ends(allowed, last=True).tolist() == both
    assert ends(allowed, last=False).int().argmax(1).tolist() == [0, 1, 2]
    assert ends(allowed, last=False).sum(1).tolist() == [1, 1, 1]
    assert not ends(nothing(allowed), last=True).any()


def test_without_values_the_share_of_all_positions_is_kept():
    with FakeTensorMode():
        allowed = torch.ones(2, 10, dtype=torch.bool)
        chosen = select(torch.rand(2, 10), allowed, nothing(allowed), 0.25)
        assert chosen.kept.shape == (2, 2)
        assert chosen.rest.shape == (2, 8)
        assert not chosen.filled_up


@pytest.mark.parametrize("seed", range(3))
def test_seek_scores_equal_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(3, 10, generator=generator, dtype=torch.float64)
    gradient = torch.rand(3, 10, generator=generator, dtype=torch.float64)
    allowed = lengths_to_mask(10, 6, 2)
    found = seek_scores(attention, gradient, allowed)
    for sample, length in enumerate((10, 6, 2)):
        own = gradient[sample, :length]
        for token in range(length):
            scaled = (own[token] - own.min()) / (own.max() - own.min())
            assert float(found[sample, token]) == pytest.approx(float(attention[sample, token].log() + scaled))


def test_seek_scores_are_finite_where_nothing_looks_and_all_gradients_are_equal():
    scores = seek_scores(torch.zeros(2, 4), torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bool))
    assert scores.isfinite().all()


@pytest.mark.parametrize("name", ["llama grouped", "mistral", "bert", "bert tokens"])
def test_the_score_of_a_model_equals_attention_and_gradients_of_the_stock_one(name):
    """A stock forward that gives out its attention, and the whole backward from its loss to the last block's input."""
    model = made(name, dtype=torch.float64)
    batch = batch_for(name, model, 1)
    with Recipe(TokenTune(select="seek"))(model) as attached:
        technique = attached_to(attached).techniques[0]
        scores: list[Tensor] = []
        own = technique._seek
        technique._seek = lambda current: scores.append(found := own(current)) or found
        attached(**batch)
    model.set_attn_implementation("eager")
    last = technique.stacks[-1].blocks[-1]
    entered: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])
        entered[0].retain_grad()

    hook = last.register_forward_pre_hook(note, with_kwargs=True)
    outputs = model(**batch, output_attentions=True)
    hook.remove()
    outputs.loss.backward()
    received = outputs.attentions[-1].mean(1).sum(1)
    gradient = entered[0].grad.abs().sum(-1)
    allowed = batch["attention_mask"].bool()
    expected = seek_scores(received, gradient, allowed)
    torch.testing.assert_close(scores[0].double()[allowed], expected[allowed], rtol=1e-4, atol=1e-4)


def test_seek_costs_one_forward_more():
    torch.manual_seed(0)
    sizes = {**TEXT, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "vocab_size": 50}
    model = t.LlamaForCausalLM(t.LlamaConfig(**sizes)).train()
    ids = torch.randint(3, 50, (2, 32))

    class Flops(TorchDispatchMode):
        counted = 0

        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = operation(*args, **(kwargs or {}))
            if (count := flop_registry.get(operation.overloadpacket)) is not None:
                self.counted += count(*args, **(kwargs or {}), out_val=out)
            return out

    def flops(select: str | None) -> int:
        with Recipe(*([TokenTune(select=select)] if select else []))(model) as attached, Flops() as counter:
            attached(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
        return counter.counted

    whole = flops(None)
    extra = (flops("seek") - flops("random")) / whole
    assert 1 / 3 < extra < 1 / 3 + 2 / 3 / 8 + 0.08  # a forward, and the backward of one of eight blocks and the head
