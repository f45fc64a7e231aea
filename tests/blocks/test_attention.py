"""Redirected attention: the rows of masks against transformers' own, and a model that is otherwise untouched."""

from typing import Any

import pytest
import torch
import transformers as t
from stock_models import DECODERS, GROUPED, LENGTH, MODELS, WORDS, batch_for, made
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from shoestring.blocks.attention import (
    TokenMask,
    additive,
    attend,
    handled_by,
    masks_by_rows,
    redirected,
    visible_rows,
)
from shoestring.blocks.stacks import Unread
from shoestring.errors import SettingError

PADDINGS = {
    "none": [13, 13],
    "right": [13, 9],
    "left": [13, -9],
}
TEXT_MODELS = ["llama", "mistral", "gemma3", "opt", "bert", "modernbert", "t5"]


def padding_mask(kind: str) -> Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    for row, length in zip(mask, PADDINGS[kind], strict=True):
        (row[length:] if length > 0 else row[:length]).zero_()
    return mask


def masks_seen(model: nn.Module, batch: dict[str, Any]) -> list[tuple[nn.Module, Any]]:
    """The mask of each attention in one forward, by rows where that is switched on."""
    seen: list[tuple[nn.Module, Any]] = []

    def note(original: str, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Tensor:
        seen.append((module, mask))
        rows = visible_rows(mask, torch.arange(q.shape[2]).expand(q.shape[0], -1))
        return attend(original, module, q, k, v, additive(rows, q), **options)

    with redirected(model), masks_by_rows(), handled_by(note):
        model(**batch)
    return seen


def stock_masks(model: nn.Module, batch: dict[str, Any]) -> list[tuple[nn.Module, Tensor | None]]:
    """The same of the stock model, whose masks are whole."""
    seen: list[tuple[nn.Module, Tensor | None]] = []
    sdpa = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def whole(*args: Any, **options: Any) -> Tensor:
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa(*args, **options)

    own = torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, "sdpa", whole)

        def note(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
            seen.append((model, attn_mask))
            return own(query, key, value, attn_mask=attn_mask, **options)

        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
        model(**batch)
    return seen


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_rows_of_masks_equal_transformers_own(name, kind):
    model = made(name)
    batch = {**batch_for(name, model), "attention_mask": padding_mask(kind)}
    batch = {key: value[:2] for key, value in batch.items()}
    if name in (*DECODERS, "t5"):
        batch["use_cache"] = False
    found, expected = masks_seen(model, batch), stock_masks(model, batch)
    assert len(found) == len(expected)
    generator = torch.Generator().manual_seed(0)
    for (_, mask), (_, whole) in zip(found, expected, strict=True):
        if whole is not None and whole.dtype != torch.bool:  # T5 adds its bias to the mask
            whole = whole > torch.finfo(whole.dtype).min / 2
        if mask is None:
            assert whole is None or whole.all()
            continue
        assert isinstance(mask, TokenMask)
        num_queries = whole.shape[2]
        queries = torch.stack([torch.randperm(num_queries, generator=generator)[:5] for _ in range(2)])
        rows = visible_rows(mask, queries)
        for sample in range(2):
            expected_rows = whole.expand(2, -1, -1, -1)[sample, :1, queries[sample]]
            assert torch.equal(rows[sample], expected_rows)
        assert visible_rows(mask, queries) is rows
        part = mask.part(slice(2, 6), slice(1, 8))
        assert torch.equal(part, whole.expand(2, -1, -1, -1)[:, :1, 2:6, 1:8])


def test_rows_of_packed_samples_equal_transformers_own():
    model = made("llama")
    ids = torch.randint(3, WORDS, (2, LENGTH))
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None].expand(2, -1)
    batch = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    queries = torch.tensor([[1, 8, 12], [5, 6, 7]])
    expected = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    expected[6:, :6] = False
    for _, mask in masks_seen(model, batch):
        assert torch.equal(visible_rows(mask, queries), expected[queries][:, None])
        assert torch.equal(mask.part(slice(4, 9), slice(0, LENGTH))[0, 0], expected[4:9])


@pytest.mark.parametrize("heads", [1, 4])
def test_rows_of_a_mask_that_was_given_whole(heads):
    whole = torch.rand(1, heads, 6, 7) > 0.5
    queries = torch.tensor([[0, 5], [3, 3]])
    rows = visible_rows(whole, queries)
    assert rows.shape == (2, heads, 2, 7)
    assert torch.equal(rows[1, :, 0], whole[0, :, 3])
    assert visible_rows(None, queries) is None
    one_row = torch.ones(2, 1, 1, 7)
    assert visible_rows(one_row, queries) is one_row


def test_an_added_mask_is_zero_where_visible():
    like = torch.zeros(1, dtype=torch.bfloat16)
    added = additive(torch.tensor([True, False]), like)
    assert added.tolist() == [0, torch.finfo(torch.bfloat16).min]
    assert added.dtype == torch.bfloat16
    assert additive(None, like) is None
    assert additive(like, like) is like


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask_heads", [None, 1, 4])
def test_attention_of_grouped_heads_equals_a_loop(kv_heads, mask_heads):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(2, kv_heads, 7, width, generator=generator, dtype=torch.float64, requires_grad=True)
        for width in (3, 2)
    )
    mask = None if mask_heads is None else torch.randn(2, mask_heads, 5, 7, generator=generator, dtype=torch.float64)
    found = attend("sdpa", nn.Module(), query, key, value, mask, scaling=0.7)
    inputs = (query, key, value)
    heads = []
    for head in range(4):
        group = head // (4 // kv_heads)
        scores = 0.7 * query[:, head] @ key[:, group].transpose(1, 2)
        if mask is not None:
            scores = scores + mask[:, head % mask_heads]
        heads.append(scores.softmax(-1) @ value[:, group])
    expected = torch.stack(heads, 2)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((found * weights).sum(), inputs)
    for gradient, reference in zip(ours, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "gemma2"])  # which is eager only
def test_a_redirected_model_computes_the_same(name, implementation):
    model = made(name).eval()
    model.set_attn_implementation(implementation)
    batch = batch_for(name, model)
    with torch.no_grad():
        expected = model(**batch)
        with redirected(model):
            assert model.config._attn_implementation == f"shoestring_{implementation}"
            assert torch.equal(model(**batch).logits, expected.logits)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama grouped", "mistral", "gemma3", "gpt2", "t5", "bart"])
def test_a_redirected_model_generates_the_same(name, implementation):
    model = made(name).eval()
    model.set_attn_implementation(implementation)
    batch = batch_for(name, model, left=name in DECODERS)
    prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}
    steps = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**prompt, **steps)
    with redirected(model):
        assert torch.equal(model.generate(**prompt, **steps), expected)


@pytest.mark.parametrize("name", ["llama grouped", "mistral", "bert", "t5"])
def test_whole_models_attend_the_same_by_rows(name):
    """All rows asked for, by every implementation, give the stock outputs."""
    for implementation in ("sdpa", "eager"):
        model = made(name, dtype=torch.float64).eval()
        model.set_attn_implementation(implementation)
        batch = batch_for(name, model)
        expected = model(**batch).logits
        with redirected(model), masks_by_rows():
            found = model(**batch).logits
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_capped_scores_go_through_eager_attention():
    torch.manual_seed(0)
    config = t.Gemma2Config(**GROUPED, sliding_window=5, attn_implementation="eager", attn_logit_softcapping=1.5)
    model = t.Gemma2ForCausalLM(config).eval()
    batch = batch_for("gemma2", model)
    expected = model(**batch).logits

    def whole(original: str, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Tensor:
        rows = visible_rows(mask, torch.arange(q.shape[2]).expand(q.shape[0], -1))
        return attend(original, module, q, k, v, additive(rows, q), **options)

    with redirected(model), masks_by_rows(), handled_by(whole):
        torch.testing.assert_close(model(**batch).logits, expected)


def test_an_error_puts_the_implementation_back():
    model = made("llama")
    with pytest.raises(ZeroDivisionError), redirected(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"


def test_implementations_that_take_no_mask_are_refused():
    model = made("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(SettingError, match="'flash_attention_2' takes no masks by row"), redirected(model):
        pass
    with (
        pytest.raises(SettingError, match="does not use transformers' attention interface"),
        redirected(nn.Linear(2, 2)),
    ):
        pass


def test_a_model_that_reads_what_stands_in_for_a_tensor_is_told_why_it_cannot():
    mask, unread = TokenMask(1, 3), Unread(nn.Identity(), "recompute")
    for stand_in, message in (
        (mask, "masks row by row; use recompute .* which (asks for its to|takes a part of it)"),
        (unread, "Identity hands on more than hidden states"),
    ):
        assert not hasattr(stand_in, "shape")
        for read in (lambda x: x.to("cpu"), lambda x: x[0]):
            with pytest.raises(SettingError, match=message):
                read(stand_in)
    with pytest.raises(SettingError, match="hands on more"):
        _, _ = unread
