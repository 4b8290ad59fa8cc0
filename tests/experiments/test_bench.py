"""The comparison with `transformers`: its inputs are right, and it refuses to compare unequal work."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.bench import hf_folder, peer_environment, run
from jaxtopk.models.decoder_lm.config import DecoderConfig
from jaxtopk.models.decoder_lm.modeling import DecoderLM
from jaxtopk.models.decoder_lm.params import load_folder

TINY = dataclasses.replace(DecoderConfig.tiny(), num_heads=4, num_kv_heads=2)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_written_folder_loads_as_the_same_model(tmp_path, tied):
    model = DecoderLM(dataclasses.replace(TINY, tied_embeddings=tied), rngs=nnx.Rngs(params=0))
    hf_folder.write(model, tmp_path)
    loaded = load_folder(tmp_path)
    assert loaded.config == model.config
    tokens = jnp.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(jax.jit(loaded)(tokens), jax.jit(model)(tokens))


def test_a_model_that_is_no_plain_llama_is_not_written(tmp_path):
    model = DecoderLM(dataclasses.replace(TINY, qkv_bias=True), rngs=nnx.Rngs(params=0))
    with pytest.raises(ValueError, match="wanted a plain Llama"):
        hf_folder.write(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_sides_take_turns_and_the_first_round_does_not_count():
    order = []

    def side(name, seconds):
        def one():
            order.append(name)
            return {"seconds": seconds, "tokens": [1, 2]}

        return one

    sides = {
        "jaxtopk, full attention": side("a", 1.0),
        "transformers, static cache": side("b", 2.0),
    }
    seconds = run._take_turns(sides, run.Arguments(rounds=2))
    assert order == ["a", "b"] * 3
    assert list(seconds.values()) == [[1.0, 1.0], [2.0, 2.0]]


def test_sides_that_write_different_tokens_are_not_compared():
    sides = {
        "jaxtopk, full attention": lambda: {"seconds": 1.0, "tokens": [1, 2]},
        "jaxtopk, top-k 10%": lambda: {"seconds": 1.0, "tokens": [9, 9]},
        "transformers, static cache": lambda: {"seconds": 1.0, "tokens": [1, 3]},
    }
    with pytest.raises(RuntimeError, match="wanted the same from every side"):
        run._take_turns(sides, run.Arguments(rounds=1))


def test_our_side_decodes_what_the_model_says_again_and_again():
    model = DecoderLM(TINY, rngs=nnx.Rngs(params=0))
    prompt = list(range(40))
    arguments = run.Arguments(context=40, steps=3, topk_ratio=1.0)
    first, second = (
        {name: side()["tokens"] for name, side in sides.items()}
        for sides in [run._our_sides(model, prompt, arguments)] * 2
    )
    assert first == second
    tokens = list(prompt)
    tokens += first["jaxtopk, full attention"]
    likely = np.argmax(jax.jit(model)(jnp.asarray([tokens]))[0], axis=-1)
    assert likely[len(prompt) - 1 : -1].tolist() == tokens[len(prompt) :]
    assert first["jaxtopk, top-k 100%"] == first["jaxtopk, full attention"]


def test_a_python_without_transformers_is_refused(tmp_path):
    assert not peer_environment.works(tmp_path / "python")
    with pytest.raises(FileNotFoundError, match="transformers_python: got"):
        run.run(run.Arguments(transformers_python=tmp_path / "python", out=tmp_path / "out"))
    with pytest.raises(ValueError, match="steps: got 0"):
        run.run(run.Arguments(steps=0))


def test_the_worker_imports_nothing_of_the_project():
    source = pathlib.Path(run._WORKER).read_text()
    assert "jaxtopk." not in source
    assert "import experiments" not in source
