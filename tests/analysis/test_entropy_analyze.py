"""A model's rows, measured inside it: the arrays of every layer, what they mean, and how they are summed up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtopk.analysis.analyze import (
    analyze_reply,
    analyze_tokens,
    output_entropy,
    token_entropy,
)
from jaxtopk.analysis.measure import measure
from jaxtopk.analysis.measured_rows import MeasuredRows, summaries
from jaxtopk.analysis.pieces import Piece, task_pieces, text_pieces
from jaxtopk.attention import FullAttention, TopKAttention
from jaxtopk.data.tokenizer import Tokenizer
from jaxtopk.evaluation.tasks.base import Sample, Task, TokenSample, TokenTask
from jaxtopk.models.decoder_lm.config import DecoderConfig
from jaxtopk.models.decoder_lm.modeling import DecoderLM
from pallas_kernels import testing

CONFIG = dataclasses.replace(
    DecoderConfig.tiny(), vocab_size=50, num_layers=3, num_heads=4, windows=(None, None, 5), max_positions=64
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 50, size=(2, 12)).astype(np.int32)
TOPKS = (3, 1)
SPARSE = TopKAttention(topk=2, implementation="reference")  # which compiles least


@pytest.fixture(scope="module")
def model():
    """Weights large enough that heads prefer some keys."""
    model = DecoderLM(CONFIG, rngs=nnx.Rngs(params=0))
    model.layers.q_weight[...] *= 6
    return model


@pytest.fixture(scope="module")
def found(model):
    return jax.device_get(analyze_tokens(model, jnp.asarray(TOKENS), topks=TOPKS))


def test_every_layer_head_and_token_is_measured(model, found):
    rows = found.rows
    assert rows.entropy.shape == rows.topk[0].mass.shape == (3, 2, 4, 12)
    np.testing.assert_array_equal(rows.visible[:2], np.broadcast_to(np.arange(1, 13), (2, 2, 12)))
    np.testing.assert_array_equal(rows.visible[2], np.minimum(rows.visible[0], 5))  # its window
    assert (rows.entropy[..., 0] == 0).all()
    assert (rows.entropy <= np.log(rows.visible)[:, :, None] + 1e-6).all()
    assert 0.05 < rows.normalised.mean() < 0.95
    np.testing.assert_array_equal(rows.attended_count, np.repeat(rows.visible[:, :, None], 4, 2))
    logits = np.asarray(model(jnp.asarray(TOKENS)), np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found.output_entropy, -(p * np.log(p)).sum(axis=-1), atol=1e-5)


@pytest.mark.parametrize(
    ("attention", "form"),
    [
        (FullAttention(), "stacked"),
        (SPARSE.replace(layers=(1,)), "unstacked"),
    ],
    ids=["full, stacked", "one layer sparse, unstacked"],
)
def test_watching_changes_nothing_and_layers_come_in_order(model, attention, form):
    model = model.with_attention(attention)
    if form == "unstacked":
        model = model.unstacked()
    seen = []

    def attend(strategy, query, key, value, **visible):
        seen.append((strategy, visible["window"]))
        # The mean key tells layers apart.
        return strategy.attend(query, key, value, **visible), {"key": key.mean(axis=(0, 2, 3))}

    tokens = jnp.asarray(TOKENS)
    hidden, captured = jax.jit(lambda model: model.hidden_captured(tokens, attend))(model)
    np.testing.assert_array_equal(hidden, jax.jit(lambda model: model.hidden(tokens))(model))
    assert captured["key"].shape == (3, 12)
    assert len(np.unique(np.asarray(captured["key"])[:, 0])) == 3
    strategies = dict.fromkeys(strategy for strategy, _ in seen)
    assert list(strategies) == list(dict.fromkeys(attention.layer(i, 3) for i in range(3)))
    assert seen[-1][1] == 5


def test_the_trunk_is_the_strategys_and_the_measured_rows_are_full(model, found):
    """With one layer sparse, layers up to it measure as before, and those above read another stream."""
    sparse = model.with_attention(SPARSE.replace(layers=(1,)))
    rows = jax.device_get(analyze_tokens(sparse, jnp.asarray(TOKENS), topks=TOPKS)).rows
    np.testing.assert_allclose(rows.entropy[:2], found.rows.entropy[:2], atol=1e-5)
    assert np.abs(rows.entropy[2] - found.rows.entropy[2]).max() > 1e-3
    np.testing.assert_array_equal(rows.attended_count[1].max(), 2)
    assert (rows.attended.mass[0] == 1).all()
    between = (rows.attended.mass[1] <= rows.topk[0].mass[1] + 1e-6) & (
        rows.attended.mass[1] >= rows.topk[1].mass[1] - 1e-6
    )
    assert between.all()  # two keys hold more than one, less than three


def test_padding_and_packing_leave_rows_as_they_are(model, found):
    lengths = jnp.asarray([12, 7], jnp.int32)
    padded = jax.device_get(
        analyze_tokens(model, jnp.asarray(TOKENS), topks=TOPKS, lengths=lengths)
    )
    for i, size in enumerate((12, 7)):
        got, wanted = (x.rows.entropy[:, i, :, :size] for x in (padded, found))
        np.testing.assert_allclose(got, wanted, atol=1e-5)
        testing.assert_accurate(*(x.rows.lse[:, i, :, :size] for x in (padded, found)), name="lse")
    packed = np.concatenate([TOKENS[:1, :5], TOKENS[1:, :7]], axis=1)
    segments = np.asarray([[0] * 5 + [1] * 7], np.int32)
    rows = jax.device_get(
        analyze_tokens(model, jnp.asarray(packed), topks=TOPKS, segment_ids=jnp.asarray(segments))
    ).rows
    np.testing.assert_allclose(
        rows.entropy[:, 0, :, :5], found.rows.entropy[:, 0, :, :5], atol=1e-5
    )
    np.testing.assert_allclose(
        rows.entropy[:, 0, :, 5:], found.rows.entropy[:, 1, :, :7], atol=1e-5
    )


def test_rows_that_the_strategy_leaves_dense_attend_to_all(model):
    sparse_rows = np.arange(12)[None] >= np.asarray([[8], [0]])
    rows = jax.device_get(
        analyze_tokens(
            model.with_attention(SPARSE),
            jnp.asarray(TOKENS),
            sparse_rows=jnp.asarray(sparse_rows),
        )
    ).rows
    np.testing.assert_array_equal(
        rows.attended_count[0, 0, :, :8], np.arange(1, 9)[None].repeat(4, 0)
    )
    np.testing.assert_array_equal(rows.attended_count[0, 0, :, 8:], 2)
    np.testing.assert_array_equal(rows.attended_count[0, 1, :, 2:], 2)


@pytest.mark.parametrize(
    "attention",
    [
        FullAttention(),
        SPARSE.replace(topk=None, topk_ratio=0.3, sparse_suffix=3, scope="layer"),
        SPARSE.replace(sparse_suffix=0, layers=(0, 2)),
        SPARSE.replace(prefill="topk"),
    ],
    ids=[
        "full",
        "ratio, layer, longer suffix",
        "dense suffix, two layers",
        "sparse prompt",
    ],
)
def test_rows_of_a_reply_are_those_of_a_whole_measurement(model, attention):
    """Prompts of 8 and 5 tokens, replies up to the end; five rows each, among them a layer with a window."""
    model, tokens = model.with_attention(attention), jnp.asarray(TOKENS)
    prompts, first = [8, 5], [5, 2]
    found = jax.device_get(
        analyze_reply(
            model,
            tokens,
            prompt_tokens=prompts,
            first=first,
            num_rows=5,
            topks=TOPKS,
            ratios=(0.4,),
        )
    )
    sparse = None
    if attention.prefill_strategy() != attention:
        starts = np.asarray(prompts)[:, None] - attention.suffix_tokens
        sparse = jnp.asarray(np.arange(12)[None] >= starts)
    whole = jax.device_get(analyze_tokens(model, tokens, topks=TOPKS, sparse_rows=sparse))
    wanted_rows = [np.s_[5:10], np.s_[2:7]]
    for i, rows in enumerate(wanted_rows):
        pick = lambda x, i=i, rows=rows: x[:, i, ..., rows]
        jax.tree.map(
            lambda got, wanted, i=i, pick=pick: np.testing.assert_allclose(
                got[:, i], pick(wanted), atol=1e-5
            ),
            found.rows._replace(ratio=(), lse=None),
            whole.rows._replace(ratio=(), lse=None),
        )
        # Entropies and shares are of the order of 1; scores are of any size (here 20), and so are their errors.
        testing.assert_accurate(found.rows.lse[:, i], pick(whole.rows.lse), name="lse")
        np.testing.assert_allclose(
            found.output_entropy[i], whole.output_entropy[i, rows], atol=1e-5
        )
    # A share of 0.4 keeps 3 of the 7 keys of sequence 1's row 6, and 4 of the 10 of sequence 0's row 9.
    (share,) = found.rows.ratio
    np.testing.assert_allclose(
        share.mass[0, 1, :, 4], whole.rows.topk[0].mass[0, 1, :, 6], atol=1e-5
    )
    assert (share.mass[0, 0, :, 4] > whole.rows.topk[0].mass[0, 0, :, 9]).all()


def test_a_reply_that_does_not_fit_its_rows_is_refused(model):
    model, tokens = model.with_attention(SPARSE), jnp.asarray(TOKENS)
    options = {"prompt_tokens": [8, 5], "first": [5, 2], "num_rows": 5}
    for changes, message in (
        ({"num_rows": 13}, "num_rows: got 13, wanted 1 to the 12 tokens"),
        ({"first": [5]}, "first: got 1 numbers and 2 prompt_tokens, wanted one for each of 2"),
        ({"first": [5, 5]}, "first: got 5 for 5 prompt tokens, wanted 0 to 4"),
        ({"first": [5, 2], "num_rows": 8}, "first: got 5 for 8 prompt tokens, wanted 0 to 4"),
        ({"ratios": (1.5,)}, "ratios: got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            analyze_reply(model, tokens, **options | changes)


def test_pieces_of_texts_and_tasks_are_measured_at_the_rows_that_count(model):
    """The reply of the second piece ends where the tokens do: its rows begin earlier, and the same ones count."""
    sparse = model.with_attention(SPARSE)
    text = Piece(group="text", tokens=tuple(TOKENS[0].tolist()), measured=np.arange(12) >= 4)
    early, late = (
        Piece(
            group="task",
            tokens=tuple(TOKENS[1, :size].tolist()),
            measured=np.isin(np.arange(size), rows),
            prompt_tokens=rows[0] + 1,
        )
        for size, rows in ((9, (3, 4, 6)), (12, (9, 10)))
    )
    found = list(measure(sparse, [text, early, late], topks=TOPKS))
    assert [rows.num_rows for rows in found] == [8, 3, 2]
    with_ratios = list(measure(sparse, [early, late], topks=TOPKS, ratios=(0.5,)))
    for rows, piece, picked in zip(with_ratios, (early, late), ((3, 4, 6), (9, 10)), strict=True):
        starts = jnp.asarray(np.arange(12)[None] >= piece.prompt_tokens - 1)
        whole = jax.device_get(
            analyze_tokens(sparse, jnp.asarray(TOKENS[1:]), topks=TOPKS, sparse_rows=starts)
        ).rows
        np.testing.assert_allclose(rows.entropy, whole.entropy[:, 0][..., picked], atol=1e-5)
        np.testing.assert_allclose(
            rows.attended_mass, whole.attended.mass[:, 0][..., picked], atol=1e-5
        )
    budget, mass = with_ratios[0].kept(0.5)
    np.testing.assert_array_equal(budget[0], [2, 3, 4])  # half of 4, 5 and 7 keys, rounded up
    np.testing.assert_allclose(
        with_ratios[0].head_mass(0.5), mass.mean(axis=-1, dtype=np.float64), rtol=1e-6
    )
    bound = with_ratios[0].bound(0.5)
    assert (bound["ratio"], bound["rows"], bound["broken"]) == (0.5, 3 * 4 * 3, 0)
    with pytest.raises(ValueError, match="ratios: got .* for 'text', wanted none"):
        list(measure(sparse, [text], ratios=(0.5,)))


def test_output_entropy_is_the_same_in_chunks(model, monkeypatch):
    hidden = model.hidden(jnp.asarray(TOKENS))
    whole = output_entropy(model, hidden)
    monkeypatch.setattr("jaxtopk.analysis.analyze._LOGIT_BYTES", 4 * 50 * 5)
    np.testing.assert_allclose(output_entropy(model, hidden), whole, atol=1e-5)
    assert float(token_entropy(jnp.zeros((50,)))) == pytest.approx(np.log(50))


def test_bad_tokens_are_refused(model):
    with pytest.raises(
        ValueError, match="tokens: got 65 a row, wanted at most the model's context of 64"
    ):
        analyze_tokens(model, jnp.zeros((1, 65), jnp.int32))
    with pytest.raises(ValueError, match=r"tokens: got shape \[1, 0\]"):
        analyze_tokens(model, jnp.zeros((1, 0), jnp.int32))
    with pytest.raises(ValueError, match="topks: got 0"):
        analyze_tokens(model, jnp.zeros((1, 2), jnp.int32), topks=(0,))


def test_measured_rows_are_picked_joined_and_summed_up(found):
    measured = np.zeros((2, 12), bool)
    measured[0, 2:] = True
    measured[1, 11] = True
    rows = MeasuredRows.of(found, measured, TOPKS)
    assert rows.entropy.shape == (3, 4, 11)
    np.testing.assert_array_equal(rows.entropy[1, 2, :10], found.rows.entropy[1, 0, 2, 2:])
    np.testing.assert_array_equal(rows.mass[0, 2, 3, 10], found.rows.topk[0].mass[2, 1, 3, 11])
    np.testing.assert_array_equal(rows.output_entropy[10], found.output_entropy[1, 11])
    halves = [np.where(np.arange(2)[:, None] == i, measured, False) for i in range(2)]
    joined = MeasuredRows.join([MeasuredRows.of(found, half, TOPKS) for half in halves])
    for field in dataclasses.fields(MeasuredRows):
        np.testing.assert_array_equal(getattr(joined, field.name), getattr(rows, field.name))

    told = list(summaries(rows))
    assert [row["level"] for row in told] == ["head"] * 12 + ["layer"] * 3 + ["total"]
    head, layer, total = told[4 + 2], told[12 + 1], told[-1]
    assert (head["layer"], head["head"], layer["layer"]) == (1, 2, 1)
    of_head = rows.entropy[1, 2]
    assert head["entropy"]["mean"] == pytest.approx(of_head.mean())
    assert head["entropy"]["median"] == pytest.approx(np.median(of_head))
    assert layer["normalised"]["mean"] == pytest.approx(rows.normalised[1].mean())
    assert total["support"] == pytest.approx(np.exp(rows.entropy).mean(), rel=1e-5)
    # Row 0 sees three keys, all of which the best three hold: it says nothing of them.
    three, one = head["topk"]
    assert (three["topk"], three["rows"], one["rows"]) == (3, 10, 11)
    assert three["mass"] == pytest.approx(rows.mass[0, 1, 2, 1:].mean())
    np.testing.assert_allclose(rows.head_mass(3)[1, 2], three["mass"], rtol=1e-6)
    assert [entry["topk"] for entry in total["bound"]] == [3]  # one key proves nothing
    assert total["bound"][0]["broken"] == 0
    assert total["bound"][0]["least_slack"] >= -1e-6


def test_a_broken_bound_is_counted_and_rows_without_a_say_are_none(found):
    rows = MeasuredRows.of(found, np.ones((2, 12), bool), TOPKS)
    broken = dataclasses.replace(rows, mass=0 * rows.mass, entropy=0 * rows.entropy)
    told = broken.bound(3)
    assert told["broken"] == told["rows"] > 0
    assert told["least_slack"] == -1
    first = MeasuredRows.of(found, np.arange(12)[None].repeat(2, 0) == 0, TOPKS)
    assert first.bound(3) is None
    assert first.summary()["topk"][0]["mass"] is None
    assert np.isnan(first.head_mass(3)).all()


def test_sets_that_were_not_measured_are_refused(found):
    with pytest.raises(ValueError, match="found: got 2 sets, wanted those of topks"):
        MeasuredRows.of(found, np.ones((2, 12), bool), (3,))
    with pytest.raises(ValueError, match="found: got 0 shares, wanted those of ratios"):
        MeasuredRows.of(found, np.ones((2, 12), bool), TOPKS, (0.5,))


class Letters(Tokenizer):
    """One token a character."""

    def __init__(self):
        pass

    def encode(self, text, add_special_tokens=False):
        return list(map(ord, text))


class Echo(Task):
    name, reply_tokens = "echo", 4

    def __init__(self, answer="yes"):
        self.answer = answer

    def sample(self, index, *, seed, target_tokens, count_tokens):
        fill = lambda size: Sample(
            prompt=str(index) * size,
            reply_start="A:",
            answers=(self.answer,),
            depth=None,
            num_units=1,
        )
        return fill(target_tokens - self.reply_tokens - count_tokens(fill(0)))


class Labels(TokenTask):
    name, size = "labels", 2

    def sample(self, index, *, seed, target_tokens, vocab_size):
        return TokenSample(tokens=(1, 2, 3, index), labels=(-1, -1, 7, 8))


def test_pieces_of_a_text_are_spread_and_do_not_overlap():
    pieces = text_pieces("abcdefghij", Letters(), tokens=4, windows=2)
    assert ["".join(map(chr, piece.tokens)) for piece in pieces] == ["abcd", "ghij"]
    assert all(piece.measured.all() and piece.prompt_tokens == 0 for piece in pieces)
    with pytest.raises(
        ValueError, match="text: got 10 tokens, wanted at least windows x tokens = 3 x 4 = 12"
    ):
        text_pieces("abcdefghij", Letters(), tokens=4, windows=3)


def test_pieces_of_a_task_end_with_its_answer_and_count_the_rows_that_predict_it():
    options = {"tokens": 20, "samples": 3, "seed": 0, "vocab_size": 50}
    pieces = task_pieces(Echo(), Letters(), **options)
    assert len(pieces) == 3
    for piece in pieces:
        text = "".join(map(chr, piece.tokens))
        assert text.endswith("A: yes")
        assert len(text) == 20
        assert piece.prompt_tokens == 16
        assert "".join(text[i + 1] for i in np.flatnonzero(piece.measured)) == " yes"
    cut = task_pieces(Echo("a longer answer"), Letters(), **options)[0]
    assert len(cut.tokens) == 20
    labelled = task_pieces(Labels(), Letters(), **options)
    assert [piece.tokens[-1] for piece in labelled] == [0, 1]  # as many as it has
    np.testing.assert_array_equal(labelled[0].measured, [False, False, True, True])
    assert labelled[0].prompt_tokens == 3
