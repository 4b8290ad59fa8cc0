"""Tokenizers: rebuilt ones equal the originals, text survives the round trip, streams join to the whole."""

import json

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxtopk.data.tokenizer import Tokenizer

TEXT = (
    "The quick brown fox jumps over 13 lazy dogs; it's 2024 and they've 1234567 reasons.\n\n"
    "    def f(x):\n\treturn x  # über-café, naïve façade, Ελληνικά, 你好世界, 🦙🦙 don't\r\n"
) * 3
SIZE = 340
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] +"
    " '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def trained(pre_tokenizer):
    """A small byte-level tokenizer trained on TEXT, special tokens first."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def gguf_metadata(tokenizer, pre):
    state = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in state["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHAT,
    }


def smollm_pre_tokenizer():
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


@pytest.fixture(scope="module")
def original():
    return trained(smollm_pre_tokenizer())


@pytest.fixture(scope="module")
def rebuilt(original):
    return Tokenizer.from_gguf(gguf_metadata(original, "smollm"))


def pieces(tokenizer, text):
    return [
        tokenizer.decode([token_id], skip_special_tokens=False)
        for token_id in tokenizer.encode(text)
    ]


# ------------------------------------------------------------------------------------------------------- byte-level BPE


@hypothesis.given(st.text(st.characters(codec="utf-8")))
def test_rebuilt_tokenizer_encodes_as_the_original_and_round_trips(original, rebuilt, text):
    ids = rebuilt.encode(text)
    assert ids == original.encode(text).ids
    assert rebuilt.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_are_single_ids(rebuilt):
    ids = rebuilt.encode("<|im_start|>the<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert rebuilt.decode(ids) == "the"
    assert rebuilt.decode(ids, skip_special_tokens=False) == "<|im_start|>the<|im_end|>"


def test_end_tokens_are_the_named_one_and_the_known_ones(rebuilt):
    assert rebuilt.eos_ids == (2, 0)
    assert rebuilt.bos_id == 1
    assert rebuilt.vocab_size == SIZE


@pytest.mark.parametrize(
    ("pre", "wanted"),
    [
        ("smollm", ["1", "2", "3", "4", "5"]),
        ("qwen2", ["1", "2", "3", "4", "5"]),
        ("llama-bpe", ["123", "45"]),
        ("gpt-2", ["12345"]),
    ],
)
def test_each_family_cuts_numbers_its_own_way(original, pre, wanted):
    backend = Tokenizer.from_gguf(gguf_metadata(original, pre))._backend
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("12345")] == wanted


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe"])
def test_newer_families_keep_line_breaks_with_punctuation(original, pre):
    backend = Tokenizer.from_gguf(gguf_metadata(original, pre))._backend
    cut = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("don't);\n\n  X'S")]
    assert cut == ["don", "'t", ");ĊĊ", "Ġ", "ĠX", "'S"]


def test_qwen2_composes_characters(original):
    tokenizer = Tokenizer.from_gguf(gguf_metadata(original, "qwen2"))
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")


@pytest.mark.parametrize(
    ("pre", "flags", "wanted"),
    [
        ("llama-bpe", {}, [1]),
        ("smollm", {}, []),
        ("smollm", {"tokenizer.ggml.add_bos_token": True}, [1]),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, []),
    ],
)
def test_begin_token_is_written_only_where_the_model_wants_it(original, pre, flags, wanted):
    tokenizer = Tokenizer.from_gguf(gguf_metadata(original, pre) | flags)
    plain = tokenizer.encode("the fox")
    assert tokenizer.encode("the fox", add_special_tokens=True) == wanted + plain


def test_both_sentence_marks_frame_the_text(original):
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = Tokenizer.from_gguf(gguf_metadata(original, "smollm") | flags)
    assert tokenizer.encode("fox", add_special_tokens=True) == [1, *tokenizer.encode("fox"), 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "default"}, r"pre: got 'default', wanted one of smollm"),
        ({"tokenizer.ggml.model": "t5"}, r"model: got 't5' with 340 tokens, wanted gpt2 or llama"),
        ({"tokenizer.ggml.merges": []}, "merges: got none"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type: got 1 entries, wanted 340"),
        ({"tokenizer.ggml.tokens": ["a"] * SIZE}, "got 339 duplicates"),
        ({"tokenizer.ggml.eos_token_id": 999}, "eos_token: got id 999, wanted 0 to 339"),
    ],
)
def test_metadata_that_makes_no_tokenizer_is_refused(original, change, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_gguf(gguf_metadata(original, "smollm") | change)


@pytest.mark.parametrize("call", [lambda t: t.decode([3, -1]), lambda t: t.encode("\ud800")])
def test_bad_values_are_refused(rebuilt, call):
    with pytest.raises(ValueError, match="got .* wanted"):
        call(rebuilt)


def test_ids_past_the_vocabulary_decode_to_nothing(rebuilt):
    ids = rebuilt.encode("the fox")
    assert rebuilt.decode([*ids, 100_000]) == "the fox"


# -------------------------------------------------------------------------------------------------------- SentencePiece

WORDS = ["▁", "a", "b", "c", "ab", "bc", "abc", "▁a", "▁ab", "ca", "cab", "▁abc", "bca", "aa"]


def sentencepiece_metadata(**changes):
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + WORDS
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(WORDS)
    scores = [0.0] * 259 + [-float(5 * i % len(WORDS)) for i in range(len(WORDS))]  # distinct
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def best_neighbours_first(metadata, text):
    """SentencePiece's own rule, literally: join the neighbours whose union scores best, the leftmost among equals."""
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    parts = list(("▁" + text).replace(" ", "▁"))
    while True:
        joins = [
            (-scores[left + right], i)
            for i, (left, right) in enumerate(zip(parts, parts[1:], strict=False))
            if left + right in WORDS
        ]
        if not joins:
            break
        _, i = min(joins)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids = []
    for part in parts:
        known = [tokens.index(part)] if part in WORDS else [3 + b for b in part.encode()]
        ids += known
    return ids


@hypothesis.given(st.text("abc ", min_size=1, max_size=12))
@hypothesis.settings(max_examples=200)
def test_sentencepiece_merges_follow_the_scores(text):
    metadata = sentencepiece_metadata()
    assert Tokenizer.from_gguf(metadata).encode(text) == best_neighbours_first(metadata, text)


def test_sentencepiece_falls_back_to_bytes_and_round_trips():
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata())
    for text in ("ab ca é 你", " abc", "a  b"):
        ids = tokenizer.encode(text)
        assert 0 not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("é")[1:] == [3 + 0xC3, 3 + 0xA9]
    assert (
        tokenizer.encode("a", add_special_tokens=True)[0] == 1
    )  # SentencePiece models begin with it


def test_sentencepiece_prefix_space_can_be_off():
    tokens = sentencepiece_metadata()["tokenizer.ggml.tokens"]
    with_prefix = Tokenizer.from_gguf(sentencepiece_metadata())
    without = Tokenizer.from_gguf(sentencepiece_metadata(add_space_prefix=False))
    assert [tokens[i] for i in with_prefix.encode("a")] == ["▁a"]
    assert [tokens[i] for i in without.encode("a")] == ["a"]
    assert without.decode(without.encode(" a")) == " a"


def test_sentencepiece_needs_scores():
    with pytest.raises(ValueError, match=r"scores: got 0 entries, wanted 273"):
        Tokenizer.from_gguf(sentencepiece_metadata(scores=[]))


# ------------------------------------------------------------------------------------------------------------- streams


@hypothesis.given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_stream_joins_to_the_whole(rebuilt, text):
    ids = rebuilt.encode("naïve 你好 🦙" + text)
    stream = rebuilt.stream()
    parts = [stream.push(token_id) for token_id in ids] + [stream.finish()]
    assert "".join(parts) == rebuilt.decode(ids)


def test_stream_never_shows_half_a_character(rebuilt):
    ids = rebuilt.encode("🐫ж")
    stream = rebuilt.stream()
    assert len(ids) > 2
    parts = [stream.push(token_id) for token_id in ids]
    assert [part for part in parts if part] == ["🐫", "ж"]
    stream = rebuilt.stream()
    assert stream.push(ids[0]) == ""
    assert stream.finish() == "\ufffd"


def test_stream_keeps_the_spaces_of_sentencepiece():
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata())
    ids = tokenizer.encode("ab ca abc é")
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == "ab ca abc é"


# ------------------------------------------------------------------------------------------------------------- folders


def write_folder(folder, original, **files):
    folder.mkdir(exist_ok=True)
    original.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        suffix = "jinja" if name == "chat_template" else "json"
        (folder / f"{name}.{suffix}").write_text(text, encoding="utf-8")
    return folder


def test_folder_tokenizer_is_the_one_saved(tmp_path, original):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, original))
    assert tokenizer.encode(TEXT) == original.encode(TEXT).ids
    assert (tokenizer.eos_ids, tokenizer.bos_id, tokenizer.chat_template) == ((), None, None)


def test_padding_and_truncation_of_training_are_dropped(tmp_path, original):
    padded = tokenizers.Tokenizer.from_str(original.to_str())
    padded.enable_padding(length=64)
    padded.enable_truncation(max_length=64)
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, padded))
    assert tokenizer.encode("fox") == original.encode("fox").ids
    assert tokenizer.encode(TEXT) == original.encode(TEXT).ids


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"generation_config": {"eos_token_id": [2, 0]}, "config": {"eos_token_id": 1}}, (2, 0)),
        ({"generation_config": {}, "config": {"eos_token_id": 1}}, (1,)),
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, (2,)),
        ({"special_tokens_map": {"eos_token": {"content": "<|endoftext|>"}}}, (0,)),
    ],
    ids=["generation", "config", "tokenizer", "map"],
)
def test_end_tokens_come_from_the_first_file_that_names_them(tmp_path, original, files, wanted):
    assert Tokenizer.from_folder(write_folder(tmp_path, original, **files)).eos_ids == wanted


def test_begin_token_is_found(tmp_path, original):
    files = {"tokenizer_config": {"bos_token": {"content": "<|im_start|>"}}}
    assert Tokenizer.from_folder(write_folder(tmp_path, original, **files)).bos_id == 1


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"chat_template": "file", "tokenizer_config": {"chat_template": "config"}}, "file"),
        ({"tokenizer_config": {"chat_template": "config"}}, "config"),
        (
            {
                "tokenizer_config": {
                    "chat_template": [
                        {"name": "tool_use", "template": "tools"},
                        {"name": "default", "template": "plain"},
                    ]
                }
            },
            "plain",
        ),
    ],
    ids=["file", "config", "named"],
)
def test_folder_template_is_found(tmp_path, original, files, wanted):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, original, **files))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]) == wanted


def test_bad_folders_are_refused(tmp_path, original):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: not found in"):
        Tokenizer.from_folder(tmp_path)
    folder = write_folder(tmp_path, original, generation_config="{")
    with pytest.raises(ValueError, match=r"generation_config\.json: got invalid JSON"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: got .* wanted a tokenizer\.json"):
        Tokenizer.from_folder(folder)


def test_chat_of_the_rebuilt_tokenizer(rebuilt):
    text = rebuilt.apply_chat_template([{"role": "user", "content": "fox?"}])
    assert text == "<|im_start|>user\nfox?<|im_end|>\n<|im_start|>assistant\n"
    ids = rebuilt.encode(text)
    assert ids.count(1) == 2
    assert ids.count(2) == 1


def test_model_without_a_template_says_so(tmp_path, original):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, original))
    with pytest.raises(ValueError, match="chat: got a model without a chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
