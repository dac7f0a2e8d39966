"""The one tokenizer class: text to ids and back, saved in the `tokenizer.json` form of the `tokenizers` library."""

from __future__ import annotations

import json
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import tokenizers

from ._atomic import write_atomic
from .chat import DEFAULT_CHAT_TEMPLATE, render_chat

_SHORT = 1 << 12  # characters of a lone text that are not worth starting the library's threads, which takes 5 ms

ROLES = ("bos", "eos", "pad", "unk")

#: Which special token plays a role when a lone `tokenizer.json` (which has no place to say so) is loaded.
_CONVENTIONAL = {
    "bos": ("<|bos|>", "<s>", "<|begin_of_text|>"),
    "eos": ("<|endoftext|>", "</s>", "<|end_of_text|>"),
    "pad": ("<|pad|>", "<pad>", "[PAD]"),
    "unk": ("<|unk|>", "<unk>", "[UNK]"),
}


class Tokenizer:
    """Text to token ids and back.

    Immutable. Text that happens to spell a special token ("<|endoftext|>" in a web page) is ordinary text unless
    `allow_special=True` says that it may become the control token. Added tokens that the file itself does not mark
    `special` are vocabulary and always match.

    `content` is that of a `tokenizer.json`, as text or parsed; the `*_token` arguments name the special tokens by their
    text and must be in its vocabulary. Truncation and padding settings in the file are dropped: they would lose text
    silently.
    """

    def __init__(
        self,
        content: str | Mapping[str, Any],
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        unk_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        data = _parse_object(content) if isinstance(content, str) else dict(content)
        data["truncation"] = data["padding"] = None
        _refuse_what_aborts(data)
        if _is_made_bpe(data):
            self._plain = _assemble(data)
            added = {token["content"]: token["id"] for token in data.get("added_tokens") or ()}
            self._vocab = {**data["model"]["vocab"], **added}
        else:
            self._json = json.dumps(data, ensure_ascii=False)
            self._plain = _build(self._json)
            self._vocab = self._plain.get_vocab(with_added_tokens=True)
        self._plain.encode_special_tokens = True  # the library's name for "special tokens in text are text"
        if not self._vocab:
            raise ValueError("the vocabulary is empty")
        self.bos_token, self.eos_token, self.pad_token, self.unk_token = bos_token, eos_token, pad_token, unk_token
        self.chat_template = chat_template
        for role in ROLES:
            token = getattr(self, f"{role}_token")
            if token is not None and token not in self._vocab:
                raise ValueError(f"{role}_token {token!r} is not in the vocabulary")

    def __reduce__(self) -> tuple[Any, ...]:
        # The library's own pickling forgets encode_special_tokens, so rebuild from the text.
        return _rebuild, (self._json, self._roles(), self.chat_template)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, {self._roles()})"

    def _roles(self) -> dict[str, str]:
        """The named special tokens: {"bos_token": text, ...}, without absent ones."""
        tokens = {f"{role}_token": getattr(self, f"{role}_token") for role in ROLES}
        return {name: token for name, token in tokens.items() if token is not None}

    # ---- vocabulary

    @cached_property
    def _json(self) -> str:
        return self._plain.to_str()

    @cached_property
    def _known_ids(self) -> frozenset[int]:
        return frozenset(self._vocab.values())

    @cached_property
    def vocab_size(self) -> int:
        """Largest id + 1: the rows an embedding needs. Above the number of tokens if the file leaves ids unused."""
        return max(self._known_ids) + 1

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Text to id of every token the file marks as special."""
        added = self._plain.get_added_tokens_decoder()
        return {token.content: index for index, token in sorted(added.items()) if token.special}

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the file asks for the BOS token before each text. `encode` adds it only where it is told to."""
        if self.bos_id is None:
            return False
        with _library_faults_as_value_errors():
            return self._plain.encode("", add_special_tokens=True).ids[:1] == [self.bos_id]

    @property
    def bos_id(self) -> int | None:
        return self.token_to_id(self.bos_token)

    @property
    def eos_id(self) -> int | None:
        return self.token_to_id(self.eos_token)

    @property
    def pad_id(self) -> int | None:
        return self.token_to_id(self.pad_token)

    @property
    def unk_id(self) -> int | None:
        return self.token_to_id(self.unk_token)

    def token_to_id(self, token: str | None) -> int | None:
        """The id of a token in its stored form (byte-level tokens show a space as "Ġ"); None when there is none."""
        return self._vocab.get(token) if token is not None else None

    def id_to_token(self, index: int) -> str | None:
        """The stored form of a token; None for an id without one."""
        return self._plain.id_to_token(index) if index in self._known_ids else None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides which ids a text gets, the same before and after save and load."""
        canonical = json.dumps([json.loads(self._json), self._roles()], sort_keys=True, ensure_ascii=False)
        return blake2b(canonical.encode("utf-8"), digest_size=16).hexdigest()

    # ---- text to ids

    def encode(
        self, text: str, add_bos: bool = False, add_eos: bool = False, *, allow_special: bool = False
    ) -> list[int]:
        """Token ids of `text`. Raises ValueError for lone surrogates, a BOS/EOS or unknown token it doesn't have."""
        return self.encode_batch([text], add_bos, add_eos, allow_special=allow_special)[0]

    def encode_batch(
        self, texts: Sequence[str], add_bos: bool = False, add_eos: bool = False, *, allow_special: bool = False
    ) -> list[list[int]]:
        """`encode` of each text; the library spreads the batch over threads."""
        texts = list(texts)
        for text in texts:
            _check_text(text)
        prefix = [self._required("bos")] if add_bos else []
        suffix = [self._required("eos")] if add_eos else []
        inner = self._with_special if allow_special else self._plain
        with _library_faults_as_value_errors():
            if len(texts) == 1 and len(texts[0]) < _SHORT:
                encodings = [inner.encode(texts[0], add_special_tokens=False)]
            else:
                encodings = inner.encode_batch_fast(texts, add_special_tokens=False)
        return [prefix + encoding.ids + suffix for encoding in encodings]

    def encode_wrapped(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Token ids of each text with the special tokens that the file puts around one (BERT's [CLS] and [SEP]), the
        text cut so that there are at most `max_tokens` in all."""
        texts = list(texts)
        for text in texts:
            _check_text(text)
        room = max_tokens - self._plain.num_special_tokens_to_add(False)
        if room < 0:
            raise ValueError(f"max_tokens is {max_tokens}; accepted: {max_tokens - room} or more, its special tokens")
        with _library_faults_as_value_errors():
            encodings = self._plain.encode_batch(texts, add_special_tokens=False)
            for encoding in encodings:
                encoding.truncate(room)
            return [self._plain.post_process(encoding, None, True).ids for encoding in encodings]

    @cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        return _twin(self._plain) or _build(self._json)  # two, because flipping the flag on one is not thread-safe

    def _required(self, role: str) -> int:
        index = self.token_to_id(getattr(self, f"{role}_token"))
        if index is None:
            raise ValueError(f"this tokenizer has no {role}_token; its special tokens are {list(self.special_tokens)}")
        return index

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`. Bytes that are no UTF-8 show as U+FFFD. Raises ValueError for an id without a token."""
        ids = [operator.index(i) for i in ids]
        unknown = set(ids) - self._known_ids
        if unknown:
            raise ValueError(f"token id {min(unknown)} has no token (vocabulary size {self.vocab_size})")
        with _library_faults_as_value_errors():
            return self._plain.decode(ids, skip_special_tokens=skip_special_tokens)

    # ---- chats

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The chat as one string, by this tokenizer's template (ChatML when it has none).

        To tokenise a chat use `encode_chat`: in this string a message that spells a control token has become one.
        """
        return render_chat(
            self.chat_template or DEFAULT_CHAT_TEMPLATE,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            variables=self._roles(),
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a chat. Only the template writes control tokens: those spelled inside messages stay text."""
        names = sorted(self.special_tokens, key=len, reverse=True)
        everything = json.dumps([messages, tools], ensure_ascii=False, default=str)
        _check_text(everything)
        marker = "\ud800"  # a lone surrogate: no text that passes the check has one
        pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")

        def hide(value: Any) -> Any:
            if isinstance(value, str):
                return pattern.sub(lambda match: f"{marker}{names.index(match[0])}{marker}", value)
            if isinstance(value, Mapping):
                return {hide(key): hide(item) for key, item in value.items()}
            return [hide(item) for item in value] if isinstance(value, (list, tuple)) else value

        rendered = self.apply_chat_template(hide(messages), add_generation_prompt, hide(tools))
        ids: list[int] = []
        for position, piece in enumerate(re.split(f"{marker}([0-9]+){marker}", rendered)):
            if position % 2:
                ids += self.encode(names[int(piece)])
            else:
                ids += self.encode(piece, allow_special=True)
        return ids

    # ---- files

    def to_json(self) -> str:
        """The content of a `tokenizer.json`."""
        return self._json

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `path` itself if it ends in .json, else the folder form: tokenizer.json and tokenizer_config.json.

        Only the folder form keeps the chat template and unconventional names of special tokens.
        """
        path = Path(path)
        if path.suffix == ".json":
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, self._json)
            return
        path.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._roles(),
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_atomic(path / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2))
        write_atomic(path / "tokenizer.json", self._json)  # last: a folder that has it is whole

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a `tokenizer.json`, or a folder that holds one (and `tokenizer_config.json`, `chat_template.jinja`).

        Raises FileNotFoundError if there is no such file, else ValueError naming the path and the reason.
        """
        path = Path(path)
        folder = path if path.is_dir() else None
        file = path / "tokenizer.json" if folder else path
        config_file = path / "tokenizer_config.json" if folder else None
        template_file = path / "chat_template.jinja" if folder else None
        text = _read(file)
        options: dict[str, str | None] = {}
        if config_file and config_file.exists():
            options = _read_config(config_file)
            if template_file and template_file.exists():
                options["chat_template"] = _read(template_file)
        try:
            if not options:
                added = _parse_object(text).get("added_tokens") or []
                special = {token.get("content") for token in added if token.get("special")}
                for role, candidates in _CONVENTIONAL.items():
                    options[f"{role}_token"] = next((c for c in candidates if c in special), None)
            return cls(text, **options)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not a usable tokenizer: {error}") from error


def _rebuild(json_text: str, roles: dict[str, str], chat_template: str | None) -> Tokenizer:
    return Tokenizer(json_text, **roles, chat_template=chat_template)


def _refuse_what_aborts(data: Mapping[str, Any]) -> None:
    """ValueError for the one fault known to kill the process instead of raising: merges shorter than their prefix."""
    model = data.get("model")
    prefix = model.get("continuing_subword_prefix") if isinstance(model, Mapping) else None
    merges = model.get("merges") if prefix and isinstance(prefix, str) else None
    for merge in merges if isinstance(merges, list) else ():
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if isinstance(parts, list) and parts and not str(parts[-1]).startswith(prefix):
            raise ValueError(f"merge {merge!r} lacks the continuing_subword_prefix {prefix!r}")


def _build(json_text: str) -> tokenizers.Tokenizer:
    with _library_faults_as_value_errors():
        return tokenizers.Tokenizer.from_str(json_text)


def _is_made_bpe(data: Mapping[str, Any]) -> bool:
    """Whether it is BPE with merges as the library's classes take them: pairs that are tuples, which no JSON holds."""
    model = data.get("model")
    merges = model.get("merges") if isinstance(model, Mapping) and model.get("type") == "BPE" else None
    return isinstance(merges, list) and set(map(type, merges)) == {tuple}


def _assemble(data: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """`_build` for BPE whose vocabulary and merges are Python's: the library takes them as they are, where to write and
    to parse 100,000 of them as JSON takes three times as long."""
    model = data["model"]
    rest = _build(json.dumps({**data, "added_tokens": [], "model": {**model, "vocab": {}, "merges": []}}))
    options = {name: value for name, value in model.items() if name != "type" and value is not None}
    with _library_faults_as_value_errors():
        library = _with_parts(tokenizers.models.BPE(**options), rest)
        for token in data.get("added_tokens") or ():
            flags = {name: value for name, value in token.items() if name not in ("id", "content")}
            library.add_tokens([tokenizers.AddedToken(token["content"], **flags)])
            if (index := library.token_to_id(token["content"])) != token["id"]:
                raise ValueError(f"the added token {token['content']!r} has id {token['id']}, and {index} elsewhere")
    return library


def _twin(library: tokenizers.Tokenizer) -> tokenizers.Tokenizer | None:
    """A tokenizer over the same model, in a thousandth of the time of `_build`. None where its added tokens would get
    other ids."""
    twin, added = _with_parts(library.model, library), library.get_added_tokens_decoder()
    twin.add_tokens([token for _, token in sorted(added.items())])
    return twin if twin.get_added_tokens_decoder() == added else None


def _with_parts(model: tokenizers.models.Model, parts_of: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(model)
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (value := getattr(parts_of, name)) is not None:
            setattr(library, name, value)
    return library


@contextmanager
def _library_faults_as_value_errors() -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # it raises bare Exception, and a Rust panic derives from BaseException alone
        raise ValueError(f"the tokenizers library refuses it: {error}") from error


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise TypeError(f"a text must be str, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text has a lone surrogate at character {error.start}; no UTF-8 exists for it") from error


def _parse_object(json_text: str) -> dict[str, Any]:
    try:
        data = json.loads(json_text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not whole JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"it holds a JSON {type(data).__name__}, not an object")
    return data


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"no tokenizer file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _read_config(path: Path) -> dict[str, str | None]:
    """The special tokens and the chat template that a `tokenizer_config.json` names."""
    try:
        config = _parse_object(_read(path))
    except ValueError as error:
        raise ValueError(f"{path} is not a usable tokenizer configuration: {error}") from error
    options: dict[str, str | None] = {}
    for name in (*(f"{role}_token" for role in ROLES), "chat_template"):
        value = config.get(name)
        if isinstance(value, Mapping):  # a token written with its matching options
            value = value.get("content")
        if name == "chat_template" and isinstance(value, list):  # several named templates
            value = next((v.get("template") for v in value if isinstance(v, dict) and v.get("name") == "default"), None)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{path}: {name} must be text, not {value!r}")
        options[name] = value
    return options
