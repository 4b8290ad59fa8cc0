"""Every op on every implementation against its reference: values, gradients, selections, dtypes, refusals, determinism.

A new op joins by adding one `OpCase` to `CASES`. The Mosaic implementations run interpreted, on tiny shapes.
"""

import contextlib
import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import testing
from pallas_kernels.ops.gather_attention.block_sizes import GatherAttentionBlockSizes
from pallas_kernels.ops.topk_attention.block_sizes import TopKAttentionBlockSizes
from pallas_kernels.testing import OpCase, Variant


def integers(rng, *shape):
    """Small whole numbers: every backend computes their scores exactly, so sets must agree exactly, ties included."""
    return rng.integers(-2, 3, shape).astype(np.float32)


def draw_decode(rng, d):
    cache = (d["P"], d["page"]) if "page" in d else (d["B"], d["S"])
    return (
        integers(rng, d["B"], d["N"], d["H"]),
        integers(rng, *cache, d["K"], d["H"]),
        rng.normal(size=(*cache, d["K"], d["V"])).astype(np.float32),
    )


def draw_attention(rng, d):
    return (
        integers(rng, d["B"], d["T"], d["N"], d["H"]),
        integers(rng, d["B"], d["S"], d["K"], d["H"]),
        rng.normal(size=(d["B"], d["S"], d["K"], d["V"])).astype(np.float32),
    )


def draw_indexer(rng, d):
    return (
        integers(rng, d["B"], d["T"], d["I"], d["D"]),
        integers(rng, d["B"], d["S"], d["D"]),
        integers(rng, d["B"], d["T"], d["I"]),
    )


def draw_positions(rng, d):
    return integers(rng, d["B"], d["T"], d["P"]), integers(rng, d["B"], d["S"], d["P"])


def valid_keys(rng, d):
    valid = rng.random((d["B"], d["S"])) < 0.5
    valid[0] = False
    return {"key_valid": jnp.asarray(valid)}


def ragged(rng, d):
    lengths = rng.integers(1, d["S"] + 1, d["B"]).astype(np.int32)
    lengths[0] = 0
    return {"lengths": jnp.asarray(lengths)}


def ragged_in_pages(rng, d):
    """Sequences share the pages of a pool, and past its length each has entries that are no page."""
    lengths = ragged(rng, d)
    pages = d["S"] // d["page"]
    table = rng.integers(0, d["P"], (d["B"], pages)).astype(np.int32)
    used = np.arange(pages) * d["page"] < np.asarray(lengths["lengths"])[:, None]
    return lengths | {"page_table": jnp.asarray(np.where(used, table, 10**6), jnp.int32)}


def budgets_of_heads(rng, d):
    return {"topk": jnp.asarray(rng.integers(1, d["S"] + 2, (d["B"], d["N"])), jnp.int32)}


def budgets_of_rows(rng, d):
    return {"topk": jnp.asarray(rng.integers(1, d["S"] + 2, (d["B"], d["T"])), jnp.int32)}


def documents(rng, d):
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (d["B"], d["T"])), axis=-1), jnp.int32)
    return {"query_segment_ids": ids, "key_segment_ids": ids}


def dense_rows(rng, d):
    return {"dense_rows": jnp.asarray(rng.random((d["B"], d["T"])) < 0.3)}


def lists(scopes, size):
    def draw(rng, d):
        shape = (d["B"], d["T"], d[scopes] if scopes else 1, size)
        return {"indices": jnp.asarray(rng.integers(-1, d["S"] + 1, shape), jnp.int32)}

    return draw


HURRY = {"xla_backend_optimization_level": 0}
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}

SELECT = dict(R=5, S=200)
DECODE = dict(B=2, S=200, N=4, K=2, H=16, V=16)
DECODE_PAGED = DECODE | dict(S=192, P=9, page=32)
ATTEND = dict(B=2, T=13, S=13, N=4, K=2, H=16, V=8)
INDEX = dict(B=2, T=13, S=140, I=3, D=8)
INDEX_DECODE = dict(B=3, T=1, S=140, I=9, D=8)
PLACES = dict(B=2, T=13, S=140, P=3)
GATHER = ATTEND | dict(B=1, T=9)
CHUNKS = dict(block_sizes=TopKAttentionBlockSizes(block_q=8))
GATHER_CHUNKS = dict(block_sizes=GatherAttentionBlockSizes(block_q=8, block_q_backward=8))


def with_residuals(op, **fixed):
    return functools.partial(op, return_residuals=True, **fixed)


CASES = {
    "topk_select": OpCase(
        op=pk.topk_select,
        inputs=lambda rng, d: (integers(rng, d["R"], d["S"]),),
        variants={
            "ties": Variant(shapes=SELECT, options=dict(topk=7)),
            "one": Variant(shapes=SELECT, options=dict(topk=1)),
            "more than there are": Variant(shapes=dict(R=2, S=7), options=dict(topk=9)),
            "ragged": Variant(
                shapes=SELECT,
                options=dict(topk=7),
                arrays=lambda rng, d: {"lengths": jnp.asarray([0, 1, 127, 129, 200], jnp.int32)},
            ),
            "a budget a row": Variant(
                shapes=SELECT,
                options=dict(with_indices=False),
                arrays=lambda rng, d: {"topk": jnp.asarray([1, 2, 50, 199, 300], jnp.int32)},
            ),
        },
        implementations=("xla", "mosaic_tpu", "mosaic_gpu"),
        outputs=lambda selection: {"selection": selection},
        refused={"mosaic_tpu": frozenset({"float16"})},
    ),
    "topk_decode_attention": OpCase(
        op=with_residuals(pk.topk_decode_attention),
        inputs=draw_decode,
        variants={
            "heads": Variant(shapes=DECODE, options=dict(topk=5)),
            "ragged": Variant(shapes=DECODE, options=dict(topk=5), arrays=ragged),
            "window": Variant(shapes=DECODE, options=dict(topk=5, window=9), arrays=ragged),
            "budgets": Variant(shapes=DECODE, arrays=budgets_of_heads),
            "pages": Variant(shapes=DECODE_PAGED, options=dict(topk=5), arrays=ragged_in_pages),
            "group": Variant(
                shapes=DECODE, options=dict(topk=5, scope="group", pooling="score_max")
            ),
            "layer": Variant(
                shapes=DECODE, options=dict(topk=5, scope="layer", pooling="score_max")
            ),
        },
        implementations=("xla", "mosaic_tpu", "mosaic_gpu"),
        outputs=lambda r: {"out": r[0], "lse": r[1].lse, "selection": r[1].selection},
        refused={"mosaic_tpu": frozenset({"float16"})},
    ),
    "topk_attention": OpCase(
        op=with_residuals(pk.topk_attention),
        inputs=draw_attention,
        variants={
            "heads": Variant(shapes=ATTEND, options=dict(topk=3, **CHUNKS)),
            "ratio": Variant(
                shapes=ATTEND | dict(S=17), options=dict(topk_ratio=0.3, min_topk=2, **CHUNKS)
            ),
            "ragged, dense rows": Variant(
                shapes=ATTEND,
                options=dict(topk=3, **CHUNKS),
                arrays=lambda rng, d: ragged(rng, d) | dense_rows(rng, d),
            ),
            "documents": Variant(
                shapes=ATTEND, options=dict(topk=3, window=5, **CHUNKS), arrays=documents
            ),
            "budgets, rows before the keys": Variant(
                shapes=ATTEND | dict(S=9), options=CHUNKS, arrays=budgets_of_rows
            ),
            "not causal": Variant(shapes=ATTEND | dict(S=5), options=dict(topk=2, causal=False)),
            "group": Variant(
                shapes=ATTEND, options=dict(topk=3, scope="group", pooling="score_max", **CHUNKS)
            ),
            "layer": Variant(
                shapes=ATTEND, options=dict(topk=3, scope="layer", pooling="score_mean", **CHUNKS)
            ),
        },
        implementations=("xla",),
        outputs=lambda r: {
            "out": r[0],
            "lse": r[1].lse,
            "threshold": r[1].threshold,
            "tie_cut": r[1].tie_cut,
        },
        differentiable=True,
    ),
    "gather_attention": OpCase(
        op=with_residuals(pk.gather_attention),
        inputs=draw_attention,
        variants={
            # The first runs most often; of the lists of heads the GPU kernel makes the most blocks.
            "groups": Variant(shapes=GATHER, options=GATHER_CHUNKS, arrays=lists("K", 20)),
            "heads": Variant(shapes=GATHER, options=GATHER_CHUNKS, arrays=lists("N", 3)),
            "layer, ragged": Variant(
                shapes=GATHER,
                options=GATHER_CHUNKS,
                arrays=lambda rng, d: ragged(rng, d) | lists(None, 7)(rng, d),
            ),
        },
        implementations=("xla", "mosaic_tpu", "mosaic_gpu"),
        outputs=lambda r: {"out": r[0], "lse": r[1].lse},
        differentiable=True,
        refused={"mosaic_tpu": frozenset({"float16"})},
    ),
    "indexer_scores": OpCase(
        op=pk.indexer_scores,
        inputs=draw_indexer,
        variants={
            "causal": Variant(shapes=INDEX),
            "rows before the keys": Variant(shapes=INDEX | dict(S=9), arrays=ragged),
            "decode, ragged": Variant(shapes=INDEX_DECODE, arrays=ragged),
        },
        implementations=("xla", "mosaic_tpu", "mosaic_gpu"),
        outputs=lambda scores: {"out": scores},
        refused={
            "mosaic_tpu": frozenset({"float16"}),
            "mosaic_gpu": frozenset({"float32"}),
        },
    ),
    "indexer_select": OpCase(
        op=pk.indexer_select,
        inputs=draw_indexer,
        variants={
            "causal": Variant(shapes=INDEX, options=dict(topk=7)),
            "ragged, all and more": Variant(
                shapes=INDEX, options=dict(topk=150, causal=False), arrays=ragged
            ),
            "decode, ragged": Variant(shapes=INDEX_DECODE, options=dict(topk=7), arrays=ragged),
            "budgets": Variant(
                shapes=INDEX, options=dict(with_indices=False), arrays=budgets_of_rows
            ),
        },
        implementations=("xla", "mosaic_tpu", "mosaic_gpu"),
        outputs=lambda selection: {"selection": selection},
        refused={
            "mosaic_tpu": frozenset({"float16"}),
            "mosaic_gpu": frozenset({"float32"}),
        },
    ),
    "knn_indices": OpCase(
        op=pk.knn_indices,
        inputs=draw_positions,
        variants={
            "ties": Variant(shapes=PLACES, options=dict(neighbours=7)),
            "padding": Variant(
                shapes=PLACES | dict(T=3), options=dict(neighbours=90), arrays=valid_keys
            ),
        },
        implementations=("xla", "mosaic_tpu", "mosaic_gpu"),
        outputs=lambda indices: {"indices": indices},
        dtypes=("float32", "float16"),
    ),
}


def tier(implementation: str, *, first: bool):
    """The GPU simulator takes some ten seconds a case, so that only the first ones run by default."""
    return () if first or implementation != "mosaic_gpu" else pytest.mark.slow


RUNS = [
    pytest.param(
        name,
        label,
        implementation,
        id=f"{name}-{implementation}-{label}",
        marks=tier(implementation, first=index < 3),
    )
    for name, case in CASES.items()
    for implementation in case.implementations
    for index, label in enumerate(case.variants)
]
DTYPE_RUNS = [
    pytest.param(
        name,
        next(iter(case.variants)),
        implementation,
        dtype,
        id=f"{name}-{implementation}-{dtype}",
        marks=tier(implementation, first=dtype == "bfloat16"),
    )
    for name, case in CASES.items()
    for implementation in case.implementations
    for dtype in case.dtypes
    if dtype != "float32"
]


def device_of(implementation):
    return pk.interpret_mode() if implementation.startswith("mosaic") else contextlib.nullcontext()


def arguments(case, variant, dtype):
    """Returns (inputs rounded to dtype, array keywords) of a call, the same for every implementation."""
    rng = np.random.default_rng(7)
    inputs = tuple(jnp.asarray(x, dtype) for x in case.inputs(rng, variant.shapes))
    return inputs, {} if variant.arrays is None else variant.arrays(rng, variant.shapes)


def call(case, variant, implementation, inputs, arrays):
    return case.outputs(
        case.op(*inputs, **arrays, **variant.options, implementation=implementation)
    )


def run(case, variant, implementation, dtype, *, times=1):
    """Returns (outputs, gradients in the inputs of a fixed mix of the float outputs); run twice, they must be the same."""
    inputs, arrays = arguments(case, variant, dtype)

    def mixed(inputs, arrays):
        outputs = call(case, variant, implementation, inputs, arrays)
        total = jnp.float32(0)
        for name in ("out", "lse"):
            x = outputs[name].astype(jnp.float32)
            x = jnp.where(jnp.isfinite(x), x, 0)
            total += jnp.sum(x * jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape))
        return total, outputs

    def both(inputs, arrays):
        if not case.differentiable:
            return call(case, variant, implementation, inputs, arrays), ()
        (_, outputs), grads = jax.value_and_grad(mixed, has_aux=True)(inputs, arrays)
        return outputs, grads

    # Compiling is most of the cost: all but the first variant of an implementation, run twice, are compiled in a hurry.
    both = jax.jit(both, compiler_options=OPTIMIZED if times > 1 else HURRY)
    with device_of(implementation):
        if times > 1:
            testing.assert_deterministic(both, inputs, arrays)
        return jax.block_until_ready(both(inputs, arrays))


@functools.cache
def expected(name, label, dtype):
    """Returns (the float32 reference on inputs rounded to dtype, the reference in dtype itself)."""
    case = CASES[name]
    naive = run(case, case.variants[label], "reference", dtype)
    if dtype == "float32":
        return naive, naive
    rounded = dataclasses.replace(
        case,
        inputs=lambda rng, d: [
            np.asarray(jnp.asarray(x, dtype), np.float32) for x in case.inputs(rng, d)
        ],
    )
    return run(rounded, case.variants[label], "reference", "float32"), naive


def judge(got, oracle, naive, dtype):
    outputs, grads = got
    for name, value in outputs.items():
        if name == "selection":
            testing.assert_same_selection(value, oracle[0][name])
        elif name in ("threshold", "tie_cut", "indices"):
            np.testing.assert_array_equal(value, oracle[0][name], err_msg=name)
        elif name == "lse":
            testing.assert_accurate(value, oracle[0][name], name=name)
        else:
            testing.assert_accurate(
                value, oracle[0][name], naive=naive[0][name], name=name, dtype=dtype
            )
    for name, value, want, other in zip(
        ("query", "key", "value"), grads, oracle[1], naive[1], strict=False
    ):
        testing.assert_accurate(value, want, naive=other, name=f"d {name}", dtype=dtype)


def conform(case, name, label, implementation, dtype):
    variant = case.variants[label]
    if case.refuses(implementation, variant, dtype):
        inputs, arrays = arguments(case, variant, dtype)
        with device_of(implementation), pytest.raises(NotImplementedError):
            call(case, variant, implementation, inputs, arrays)
        return
    first = label == next(iter(case.variants)) and dtype == "float32"
    got = run(case, variant, implementation, dtype, times=2 if first else 1)
    judge(got, *expected(name, label, dtype), dtype)


@pytest.mark.parametrize(("name", "label", "implementation"), RUNS)
def test_implementation_agrees_with_the_reference(name, label, implementation):
    conform(CASES[name], name, label, implementation, "float32")


@pytest.mark.parametrize(("name", "label", "implementation", "dtype"), DTYPE_RUNS)
def test_narrow_types_are_as_good_as_the_reference_in_that_type(name, label, implementation, dtype):
    conform(CASES[name], name, label, implementation, dtype)


@pytest.mark.parametrize("name", CASES)
def test_mosaic_refuses_a_cpu_outside_interpret_mode(name):
    case = CASES[name]
    variant = next(iter(case.variants.values()))
    for implementation in ("mosaic_tpu", "mosaic_gpu"):
        with pytest.raises(NotImplementedError, match="got device platform 'cpu'|does not exist"):
            call(case, variant, implementation, *arguments(case, variant, "float32"))


def test_every_public_op_has_a_case():
    helpers = {"merge_attention", "interpret_mode", "budget_from_ratio", "quantize_keys"}
    public = {name for name in vars(pk) if inspect.isfunction(getattr(pk, name))} - helpers
    assert public == set(CASES)


@pytest.mark.parametrize("flaw", ["refuses", "drops a key", "off by a tie"])
def test_a_flawed_implementation_is_caught(flaw):
    def flawed(*args, implementation, **kwargs):
        selection = pk.topk_select(*args, implementation=implementation, **kwargs)
        if implementation == "reference":
            return selection
        if flaw == "refuses":
            raise NotImplementedError(flaw)
        if flaw == "drops a key":
            return selection._replace(
                indices=jnp.where(
                    selection.indices == selection.tie_cut[:, None], -1, selection.indices
                )
            )
        return selection._replace(tie_cut=selection.tie_cut + 1)

    case = dataclasses.replace(CASES["topk_select"], op=flawed)
    with pytest.raises(NotImplementedError if flaw == "refuses" else AssertionError):
        conform(case, "topk_select", "one", "xla", "float32")
