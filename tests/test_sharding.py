"""Where arrays go on a mesh, and that a sharded model computes what an unsharded one does."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxtopk.models.decoder_lm.config import DecoderConfig
from jaxtopk.models.decoder_lm.modeling import DecoderLM, param_shapes
from jaxtopk.sharding import (
    ShardingConfig,
    constrain,
    fit,
    make_mesh,
    model_shardings,
    param_shardings,
)

CONFIG = DecoderConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=16,
    mlp_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
    qkv_bias=True,
    qk_norm=True,
)


def test_every_parameter_has_a_spec_of_its_rank():
    shapes = param_shapes(
        DecoderConfig(
            **{
                name: getattr(CONFIG, name)
                for name in ("vocab_size", "num_layers", "embed_dim", "mlp_dim")
            },
            **{name: getattr(CONFIG, name) for name in ("num_heads", "num_kv_heads", "head_dim")},
            max_positions=64,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            qk_norm=True,
        )
    )
    config = ShardingConfig()
    for name, shape in shapes.items():
        spec = config.param_spec(name)
        assert len(spec) in (0, len(shape)), name
        # Everything large is split over fsdp; norms and biases are small.
        assert ("fsdp" in spec) == (name.endswith(("weight", "embed", "lm_head"))), name


@pytest.mark.multidevice
def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert fit(("tensor", "fsdp"), (6, 4), mesh) == P("tensor", "fsdp")
    assert fit(("tensor", "fsdp"), (3, 4), mesh) == P(None, "fsdp")
    assert fit((("data", "fsdp"), None), (4, 5), mesh) == P(("data", "fsdp"), None)
    assert fit((("data", "fsdp"), None), (6, 5), mesh) == P(None, None)
    assert fit((), (4, 5), mesh) == P()


@pytest.mark.multidevice
def test_mesh_fills_the_free_axis_and_refuses_other_sizes():
    assert dict(make_mesh(tensor=2).shape) == {"data": 1, "fsdp": 4, "tensor": 2, "context": 1}
    assert make_mesh(data=-1, fsdp=2).shape["data"] == 4
    with pytest.raises(
        ValueError, match="mesh: got data 3 x fsdp 1 x tensor 1 x context 1, wanted .* to 8 devices"
    ):
        make_mesh(data=3, fsdp=1)
    with pytest.raises(ValueError, match="at most one -1"):
        make_mesh(data=-1, fsdp=-1)


def test_wrong_specs_raise():
    with pytest.raises(ValueError, match="embed_vd: got 3 entries, wanted 2"):
        ShardingConfig(embed_vd=(None, None, None))
    with pytest.raises(
        ValueError, match="act_btd: got axis 'rows', wanted one of data, fsdp, tensor, context"
    ):
        ShardingConfig(act_btd=(("data", "rows"), None, None))


def test_constrain_outside_a_mesh_changes_nothing():
    x = jnp.ones((4, 2))
    assert constrain(x, (("data", "fsdp"), None)) is x


@pytest.mark.multidevice
def test_sharded_forward_and_gradient_equal_unsharded():
    model = jax.jit(lambda: DecoderLM(CONFIG, rngs=nnx.Rngs(params=0)))()
    tokens = jax.random.randint(jax.random.key(1), (4, 12), 0, CONFIG.vocab_size)

    def loss_and_logits(model, tokens):
        logits = model(tokens)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 5]), logits

    step = jax.value_and_grad(loss_and_logits, has_aux=True)
    (_, wanted_logits), wanted_gradient = jax.jit(step)(model, tokens)

    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shardings = model_shardings(model, mesh)
    assert {name: s.spec for name, s in param_shardings(mesh, param_shapes(CONFIG)).items()}[
        "layers.q_weight"
    ] == shardings.layers.q_weight.get_value().spec
    sharded = jax.device_put(model, shardings)
    # Heads over tensor, the rest of a weight over fsdp: a device holds a quarter of it.
    shard = sharded.layers.q_weight[...].addressable_shards[0].data
    assert shard.shape == (2, 8, 2, 8)
    with jax.set_mesh(mesh):
        compiled = jax.jit(step, out_shardings=(None, shardings)).lower(sharded, tokens).compile()
        (_, logits), gradient = compiled(sharded, tokens)
    collectives = set(re.findall(r"(all-gather|all-reduce|reduce-scatter)\(", compiled.as_text()))
    assert {"all-gather", "all-reduce"} <= collectives
    np.testing.assert_allclose(
        logits, wanted_logits, rtol=0, atol=2e-5 * np.abs(wanted_logits).max()
    )
    for got, wanted, place in zip(
        *map(jax.tree.leaves, (gradient, wanted_gradient, shardings)), strict=True
    ):
        assert got.sharding.is_equivalent_to(place, got.ndim)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
