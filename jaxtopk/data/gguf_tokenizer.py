"""Rebuilds a tokenizer from GGUF metadata: vocabulary, merges or scores, and the splitting rule that goes with them.

GGUF stores the vocabulary but only the *name* of the rule that cuts text into words ("pre-tokenizer"). A wrong rule gives
fluent but different tokens, so a name that is not listed here is refused rather than guessed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

# Kinds in `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Word patterns as published with each family's tokenizer. Inside, \p{N}{1,3} cuts numbers into threes, \p{N} into digits.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION_AND_SPACE}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_PUNCTUATION_AND_SPACE}"

_DIGITS_THEN_GPT2 = ("smollm", "starcoder", "refact")
_GPT2 = ("gpt-2",)
_PATTERNS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
SUPPORTED_PRE_TOKENIZERS = (*_DIGITS_THEN_GPT2, *_GPT2, *_PATTERNS)


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    if name in _PATTERNS:
        split = pre_tokenizers.Split(tokenizers.Regex(_PATTERNS[name]), behavior="isolated")
        return pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in _DIGITS_THEN_GPT2:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, byte_level])
    if name in _GPT2:
        return byte_level
    raise ValueError(
        f"tokenizer.ggml.pre: got {name!r}, wanted one of {', '.join(SUPPORTED_PRE_TOKENIZERS)}"
    )


def _byte_level_bpe(metadata: Mapping[str, Any], vocab: Mapping[str, int]) -> tokenizers.Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    pre_tokenizer = _pre_tokenizer(name)
    merges = metadata.get("tokenizer.ggml.merges")
    if not merges:
        raise ValueError("tokenizer.ggml.merges: got none, wanted the merges of a gpt2 tokenizer")
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=dict(vocab),
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=_PATTERNS.get(name) == _LLAMA3,  # a whole word in the vocabulary wins
        )
    )
    if _PATTERNS.get(name) == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _score_merges(
    vocab: Mapping[str, int], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """Merges that reproduce "join the neighbours whose union scores best", best first.

    SentencePiece knows no merge list: any two neighbours may join if their union is a piece, and its score decides.
    """
    normal = {piece: i for piece, i in vocab.items() if kinds[i] == NORMAL}
    ranked = []
    for piece, i in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                ranked.append((-scores[i], normal[left], normal[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _sentencepiece_bpe(
    metadata: Mapping[str, Any], vocab: Mapping[str, int], kinds: Sequence[int]
) -> tokenizers.Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(kinds):
        raise ValueError(
            f"tokenizer.ggml.scores: got {len(scores or ())} entries, wanted {len(kinds)}, one a token"
        )
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=dict(vocab),
            merges=_score_merges(vocab, scores, kinds),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    prepend = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1, right=0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _add_sentence_marks(tokenizer: tokenizers.Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Adds the begin and end tokens that `add_special_tokens=True` writes around a text."""
    model = metadata["tokenizer.ggml.model"]
    tokens = metadata["tokenizer.ggml.tokens"]
    default_bos = (
        model == "llama" or _PATTERNS.get(metadata.get("tokenizer.ggml.pre", "")) == _LLAMA3
    )
    marks = {}
    for mark, default in (("bos", default_bos), ("eos", False)):
        token_id = metadata.get(f"tokenizer.ggml.{mark}_token_id")
        if metadata.get(f"tokenizer.ggml.add_{mark}_token", default) and token_id is not None:
            marks[mark] = (tokens[token_id], token_id)
    if marks:
        parts = [marks["bos"][0]] if "bos" in marks else []
        parts += ["$A"] + ([marks["eos"][0]] if "eos" in marks else [])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=parts, special_tokens=sorted(set(marks.values()))
        )


def build_tokenizer(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Builds the tokenizer that a GGUF file's metadata describes.

    Raises:
      ValueError: the metadata holds no tokenizer, or one of an unsupported model or splitting rule.
    """
    model = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if model not in ("gpt2", "llama") or not tokens:
        raise ValueError(
            f"tokenizer.ggml.model: got {model!r} with {len(tokens or ())} tokens, wanted gpt2 or llama"
        )
    kinds = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.token_type: got {len(kinds)} entries, wanted {len(tokens)}, one a token"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.tokens: got {len(tokens) - len(vocab)} duplicates, wanted distinct tokens"
        )
    if model == "gpt2":
        tokenizer = _byte_level_bpe(metadata, vocab)
    else:
        tokenizer = _sentencepiece_bpe(metadata, vocab, kinds)
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(token, special=kind != USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED) or (kind == UNKNOWN and model == "llama")
        ]
    )
    _add_sentence_marks(tokenizer, metadata)
    return tokenizer
