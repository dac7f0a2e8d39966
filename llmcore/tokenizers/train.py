"""Training tokenizers: byte-level BPE, byte-level Unigram, words, and plain bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from .tokenizer import Tokenizer, _check_text

KINDS = ("bpe", "unigram", "word", "byte")
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")

# How text is cut before merging: contractions, letters with one leading sign or space, up to three digits, signs,
# line ends, runs of spaces (GPT-2's cut, Radford et al. 2019, with the digit groups that later models adopted).
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# Trainers take time quadratic in the length of a word, hours for text without spaces (DNA, base64, some scripts), so
# that in training alone no repetition goes on for longer than this.
_TRAINING_PATTERN = SPLIT_PATTERN.replace("+", "{1,256}").replace("*", "{0,256}")
_LARGEST_VOCAB = 1 << 24  # trainers reserve memory for all of it, and end the process when there isn't enough


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte 0..255 in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: str = "bpe",
    vocab_size: int | None = None,
    special_tokens: Sequence[str] = CHAT_TOKENS,
    bos_token: str | None = "<|bos|>",
    eos_token: str | None = "<|endoftext|>",
    pad_token: str | None = "<|pad|>",
    unk_token: str | None = None,
    min_frequency: int = 2,
    chat_template: str | None = None,
) -> Tokenizer:
    """Train a tokenizer on `texts`, read once and one at a time. The same texts give the same tokenizer.

    kind: "bpe" byte-level byte-pair encoding (Sennrich et al. 2016; byte level as in GPT-2), "unigram" byte-level
    unigram language model (Kudo 2018), "word" whitespace and punctuation (`unk_token`, "<|unk|>" unless given, for any
    other word), "byte" the 256 bytes, untrained (`texts` isn't read). All but "word" give back any text exactly.
    vocab_size: tokens in all, special ones included, at most 2^24; a small corpus may give fewer. "byte" needs none.
    special_tokens: further special tokens, beside the four with a role. Special ids follow the ordinary ones.
    min_frequency: rarer pairs (bpe) or words (word) are left out; "unigram" has no use for it.

    Raises ValueError for an unknown kind, a vocabulary too small for the alphabet or too large, no text, lone
    surrogates, or a special token that ordinary text could also produce.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if isinstance(texts, (str, bytes)):
        raise TypeError("texts must be an iterable of texts, not one text")
    if isinstance(special_tokens, (str, bytes)):
        raise TypeError(f"special_tokens must be a sequence of texts, not {special_tokens!r}")
    if min_frequency < 0:
        raise ValueError(f"min_frequency must be at least 0, not {min_frequency}")
    if kind == "word" and unk_token is None:
        unk_token = "<|unk|>"
    specials = list(dict.fromkeys(t for t in (bos_token, eos_token, pad_token, unk_token, *special_tokens) if t))
    smallest = len(specials) + {"bpe": 256, "unigram": 257, "word": 1, "byte": 256}[kind]
    if kind == "byte":
        if vocab_size not in (None, smallest):
            raise ValueError(f"a byte tokenizer with {len(specials)} special tokens has vocab_size {smallest}")
        vocab_size = smallest
    elif vocab_size is None or vocab_size < smallest:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: a {kind} vocabulary with {len(specials)} special tokens "
            f"needs at least {smallest}"
        )
    elif vocab_size > _LARGEST_VOCAB:
        raise ValueError(f"vocab_size is {vocab_size}; accepted: at most {_LARGEST_VOCAB}")

    ordinary = vocab_size - len(specials)
    if kind == "word":
        library = _train_words(texts, ordinary, min_frequency, unk_token)
    else:
        library = _train_byte_level(texts, kind, ordinary, min_frequency)
    for token in specials:
        if token != (unk_token if kind == "word" else None) and library.token_to_id(token) is not None:
            raise ValueError(f"special token {token!r} is also ordinary text in this corpus; use a form like <|name|>")
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer = Tokenizer(
        library.to_str(),
        bos_token=bos_token,
        eos_token=eos_token,
        pad_token=pad_token,
        unk_token=unk_token,
        chat_template=chat_template,
    )
    for token, index in tokenizer.special_tokens.items():
        if tokenizer.decode([index]) != token:
            raise ValueError(f"special token {token!r} would decode as {tokenizer.decode([index])!r}; use ASCII")
    return tokenizer


def _checked(texts: Iterable[str]) -> Iterator[str]:
    characters = 0
    for text in texts:
        _check_text(text)
        characters += len(text)
        yield text
    if not characters:
        raise ValueError("there is no text to train on")


def _train_byte_level(texts: Iterable[str], kind: str, ordinary: int, min_frequency: int) -> Library:
    alphabet = byte_alphabet()
    if kind == "byte":
        library = Library(models.BPE(vocab={token: byte for byte, token in enumerate(alphabet)}, merges=[]))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = decoders.ByteLevel()
        return library
    library = Library(models.BPE() if kind == "bpe" else models.Unigram())
    library.pre_tokenizer = _cut_and_to_bytes(_TRAINING_PATTERN)
    library.decoder = decoders.ByteLevel()
    if kind == "bpe":
        trainer = trainers.BpeTrainer(
            vocab_size=ordinary, min_frequency=min_frequency, initial_alphabet=alphabet, show_progress=False
        )
        library.train_from_iterator(_checked(texts), trainer)
    else:
        trainer = trainers.UnigramTrainer(vocab_size=ordinary, initial_alphabet=alphabet, show_progress=False)
        library.train_from_iterator(_checked(texts), trainer)
        library.model = _canonical_unigram(library)
    library.pre_tokenizer = _cut_and_to_bytes(SPLIT_PATTERN)
    return library


def _cut_and_to_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _canonical_unigram(library: Library) -> models.Unigram:
    """The trained pieces with the noise of hash order taken out of their scores, so that training repeats exactly.

    Summation order moves the last digits, and the trainer gives bytes it never saw scores of lowest + 0.0001 k with k
    in random order: here they all get the lowest.
    """
    pieces = json.loads(library.to_str())["model"]["vocab"]
    lowest = min(score for _, score in pieces)
    scores = {p: lowest if len(p) == 1 and score < lowest + 0.0001 * 257 else score for p, score in pieces}
    ranked = sorted(((piece, round(score, 8)) for piece, score in scores.items()), key=lambda item: (-item[1], item[0]))
    return models.Unigram(ranked)


def _train_words(texts: Iterable[str], ordinary: int, min_frequency: int, unk_token: str) -> Library:
    library = Library(models.WordLevel(unk_token=unk_token))
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    trainer = trainers.WordLevelTrainer(vocab_size=ordinary, min_frequency=min_frequency, show_progress=False)
    library.train_from_iterator(_checked(texts), trainer)
    vocab = library.get_vocab()
    if unk_token in vocab:
        raise ValueError(f"unk_token {unk_token!r} is also a word of this corpus; use a form like <|unk|>")
    library.model = models.WordLevel(vocab={**vocab, unk_token: len(vocab)}, unk_token=unk_token)
    return library
