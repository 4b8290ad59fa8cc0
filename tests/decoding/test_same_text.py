"""One greedy decode of a real model on every implementation that a CPU can run: the same text from each."""

import contextlib

import pytest

import pallas_kernels
from jaxtopk import generate, load_pretrained
from jaxtopk.attention import TopKAttention
from jaxtopk.data import assets

PROMPT = "The three laws of robotics are"

# float32, topk 8, 32 tokens; an NVIDIA H100 (jax 0.11.2, mosaic_gpu, compiled) continued the prompt so on 2026-11-25.
CONTINUATION = (
    ":\n\n1. The Law of Robotics (L.R.) - The Law of Robotics states that a machine or device "
    "designed to kill, in the free market"
)


@pytest.fixture(scope="module")
def pretrained():
    cached = assets.cache_dir() / assets.ASSETS["smollm2-135m"].file_name
    if not cached.is_file():
        pytest.skip("needs the cached model: make quickstart fetches it")
    return load_pretrained("smollm2-135m")


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "xla", "mosaic_tpu", "mosaic_gpu"])
def test_every_implementation_continues_a_prompt_with_the_text_of_a_real_gpu(
    pretrained, implementation
):
    model, tokenizer = pretrained
    sparse = model.with_attention(TopKAttention(topk=8, implementation=implementation))
    interpreted = implementation.startswith("mosaic")
    with pallas_kernels.interpret_mode() if interpreted else contextlib.nullcontext():
        text = generate(sparse, tokenizer, PROMPT, max_new_tokens=32)
    assert text == CONTINUATION
