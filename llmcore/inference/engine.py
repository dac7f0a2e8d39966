"""The engine: requests in, text out, whoever asks: chat, server, evaluation, rollouts."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from llmcore.inference.adapters import Adapter, Adapters
from llmcore.inference.cache import PagedKVCache
from llmcore.inference.constraints import Matcher
from llmcore.inference.params import SamplingParams
from llmcore.inference.runner import Drawn, Runner
from llmcore.inference.scheduler import Scheduler, Work
from llmcore.inference.sequence import Delta, Finish, Request, RequestOutput, Sequence, completion
from llmcore.inference.speculation import Speculator
from llmcore.inference.stats import EngineStats
from llmcore.inference.text import TextStream
from llmcore.models import Transformer
from llmcore.tokenizers import Tokenizer

if TYPE_CHECKING:
    from llmcore.inference.language_model import LanguageModel


class Engine:
    """Continues any number of requests together. Not thread-safe: one thread adds, steps and aborts.

    Args:
        model: in evaluation mode from now on, in its own dtype and on its own device.
        tokenizer: for prompts, answers and stop strings in text; without one, tokens only.
        stop_ids: tokens that end a text unless a request says otherwise; None: the tokenizer's end of text.
        cache_tokens: room for keys and values, shared by all requests; None: 16 times the model's longest sequence,
            but no more than 65536 tokens.
        cache_dtype: of keys and values; None: the model's `cache_dtype`. int8 and float8_e4m3fn take half of bfloat16's
            memory.
        max_batch_tokens, max_sequences, preemption: see `Scheduler`.
        prefix_caching: what the cache holds of earlier requests is not computed again.
        batch_invariant: see `Runner`.
        speculator: guesses tokens that the model then checks several at a time (`llmcore.inference.speculation`).
        adapters: LoRA adapters by the name that requests have for them: folders that PEFT saved, or those loaded
            (`llmcore.inference.adapters`).
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        stop_ids: Sized[int] | frozenset[int] | None = None,
        cache_tokens: int | None = None,
        cache_dtype: torch.dtype | None = None,
        block_size: int = 16,
        max_batch_tokens: int = 2048,
        max_sequences: int = 64,
        preemption: Literal["recompute", "swap"] = "recompute",
        prefix_caching: bool = True,
        batch_invariant: bool = False,
        speculator: Speculator | None = None,
        adapters: Mapping[str, str | Path | Adapter] | None = None,
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        if stop_ids is None:
            stop_ids = [i for i in [tokenizer.eos_id if tokenizer else None] if i is not None]
        self.stop_ids = frozenset(stop_ids)
        if cache_tokens is None:
            cache_tokens = min(16 * model.config.max_positions, 65536)
        self.cache = PagedKVCache(
            model.config,
            PagedKVCache.blocks_for(cache_tokens, block_size),
            block_size=block_size,
            dtype=cache_dtype or model.cache_dtype,
            device=model.device,
        )
        self.scheduler = Scheduler(
            self.cache, max_batch_tokens=max_batch_tokens, max_sequences=max_sequences, preemption=preemption,
            prefix_caching=prefix_caching,
        )  # fmt: skip
        self.runner = Runner(model, self.cache, batch_invariant=batch_invariant)
        self.speculator = speculator
        self.adapters = Adapters(model, adapters) if adapters is not None else None
        if speculator is not None:
            speculator.attach(model)
            self.runner.observe = speculator.observe if speculator.needs_hidden else None
        self.requests: dict[str, Request] = {}
        self._sequence_ids, self._numbers = itertools.count(), itertools.count()
        self._inboxes: dict[str, deque[Delta]] = {}  # of the requests that `stream` waits for
        self._untold: list[Delta] = []  # of all others
        self._generated = self._prefilled = self._drafted = self._accepted = 0

    @classmethod
    def from_language_model(cls, lm: LanguageModel, **options: Any) -> Engine:
        """The engine of a model with its tokenizer and stop tokens; options as those of `Engine`."""
        return cls(lm.model, lm.tokenizer, **{"stop_ids": lm.stop_ids} | options)

    # ---- requests

    def add(self, prompt: str | Sized[int], params: SamplingParams | None = None, request_id: str | None = None) -> str:
        """Takes a request in. Gives its id.

        Raises:
            ValueError: for an empty prompt, a token outside the vocabulary, more than the model or the cache can hold,
                or an id that is in use; and for a wrong constraint (see `prepare`).
        """
        if request_id in self.requests:
            raise ValueError(f"request_id {request_id!r} is in use")
        request = self._request(prompt, params or SamplingParams(), request_id)
        self._queue(request)
        return request.id

    def _request(self, prompt: str | Sized[int], params: SamplingParams, request_id: str | None = None) -> Request:
        """A request, checked, that is not queued yet."""
        tokens = self._tokens(prompt)
        while request_id is None or request_id in self.requests:
            request_id = f"request-{next(self._numbers)}"
        request = Request(request_id, tokens, params, max_tokens=self._max_tokens(tokens, params))
        request.stop_ids = params.stop_token_ids | (frozenset() if params.ignore_eos else self.stop_ids)
        if params.adapter is not None:
            request.adapter, request.salt = self.adapters[params.adapter], self.adapters.salt(params.adapter)
        request.seed = int(torch.randint(2**62, ())) if params.seed is None else int(params.seed)
        self._new_sequence(request, 0)
        return request

    def _queue(self, request: Request) -> None:
        self.requests[request.id] = request
        self.scheduler.add(request.sequences[0])

    def _tokens(self, prompt: str | Sized[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("the prompt is text, but the engine has no tokenizer; accepted: token ids")
            prompt = self.tokenizer.encode(prompt, add_bos=self.tokenizer.adds_bos)
        try:
            tokens = [operator.index(token) for token in prompt]
        except TypeError:
            raise ValueError(f"the prompt is {prompt!r}; accepted: a text or a sequence of token ids") from None
        if not tokens:
            raise ValueError("the prompt is empty; accepted: at least one token")
        vocab = self.model.config.vocab_size
        if wrong := [token for token in tokens if not 0 <= token < vocab]:
            raise ValueError(f"the prompt holds token id {wrong[0]}; accepted: 0 to vocab_size - 1 = {vocab - 1}")
        return tokens

    def _max_tokens(self, tokens: list[int], params: SamplingParams) -> int:
        """The most new tokens; a ValueError for what this engine cannot do."""
        config, limit = self.model.config, self.max_length
        most = limit - len(tokens)
        wanted = 1 if params.max_tokens is None else params.max_tokens
        if wanted > most:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens and max_tokens is {params.max_tokens}; accepted: together at "
                f"most {limit}, the lesser of max_positions = {config.max_positions} and the cache's "
                f"{self.cache_tokens} tokens"
            )
        if params.n > self.scheduler.max_sequences:
            raise ValueError(f"n is {params.n}; accepted: 1 to max_sequences = {self.scheduler.max_sequences}")
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if wrong := [t for t in ids if not 0 <= t < config.vocab_size]:
                raise ValueError(f"{name} holds token id {wrong[0]}; accepted: 0 to {config.vocab_size - 1}")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop holds strings, but the engine has no tokenizer; accepted: stop_token_ids")
        if params.adapter is not None and params.adapter not in (self.adapters or {}):
            raise ValueError(f"adapter is {params.adapter!r}; accepted: {sorted(self.adapters or {})}, or None")
        return most if params.max_tokens is None else params.max_tokens

    def _new_sequence(self, request: Request, index: int) -> Sequence:
        seed, params = request.seed + index, request.params
        matcher = None
        if params.constraint is not None:
            first = request.sequences[0].matcher if request.sequences else None
            matcher = first.fork() if first is not None else self.prepare(params)
        sequence = Sequence(
            id=next(self._sequence_ids),
            request=request,
            index=index,
            tokens=list(request.prompt),
            seed=(seed + 2**63) % 2**64 - 2**63,
            stream=TextStream(self.tokenizer, params.stop),
            matcher=matcher,
        )
        request.sequences.append(sequence)
        return sequence

    def prepare(self, params: SamplingParams) -> Matcher | None:
        """A matcher of the constraint, if there is one. Compiles it, which may take a second, unless that has been
        done: where others wait for the engine's thread, call this in another one before `add`, with the same params.

        Raises:
            ValueError: for a constraint that is wrong or too large.
            ImportError: for one whose package is missing.
        """
        if params.constraint is None:
            return None
        if self.tokenizer is None:
            raise ValueError("constraint is given, but the engine has no tokenizer; accepted: None")
        return params.constraint.matcher(self.tokenizer, self.model.config.vocab_size, self.stop_ids)

    def abort(self, request_id: str) -> list[Delta]:
        """Ends a request that has not finished, and frees what it holds. Gives the last delta of each choice. Unknown
        ids do nothing: it may just have finished."""
        request = self.requests.get(request_id)
        if request is None:
            return []
        for index in range(len(request.sequences), request.params.n):  # choices that wait for the prompt
            self._new_sequence(request, index)
        deltas = [self._end(s, Finish.ABORT) for s in request.sequences if s.finish is None]
        self._inboxes.get(request_id, []).extend(deltas)
        return deltas

    @property
    def cache_tokens(self) -> int:
        """Room of the cache."""
        return self.cache.num_blocks * self.cache.block_size

    @property
    def max_length(self) -> int:
        """The most tokens of a prompt and its continuation together."""
        config, room = self.model.config, self.cache_tokens
        return room if config.position == "none" else min(config.max_positions, room)

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def stats(self) -> EngineStats:
        scheduler, cache = self.scheduler, self.cache
        return EngineStats(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            blocks_used=cache.num_blocks - cache.num_free_blocks,
            blocks_total=cache.num_blocks,
            prefix_tokens_queried=scheduler.tokens_queried,
            prefix_tokens_hit=scheduler.tokens_hit,
            preemptions=scheduler.num_preemptions,
            tokens_generated=self._generated,
            tokens_prefilled=self._prefilled,
            draft_tokens=self._drafted,
            draft_tokens_accepted=self._accepted,
        )

    # ---- steps

    def step(self) -> list[Delta]:
        """Runs one step. What it added to each choice; empty when prompts go on, or nothing is left to do. Deltas of
        requests that `stream` or `generate` added are theirs."""
        self._step()
        deltas, self._untold = self._untold, []
        return deltas

    def _step(self) -> None:
        if self.speculator is not None:
            self._guess()
        work = [self._with_siblings(w) for w in self.scheduler.schedule()]
        if not work:
            return
        try:
            drawn = self.runner.run(work)
        except BaseException:  # what the cache holds of them is unknown
            self._untold += [
                d for w in work for d in self.abort(w.sequence.request.id) if d.request_id not in self._inboxes
            ]
            raise
        for w in work:
            for delta in self._take(w, drawn):
                self._inboxes.get(delta.request_id, self._untold).append(delta)

    def _guess(self) -> None:
        """Lets the speculator guess what follows the texts that are being written."""
        # none where choices begin: they share what the cache holds of the first, which must not be a guess
        writing = [s for s in self.scheduler.running if s.remaining == 1 and not s.forks_to_come]
        counts = [s.request.max_tokens - s.num_output - 1 for s in writing]  # the model adds one
        for sequence, drafts, most in zip(writing, self.speculator.propose(writing, counts), counts):
            sequence.drafts = list(drafts[:most])

    def _with_siblings(self, work: Work) -> Work:
        sequence = work.sequence
        if not work.draws or not sequence.forks_to_come:
            return work
        indices = range(len(sequence.request.sequences), sequence.params.n)
        return work._replace(siblings=tuple(self._new_sequence(sequence.request, index) for index in indices))

    def _take(self, work: Work, drawn: dict[Sequence, Drawn]) -> list[Delta]:
        sequence, before = work.sequence, work.sequence.computed
        if sequence.wants_prompt_logprobs and sequence in drawn:
            self._take_prompt_logprobs(sequence.request, before, drawn[sequence])
        if sequence.remaining > 1:
            self._prefilled += work.count
        sequence.computed += work.count
        if not sequence.drafts:
            self._publish(sequence)
        for sibling in work.siblings:
            self.scheduler.fork(sequence, sibling)
        if not work.draws:
            return []
        return [self._advance(s, drawn[s]) for s in (sequence, *work.siblings)]

    def _take_prompt_logprobs(self, request: Request, before: int, drawn: Drawn) -> None:
        told = request.prompt_logprobs = request.prompt_logprobs or [None]  # nothing comes before the first token
        for place, logprob in enumerate(drawn.prompt_logprobs or (), before + 1):
            if place == len(told) < request.prompt_len:  # not again, where a preempted sequence runs anew
                told.append(logprob)

    def _advance(self, sequence: Sequence, drawn: Drawn) -> Delta:
        """Adds drawn tokens to a sequence, up to one that ends it."""
        request, params = sequence.request, sequence.params
        if drawn.failed:
            return self._end(sequence, Finish.ERROR)
        finish, count = None, 0
        for token in drawn.tokens:
            sequence.tokens.append(token)
            count += 1
            may_stop = sequence.num_output > params.min_tokens
            if token in request.stop_ids and may_stop:
                finish = Finish.STOP
            else:
                sequence.text += sequence.stream.feed(token, may_stop)
                if sequence.stream.stopped or (sequence.matcher is not None and sequence.matcher.accept(token)):
                    finish = Finish.STOP
                elif sequence.num_output == request.max_tokens:
                    finish = Finish.LENGTH
            if finish is not None:
                break
        self._generated += count
        self._drafted += len(sequence.drafts)
        self._accepted += min(count, len(drawn.tokens) - 1)
        tokens = drawn.tokens[:count]
        if params.logprobs is not None:
            sequence.logprobs += drawn.logprobs[:count]
        if finish is not None:
            return self._end(sequence, finish, tokens)
        if sequence.drafts:
            sequence.drafts = []
            sequence.computed = len(sequence.tokens) - 1
            self.cache.truncate(sequence.id, sequence.computed)
            self._publish(sequence)
        return self._delta(sequence, tokens)

    def _publish(self, sequence: Sequence) -> None:
        if self.scheduler.prefix_caching:
            self.cache.publish(sequence.id, sequence.tokens)

    def _delta(self, sequence: Sequence, tokens: list[int]) -> Delta:
        request, count = sequence.request, len(tokens)
        text, sequence.text = sequence.text, ""
        return Delta(
            request.id,
            sequence.index,
            text,
            tokens,
            sequence.logprobs[-count:] if request.params.logprobs is not None and count else None,
            request.prompt_logprobs if sequence.index == 0 and sequence.num_output == count else None,
            sequence.finish,
        )

    def _end(self, sequence: Sequence, finish: Finish, tokens: Sized[int] = ()) -> Delta:
        request = sequence.request
        sequence.finish = finish
        self.scheduler.remove(sequence)
        if self.speculator is not None:
            self.speculator.release(sequence)
        sequence.text += sequence.stream.finish()
        request.outputs.append(completion(sequence))
        if all(s.finish is not None for s in request.sequences) and not sequence.request.sequences[0].forks_to_come:
            del self.requests[request.id]
        return self._delta(sequence, list(tokens))

    # ---- all at once

    def stream(
        self, prompts: Sized[str | Sized[int]], params: SamplingParams | Sized[SamplingParams] | None = None
    ) -> Iterator[tuple[int, Delta]]:
        """Continues every prompt; gives (index of a prompt, what a step added to it). They are queued when the first is
        asked for. Requests added otherwise go on meanwhile; theirs is told by the next `step`. Closing the iterator
        aborts what has not finished.

        Args:
            prompts: texts or token ids.
            params: for all, or one for each.

        Raises:
            ValueError: at once, see `add`.
        """
        return self._deltas(self._requests(prompts, params))

    def _requests(
        self, prompts: Sized[str | Sized[int]], params: SamplingParams | Sized[SamplingParams] | None
    ) -> list[Request]:
        each = list(params) if isinstance(params, (list, tuple)) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(
                f"params has {len(each)} entries; accepted: one, or one for each of {len(prompts)} prompts"
            )
        return [self._request(prompt, wanted or SamplingParams()) for prompt, wanted in zip(prompts, each)]

    def _deltas(self, requests: list[Request]) -> Iterator[tuple[int, Delta]]:
        inbox: deque[Delta] = deque()
        indices, left = {request.id: index for index, request in enumerate(requests)}, 0
        try:
            for request in requests:
                self._inboxes[request.id] = inbox
                self._queue(request)
                left += request.params.n
            while left:
                if not inbox:
                    self._step()
                while inbox:
                    delta = inbox.popleft()
                    left -= delta.finish is not None
                    yield indices[delta.request_id], delta
        finally:  # Ctrl-C, or nobody wants the rest: nothing of this call goes on
            for request in requests:
                self.abort(request.id)
                self._inboxes.pop(request.id, None)

    def generate(
        self,
        prompts: Sized[str | Sized[int]],
        params: SamplingParams | Sized[SamplingParams] | None = None,
        *,
        on_delta: Callable[[Delta], None] | None = None,
    ) -> list[RequestOutput]:
        """Continues every prompt, and steps until all have ended: `stream` to its end.

        Args:
            on_delta: called with what each step adds.
        """
        requests = self._requests(prompts, params)
        with contextlib.closing(self._deltas(requests)) as deltas:
            for _, delta in deltas:
                if on_delta is not None:
                    on_delta(delta)
        return [request.result() for request in requests]
