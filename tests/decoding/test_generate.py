"""Text in, text out: prompts, stop strings, streaming, chats, end tokens and refusals, on a tiny model over bytes."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from jaxtopk.attention import TopKAttention
from jaxtopk.data.tokenizer import Tokenizer
from jaxtopk.decoding import loops
from jaxtopk.decoding.generate import complete, encode_prompts, generate
from jaxtopk.decoding.sampling import SamplingConfig
from jaxtopk.models.decoder_lm.config import DecoderConfig
from jaxtopk.models.decoder_lm.modeling import DecoderLM

BYTES = 256
END = BYTES  # the one special token
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<reply>{% endif %}"


@functools.cache
def _byte_symbols() -> tuple[str, ...]:
    """How byte-level tokenizers spell each byte: printable ones as themselves, the rest shifted past 255."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    shifted = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(shifted)) for byte in range(BYTES))


def _tokenizer(**settings) -> Tokenizer:
    """One token a byte, so that a character may span several, and an end token."""
    vocabulary = {symbol: index for index, symbol in enumerate(_byte_symbols())}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken("<end>", special=True)])
    return Tokenizer(backend, **{"eos_ids": (END,), "chat_template": TEMPLATE} | settings)


@functools.cache
def _model() -> DecoderLM:
    """Random, in the form to decode in; the context is short, so that prompts can be too long for it."""
    config = dataclasses.replace(
        DecoderConfig.tiny(), vocab_size=BYTES + 1, num_layers=1, mlp_dim=64, max_positions=128
    )
    return DecoderLM(config, rngs=nnx.Rngs(0)).unstacked()


def _scripted(monkeypatch, *continuations: str) -> None:
    """Makes the loop draw given texts, then end tokens: what is tested is everything around the model."""
    scripts = [[*text.encode(), END] for text in continuations]

    def advance(model, state, *, until, max_new_tokens, **_):
        columns = min(until, state.tokens.shape[1])
        tokens, done = np.array(state.tokens), np.array(state.done)
        drawn = np.array(state.drawn)
        for row, script in enumerate(scripts):
            for column in range(int(state.step), columns):
                if done[row] or column < state.forced_counts[row]:
                    continue
                tokens[row, column] = script[drawn[row]]
                drawn[row] += 1
                done[row] = script[drawn[row] - 1] == END or drawn[row] == max_new_tokens
        return dataclasses.replace(
            state,
            tokens=jnp.asarray(tokens),
            done=jnp.asarray(done),
            drawn=jnp.asarray(drawn),
            step=jnp.int32(columns),
        )

    monkeypatch.setattr(loops, "advance", advance)


SPARSE = TopKAttention(topk=4)  # one forced token, so that the script begins with the first new one


def test_text_is_what_the_loop_drew_up_to_its_end_token(monkeypatch):
    _scripted(monkeypatch, "grün & blau")
    model = _model().with_attention(SPARSE)
    assert generate(model, _tokenizer(), "rot", max_new_tokens=40) == "grün & blau"


def test_a_batch_gives_a_list_and_says_how_each_ended(monkeypatch):
    _scripted(monkeypatch, "one", "two STOP three", "a longer text than allowed")
    model = _model().with_attention(SPARSE)
    prompts = ["a", "bcd", "ef"]
    texts = generate(model, _tokenizer(), prompts, max_new_tokens=20, stop=" STOP")
    assert texts == ["one", "two", "a longer text than a"]
    done = complete(model, _tokenizer(), prompts, max_new_tokens=20, stop=" STOP")
    assert [one.finish for one in done] == ["end_token", "stop", "length"]
    assert [one.prompt_tokens for one in done] == [1, 3, 2]
    assert [bytes(one.tokens).decode() for one in done] == [
        "one",
        "two STOP",
        "a longer text than a",
    ]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("zz", "a zebra, zoo"),
        (("oo", "ebra"), "a z"),
        (("a zebra, zooX", "zoo"), "a zebra, "),
        ("a", ""),
    ],
    ids=["absent", "earliest_of_two", "one_inside_a_longer_one", "at_once"],
)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_text_ends_before_the_first_stop_string(monkeypatch, stop, expected, streamed):
    _scripted(monkeypatch, "a zebra, zoo")
    pieces = []
    text = generate(
        _model().with_attention(SPARSE),
        _tokenizer(),
        "x",
        max_new_tokens=40,
        stop=stop,
        on_token=pieces.append if streamed else None,
    )
    assert text == expected
    if streamed:
        assert (
            "".join(pieces) == expected
        )  # nothing of a stop string was shown, not even its beginning


def test_pieces_are_whole_characters(monkeypatch):
    written = "naïve – 漢字 🙂!"
    _scripted(monkeypatch, written)
    pieces = []
    text = generate(
        _model().with_attention(SPARSE),
        _tokenizer(),
        "x",
        max_new_tokens=40,
        on_token=pieces.append,
    )
    assert text == "".join(pieces) == written
    assert pieces == list(written)


def test_a_character_cut_by_the_limit_is_shown_as_incomplete(monkeypatch):
    _scripted(monkeypatch, "a🙂")
    pieces = []
    text = generate(
        _model().with_attention(SPARSE), _tokenizer(), "x", max_new_tokens=3, on_token=pieces.append
    )
    assert text == "".join(pieces)
    assert text.rstrip("\ufffd") == "a"
    assert text != "a"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streaming_and_stop_strings_do_not_change_what_is_drawn(temperature):
    model = _model().with_attention(TopKAttention(topk=4, sparse_suffix=2))
    settings = {"max_new_tokens": 20, "temperature": temperature, "min_p": 0.02, "seed": 3}
    whole = generate(model, _tokenizer(), "some prompt", **settings)
    pieces = []
    assert generate(model, _tokenizer(), "some prompt", on_token=pieces.append, **settings) == whole
    assert "".join(pieces) == whole
    assert len(pieces) > 1
    assert generate(model, _tokenizer(), "some prompt", stop="\x00never\x00", **settings) == whole


def test_a_prompt_draws_the_same_alone_and_in_a_batch():
    settings = {"max_new_tokens": 12, "temperature": 1.5, "seed": 11}
    prompts = ["first", "a second and longer one", "first"]
    together = generate(_model(), _tokenizer(), prompts, **settings)
    assert together[:2] == [
        generate(_model(), _tokenizer(), prompt, **settings) for prompt in prompts[:2]
    ]
    assert together[2] != together[0]
    assert generate(_model(), _tokenizer(), prompts, **settings | {"seed": 12}) != together


def test_progress_is_told_up_to_the_last_token():
    told = []
    complete(_model(), _tokenizer(), ["x", "yz"], max_new_tokens=20, on_progress=told.append)
    assert told[0] == 0
    assert told[-1] <= 20
    assert told == sorted(told)
    assert len(told) > 2


def test_chats_are_rendered_by_the_template_and_plain_prompts_are_not():
    tokenizer = _tokenizer()
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "go"},
    ]
    encoded = encode_prompts(tokenizer, ["hi", turns], chat=True)
    assert [tokenizer.decode(ids) for ids in encoded] == [
        "<user>hi\n<reply>",
        "<user>hi\n<assistant>yes?\n<user>go\n<reply>",
    ]
    assert encode_prompts(tokenizer, ["hi"], chat=False) == [[*b"hi"]]
    text = generate(_model(), tokenizer, turns, max_new_tokens=2, chat=True)
    assert isinstance(text, str)  # one conversation is one prompt
    assert [text] == generate(_model(), tokenizer, [turns], max_new_tokens=2, chat=True)


def test_the_cache_dtype_is_the_models_unless_asked_otherwise():
    model = _model()
    for asked, got in ((None, jnp.float32), ("bfloat16", jnp.bfloat16)):
        prefilled = loops.prefill(model, [[1, 2, 3]], new_tokens=4, cache_dtype=asked)
        assert {layer.dtype for layer in prefilled.cache.key + prefilled.cache.value} == {
            jnp.dtype(got)
        }


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        (
            "x" * 100,
            {"max_new_tokens": 29},
            "prompt 0: got 100 tokens [+] 29 new ones = 129, wanted at most the model's context of 128",
        ),
        (["ok", "x" * 129], {"max_new_tokens": 1}, "prompt 1: got 129 tokens"),
        ("", {}, "prompt 0: got an empty one, wanted at least one token"),
        (["ok", ""], {}, "prompt 1: got an empty one"),
        ([], {}, "prompts: got an empty list, wanted at least one prompt"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens: got 0, wanted an int of at least 1"),
        ("x", {"max_new_tokens": True}, "max_new_tokens: got True"),
        ("x", {"temperature": -1.0}, "temperature: got -1.0"),
        ("x", {"top_p": 0.0}, "top_p: got 0.0"),
        ("x", {"min_p": 1.0}, "min_p: got 1.0"),
        ("x", {"stop": ("a", "")}, "stop: got"),
        ([{"role": "user", "content": "hi"}], {}, "prompt 0: got messages, wanted text"),
        (["a", "b"], {"on_token": print}, "on_token: got 2 prompts, wanted one"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_any_work(monkeypatch, prompts, settings, message):
    def prefill(*_, **__):
        raise AssertionError("work was begun")

    monkeypatch.setattr(loops, "prefill", prefill)
    with pytest.raises(ValueError, match=message) as caught:
        generate(_model(), _tokenizer(), prompts, **{"max_new_tokens": 4} | settings)
    assert "\n" not in str(caught.value)


def test_a_chat_with_a_model_that_has_no_template_is_refused():
    with pytest.raises(ValueError, match="chat: got a model without a chat template"):
        generate(_model(), _tokenizer(chat_template=None), "hi", max_new_tokens=2, chat=True)


def test_a_prompt_may_fill_the_context_to_its_last_token():
    done = complete(_model(), _tokenizer(eos_ids=()), ["x" * 126], max_new_tokens=2)
    assert len(done[0].tokens) == 2
    assert done[0].finish == "length"


def test_sampling_settings_reach_the_loop():
    greedy = generate(_model(), _tokenizer(), "abc", max_new_tokens=10)
    barely = generate(_model(), _tokenizer(), "abc", max_new_tokens=10, temperature=5.0, top_p=1e-6)
    assert barely == greedy  # a nucleus of one token
    drawn = complete(
        _model(), _tokenizer(), ["abc"], max_new_tokens=10, sampling=SamplingConfig(temperature=5.0)
    )
    assert drawn[0].text != greedy
