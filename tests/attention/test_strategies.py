"""Strategies: dense and Top-k rows against a loop over rows, decode against whole sequences, and what a config refuses."""

import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxtopk.attention import FullAttention, TopKAttention, full

B, T, N, K, H = 2, 11, 4, 2, 8


def _inputs(t=T, s=None, seed=0):
    rng = np.random.default_rng(seed)
    s = t if s is None else s
    shapes = ((B, t, N, H), (B, s, K, H), (B, s, K, H))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def _loop(
    query, key, value, *, budget, scale=None, window=None, lengths=None, segments=None, sparse=None
):
    """Each row by itself, in float64; `budget(visible)` says how many keys it keeps."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    (b, t, n, h), s = query.shape, key.shape[1]
    out = np.zeros((b, t, n, value.shape[-1]))
    for i, row, head in np.ndindex(b, t, n):
        last = row + s - t
        visible = [
            j
            for j in range(last + 1)
            if (window is None or j > last - window)
            and (lengths is None or j < lengths[i])
            and (segments is None or segments[i, j] == segments[i, last])
        ]
        scores = {j: query[i, row, head] @ key[i, j, head * key.shape[2] // n] for j in visible}
        scores = {j: score * (h**-0.5 if scale is None else scale) for j, score in scores.items()}
        count = len(visible) if sparse is not None and not sparse[i, row] else budget(len(visible))
        kept = sorted(visible, key=lambda j: (-scores[j], j))[:count]
        if kept:
            weights = np.exp([scores[j] - scores[kept[0]] for j in kept])
            values = [value[i, j, head * key.shape[2] // n] for j in kept]
            out[i, row, head] = weights @ np.asarray(values) / weights.sum()
    return out


# Mostly the reference implementation: which arguments reach the kernels is what is tested here, and it compiles least.
STRATEGIES = {
    "full": (FullAttention(), lambda visible: visible),
    "topk": (TopKAttention(topk=3), lambda visible: min(3, visible)),
    "ratio": (
        TopKAttention(topk_ratio=0.4, min_topk=2, implementation="reference"),
        lambda visible: min(visible, max(2, math.ceil(0.4 * visible))),
    ),
    "largest": (TopKAttention(topk=2**31 - 1, implementation="reference"), lambda visible: visible),
}
SEGMENTS = np.array([[0] * 4 + [1] * 7, [0] * 10 + [1]], np.int32)
CASES = {
    "plain": {},
    "scale": {"scale": 0.7},
    "window": {"window": 4},
    "lengths": {"lengths": np.array([11, 5], np.int32)},
    "nothing_visible": {"lengths": np.array([0, 1], np.int32)},
    "segments": {"segment_ids": SEGMENTS},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_rows_of_whole_sequences_are_those_of_the_loop(name, case):
    strategy, budget = STRATEGIES[name]
    if isinstance(strategy, TopKAttention):
        strategy = strategy.replace(implementation="reference")
    query, key, value = _inputs()
    arguments = CASES[case]
    out = strategy.attend(
        query,
        key,
        value,
        **{k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()},
    )
    renamed = {{"segment_ids": "segments"}.get(k, k): v for k, v in arguments.items()}
    np.testing.assert_allclose(out, _loop(query, key, value, budget=budget, **renamed), atol=2e-6)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_last_query_is_aligned_with_the_last_key(name):
    strategy, budget = STRATEGIES[name]
    query, key, value = _inputs(t=3, s=T)
    np.testing.assert_allclose(
        strategy.attend(query, key, value), _loop(query, key, value, budget=budget), atol=2e-6
    )


def test_rows_that_are_not_sparse_are_dense():
    query, key, value = _inputs()
    sparse = np.arange(B * T).reshape(B, T) % 3 == 0
    out = TopKAttention(topk=2).attend(query, key, value, sparse_rows=jnp.asarray(sparse))
    expected = _loop(query, key, value, budget=lambda visible: min(2, visible), sparse=sparse)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    dense = FullAttention().attend(query, key, value, sparse_rows=jnp.asarray(sparse))
    np.testing.assert_array_equal(dense, FullAttention().attend(query, key, value))


# Pieces of rows see a slice of the keys, chunks of rows all of them; 8 and 5 rows remain of 21.
@pytest.mark.parametrize(
    "small", [{"_CHUNK_BYTES": 4 * B * N * 21 * 8}, {"_PIECE_ROWS": 8}], ids=["chunks", "pieces"]
)
def test_full_attention_in_parts_is_full_attention(monkeypatch, small):
    query, key, value = _inputs(t=21)
    arguments = {
        "window": 9,
        "lengths": jnp.asarray([21, 13], jnp.int32),
        "segment_ids": jnp.asarray(np.repeat(np.arange(21, dtype=np.int32)[None] // 12, B, axis=0)),
    }

    def run(*inputs):
        attend = lambda *inputs: FullAttention().attend(*inputs, **arguments)
        loss = lambda *inputs: jnp.sum(jnp.sin(attend(*inputs)))
        both = lambda *inputs: (attend(*inputs), jax.grad(loss, argnums=(0, 1, 2))(*inputs))
        return str(jax.make_jaxpr(attend)(*inputs)), *jax.jit(both)(*inputs)

    program, whole, gradients = run(query, key, value)
    for name, number in small.items():
        monkeypatch.setattr(full, name, number)
    parts_program, parts, parts_gradients = run(query, key, value)
    assert parts_program.count("dot_general") > program.count("dot_general")
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    for one, other in zip(parts_gradients, gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_decoded_row_is_the_row_of_the_whole_sequence(name, window):
    strategy, _ = STRATEGIES[name]
    query, key, value = _inputs()
    rows = strategy.attend(query, key, value, window=window)
    # Sequences at different places, and a cache that is longer than both, with garbage where nothing was written.
    places = jnp.asarray([10, 3])
    # Dense decoding multiplies such values by 0, and a model's cache holds finite ones only.
    garbage = 1e6 if isinstance(strategy, FullAttention) else jnp.nan
    room = jnp.full((B, 5, K, H), garbage, jnp.float32)
    unwritten = (jnp.arange(T)[None, :] > places[:, None])[:, :, None, None]
    cached = [
        jnp.concatenate([jnp.where(unwritten, garbage, x), room], axis=1) for x in (key, value)
    ]
    decoded = strategy.decode(
        query[jnp.arange(B), places], *cached, lengths=(places + 1).astype(jnp.int32), window=window
    )
    np.testing.assert_allclose(decoded, rows[jnp.arange(B), places], atol=2e-6)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_row_without_keys_decodes_to_zero(name):
    query, key, value = _inputs()
    out = STRATEGIES[name][0].decode(
        query[:, 0], key, value, lengths=jnp.asarray([0, 2], jnp.int32)
    )
    np.testing.assert_array_equal(out[0], 0.0)
    assert (np.asarray(out[1]) != 0.0).any()


@pytest.mark.parametrize(
    "budgets", [{"topk": (1, 4)}, {"topk_ratio": (0.1, 0.6)}], ids=["topk", "ratio"]
)
def test_a_tuple_gives_each_sequence_of_a_batch_its_budget(budgets):
    query, key, value = (jnp.concatenate([x, x + 0.5], axis=0) for x in _inputs())
    lengths = jnp.asarray([11, 10, 9, 8], jnp.int32)
    (name, settings), *_ = budgets.items()
    out = TopKAttention(**budgets, implementation="reference").decode(
        query[:, 0], key, value, lengths=lengths
    )
    for row in range(4):
        one = TopKAttention(**{name: settings[row % 2]}, implementation="reference")
        alone = one.decode(
            query[row : row + 1, 0],
            key[row : row + 1],
            value[row : row + 1],
            lengths=lengths[row : row + 1],
        )
        np.testing.assert_allclose(out[row], alone[0], atol=1e-6)
    with pytest.raises(
        ValueError, match="got 2 budgets for a batch of 3, wanted a divisor of the batch"
    ):
        TopKAttention(**budgets, implementation="reference").decode(
            query[:3, 0], key[:3], value[:3], lengths=lengths[:3]
        )


def test_a_tuple_of_budgets_holds_for_whole_sequences_and_a_tuple_of_ratios_is_refused():
    query, key, value = _inputs()
    out = TopKAttention(topk=(1, 5)).attend(query, key, value)
    for row, topk in enumerate((1, 5)):
        np.testing.assert_allclose(
            out[row], TopKAttention(topk=topk).attend(query, key, value)[row], atol=1e-6
        )
    with pytest.raises(ValueError, match="for whole sequences, wanted one number"):
        TopKAttention(topk_ratio=(0.1, 0.5)).attend(query, key, value)


@pytest.mark.parametrize("scope", ["group", "layer"])
def test_heads_of_a_scope_share_one_set(scope):
    query, key, value = _inputs()
    # With one key kept, every head of a scope returns the value of that key.
    out = TopKAttention(topk=1, scope=scope).decode(
        query[:, 0], key, value, lengths=jnp.asarray([T, T], jnp.int32)
    )
    distance = np.abs(np.asarray(value) - np.asarray(out)[:, None, ::2]).sum(-1)  # [B, S, K]
    chosen = np.argmin(distance, axis=1)
    assert (np.min(distance, axis=1) < 1e-5).all()
    np.testing.assert_array_equal(out[:, 0::2], out[:, 1::2])
    if scope == "layer":
        assert (chosen[:, 0] == chosen[:, 1]).all()


def test_layers_that_are_not_listed_run_full_attention():
    strategy = TopKAttention(topk=3, layers=(0, 2))
    assert [strategy.layer(i, 3) for i in range(3)] == [
        TopKAttention(topk=3),
        FullAttention(),
        TopKAttention(topk=3),
    ]
    assert TopKAttention(topk=3).layer(1, 3) == TopKAttention(topk=3)
    assert TopKAttention(topk=3, layers=()).layer(0, 3) == FullAttention()
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=f"layers got {wrong}, wanted 0 to 2"):
            TopKAttention(topk=3, layers=(0, wrong)).layer(0, 3)


def test_the_prompt_runs_as_prefill_says():
    dense, sparse = TopKAttention(topk=3, sparse_suffix=2), TopKAttention(topk=3, prefill="topk")
    assert (dense.prefill_strategy(), dense.suffix_tokens) == (FullAttention(), 2)
    assert (sparse.prefill_strategy(), sparse.suffix_tokens) == (sparse, 0)
    assert (FullAttention().prefill_strategy(), FullAttention().suffix_tokens) == (
        FullAttention(),
        0,
    )


def test_strategies_are_static_configuration():
    strategy = TopKAttention(
        topk_ratio=(0.5, 0.1), layers=(1,), implementation=("xla", "reference")
    )
    assert strategy.replace(min_topk=2) == TopKAttention(
        topk_ratio=(0.5, 0.1), min_topk=2, layers=(1,), implementation=("xla", "reference")
    )
    assert len({strategy, strategy.replace(), strategy.replace(min_topk=2), FullAttention()}) == 3
    assert jax.jit(lambda strategy: len(strategy.layers), static_argnums=0)(strategy) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "got topk None and topk_ratio None, wanted exactly one"),
        ({"topk": 3, "topk_ratio": 0.5}, "got topk 3 and topk_ratio 0.5, wanted exactly one"),
        ({"topk": 0}, "topk got 0, wanted an int >= 1"),
        ({"topk": 2**31}, "topk got 2147483648, wanted an int >= 1 and below 2[*][*]31"),
        ({"topk": (3, 0)}, "topk got 0, wanted an int >= 1"),
        ({"topk": True}, "topk got True"),
        ({"topk_ratio": 0.0}, r"topk_ratio got 0.0, wanted a number in \(0, 1\]"),
        ({"topk_ratio": 1.01}, "topk_ratio got 1.01"),
        ({"topk_ratio": float("nan")}, "topk_ratio got nan"),
        ({"topk_ratio": (0.5, 2.0)}, "topk_ratio got 2.0"),
        ({"topk": (), "topk_ratio": None}, r"topk got \(\), wanted at least one budget"),
        ({"topk": 3, "min_topk": 0}, "min_topk got 0, wanted at least 1"),
        ({"topk": 3, "sparse_suffix": -1}, "sparse_suffix got -1, wanted at least 0"),
        (
            {"topk": 3, "scope": "model"},
            "scope got 'model', wanted one of 'head', 'group', 'layer'",
        ),
        ({"topk": 3, "pooling": "mean"}, "pooling got 'mean', wanted one of"),
        ({"topk": 3, "prefill": "none"}, "prefill got 'none', wanted one of"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(monkeypatch, settings, message):
    # As users run it: the tests' own type checks would refuse some of these first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=f"TopKAttention: {message}"):
        TopKAttention(**settings)
