"""Text to tokens and back, for the tokenizers of Hugging Face folders and of GGUF files alike."""

import operator
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from jaxtopk.data.chat_template import render_chat
from jaxtopk.data.gguf_tokenizer import CONTROL, build_tokenizer
from jaxtopk.data.json_files import read_json

# Tokens that end a turn or a text in the families we load. GGUF names one end token; instruct models often have two.
_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>")
_REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to


class Tokenizer:
    """Encodes and decodes text, renders chats, and knows which tokens end a generation.

    Attributes:
      eos_ids: any of these ends a generation; empty if the model names none.
      bos_id: the token that begins a text, or None.
      chat_template: Jinja source, or None for a model without one.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_ids: Sequence[int] = (),
        bos_id: int | None = None,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        """Wraps a `tokenizers.Tokenizer`; `special_tokens` are names a chat template may use, such as bos_token."""
        backend.no_padding()  # a tokenizer.json may carry the padding and truncation of its training
        backend.no_truncation()
        self._backend = backend
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.bos_id = bos_id
        self.chat_template = chat_template
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """Reads `tokenizer.json` and what lies beside it in a Hugging Face folder.

        End tokens are those of generation_config.json, else of config.json, else the tokenizer's own. The chat template is
        chat_template.jinja, else the one in tokenizer_config.json.

        Raises:
          FileNotFoundError: there is no tokenizer.json.
          ValueError: a file is malformed.
        """
        folder = pathlib.Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"tokenizer.json: not found in {folder} (a tokenizer.model alone is not read)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception on malformed files
            raise ValueError(f"{path}: got {error}, wanted a tokenizer.json") from None

        def optional(name: str) -> dict[str, Any]:
            return read_json(folder / name) if (folder / name).is_file() else {}

        settings = optional("tokenizer_config.json")
        special_tokens = {
            name: value["content"] if isinstance(value, Mapping) else value
            for name, value in (optional("special_tokens_map.json") | settings).items()
            if name.endswith("_token") and isinstance(value, str | Mapping)
        }
        eos_ids: list[int] = []
        for source in ("generation_config.json", "config.json"):
            stated = optional(source).get("eos_token_id")
            if stated is not None:
                eos_ids = [stated] if isinstance(stated, int) else [int(i) for i in stated]
                break
        if not eos_ids and "eos_token" in special_tokens:
            token_id = backend.token_to_id(special_tokens["eos_token"])
            eos_ids = [] if token_id is None else [token_id]
        bos_token = special_tokens.get("bos_token")
        return cls(
            backend,
            eos_ids=eos_ids,
            bos_id=None if bos_token is None else backend.token_to_id(bos_token),
            chat_template=_folder_template(folder, settings.get("chat_template")),
            special_tokens=special_tokens,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Rebuilds the tokenizer from the metadata of a GGUF file.

        End tokens are those the metadata names, and every control token known to end a turn (such as `<|im_end|>`).

        Raises:
          ValueError: the metadata holds no tokenizer, or an unsupported one.
        """
        backend = build_tokenizer(metadata)
        tokens = metadata["tokenizer.ggml.tokens"]
        kinds = metadata.get("tokenizer.ggml.token_type") or []
        ids = {
            name: metadata[f"tokenizer.ggml.{key}_token_id"]
            for name, key in (
                ("bos_token", "bos"),
                ("eos_token", "eos"),
                ("unk_token", "unknown"),
                ("pad_token", "padding"),
            )
            if f"tokenizer.ggml.{key}_token_id" in metadata
        }
        for name, token_id in ids.items():
            if not 0 <= token_id < len(tokens):
                raise ValueError(f"{name}: got id {token_id}, wanted 0 to {len(tokens) - 1}")
        named = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
        known = [i for i, kind in enumerate(kinds) if kind == CONTROL and tokens[i] in _END_TOKENS]
        return cls(
            backend,
            eos_ids=[i for i in (*named, *known) if i is not None],
            bos_id=ids.get("bos_token"),
            chat_template=metadata.get("tokenizer.chat_template"),
            special_tokens={name: tokens[i] for name, i in ids.items()},
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's own vocabulary may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        """Returns the id of a token as it is spelt in the vocabulary, None if there is none."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Turns text into token ids; spelt-out special tokens such as `<|im_start|>` become their single id.

        Args:
          text: any string; lone surrogates are refused.
          add_special_tokens: also write the begin and end tokens the model was trained with, if any. Leave it off for a
            rendered chat, which already holds them.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: got {type(text).__name__}, wanted str")
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (
            UnicodeEncodeError,
            TypeError,
        ):  # which of them depends on the version of the package
            raise ValueError("text: got a lone surrogate, wanted valid Unicode") from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Turns token ids into text. Ids beyond the vocabulary (a padded model's) decode to nothing."""
        ids = [operator.index(token_id) for token_id in ids]
        if ids and min(ids) < 0:
            raise ValueError(f"ids: got {min(ids)}, wanted ids of at least 0")
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Renders messages (mappings with role and content) as the text the model was trained on.

        Raises:
          ValueError: the model has no chat template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("chat: got a model without a chat template, wanted one that has it")
        return render_chat(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self._special_tokens,
        )

    def stream(self, skip_special_tokens: bool = True) -> "TextStream":
        """Starts an incremental decoder for one generation."""
        return TextStream(self, skip_special_tokens=skip_special_tokens)


class TextStream:
    """Decodes a generation token by token; the pieces joined are exactly `decode` of all its tokens.

    A token may hold half a character, and the text of a token may depend on the one before it (a leading space). So each
    step decodes the tokens since the last settled point twice, with and without the new ones, and releases the difference
    once it ends on a whole character.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        """Starts empty."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._shown = 0  # tokens whose text is out
        self._context = 0  # first token that the text of unshown ones may depend on

    def _pending(self) -> str:
        shown = self._tokenizer.decode(self._ids[self._context : self._shown], self._skip)
        return self._tokenizer.decode(self._ids[self._context :], self._skip)[len(shown) :]

    def push(self, token_id: int) -> str:
        """Takes one token, returns the text that became certain; may be empty."""
        self._ids.append(operator.index(token_id))
        text = self._pending()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text

    def finish(self) -> str:
        """Returns what is left, an incomplete character included."""
        text = self._pending()
        self._context = self._shown = len(self._ids)
        return text


def _folder_template(folder: pathlib.Path, stated: Any) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if stated is None or isinstance(stated, str):
        return stated
    # Several named templates (a plain one, one for tools): the one called "default" is for plain chats.
    named = {entry["name"]: entry["template"] for entry in stated}
    if "default" not in named:
        raise ValueError(f"chat_template: got {', '.join(named)}, wanted one named default")
    return named["default"]
