"""The engine: requests in, text out, whoever asks: chat, server, evaluation, rollouts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from collections.abc import Sequence as Sized
from typing import Literal

import torch

from llmcore.inference.cache import PagedKVCache
from llmcore.inference.constraints import Matcher
from llmcore.inference.params import SamplingParams
from llmcore.inference.runner import Drawn, Runner
from llmcore.inference.scheduler import Scheduler, Work
from llmcore.inference.sequence import Delta, Finish, Request, RequestOutput, Sequence, TextStream, completion
from llmcore.models import Transformer
from llmcore.tokenizers import Tokenizer


class Engine:
    """Continues any number of requests together.

    Args:
        model: in evaluation mode from now on, in its own dtype and on its own device.
        tokenizer: for prompts, answers and stop strings in text; without one, tokens only.
        stop_ids: tokens that end a text unless a request says otherwise; None: the tokenizer's end of text.
        cache_tokens: room for keys and values, shared by all requests; None: 16 times the model's longest sequence,
            but no more than 65536 tokens.
        cache_dtype: None: the model's; int8 and float8_e4m3fn take half of bfloat16's memory.
        max_batch_tokens, max_sequences, preemption: see `Scheduler`.
        prefix_caching: what the cache holds of earlier requests is not computed again.
        batch_invariant: see `Runner`.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        stop_ids: Sized[int] | None = None,
        cache_tokens: int | None = None,
        cache_dtype: torch.dtype | None = None,
        block_size: int = 16,
        max_batch_tokens: int = 2048,
        max_sequences: int = 64,
        preemption: Literal["recompute", "swap"] = "recompute",
        prefix_caching: bool = True,
        batch_invariant: bool = False,
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        if stop_ids is None:
            stop_ids = [i for i in [tokenizer.eos_id if tokenizer else None] if i is not None]
        self.stop_ids = frozenset(stop_ids)
        if cache_tokens is None:
            cache_tokens = min(16 * model.config.max_positions, 65536)
        weight = model.lm_head_weight
        self.cache = PagedKVCache(
            model.config,
            PagedKVCache.blocks_for(cache_tokens, block_size),
            block_size=block_size,
            dtype=cache_dtype or weight.dtype,
            device=weight.device,
        )
        self.scheduler = Scheduler(
            self.cache, max_batch_tokens=max_batch_tokens, max_sequences=max_sequences, preemption=preemption,
            prefix_caching=prefix_caching,
        )  # fmt: skip
        self.runner = Runner(model, self.cache, batch_invariant=batch_invariant)
        self.requests: dict[str, Request] = {}
        self._ids = itertools.count()
        self._numbers = itertools.count()
        self._collecting: dict[str, RequestOutput | None] = {}

    # ---- requests

    def add(self, prompt: str | Sized[int], params: SamplingParams | None = None, request_id: str | None = None) -> str:
        """Takes a request in. Gives its id.

        Raises:
            ValueError: for an empty prompt, a token outside the vocabulary, more than the model or the cache can hold,
                or an id that is in use; for a wrong constraint (see `prepare`).
        """
        params = params or SamplingParams()
        request_id = f"request-{next(self._numbers)}" if request_id is None else request_id
        if request_id in self.requests:
            raise ValueError(f"request_id {request_id!r} is in use")
        tokens = self._tokens(prompt)
        request = Request(request_id, tokens, params, max_tokens=self._max_tokens(tokens, params))
        request.matcher = self.prepare(params)
        request.stop_ids = params.stop_token_ids | (frozenset() if params.ignore_eos else self.stop_ids)
        request.arrival = time.monotonic()
        request.seed = int(torch.randint(2**62, ())) if params.seed is None else params.seed
        self.requests[request_id] = request
        self.scheduler.add(self._new_sequence(request, 0))
        return request_id

    def prepare(self, params: SamplingParams) -> Matcher | None:
        """A matcher of the constraint, if there is one. Compiles it, which may take a second, unless that has been
        done: so where others wait for the engine's thread, call this in another before `add`.

        Raises:
            ValueError: for a constraint that is wrong or too large.
            ImportError: for one whose package is missing.
        """
        if params.constraint is None:
            return None
        if self.tokenizer is None:
            raise ValueError("there is a constraint, but the engine has no tokenizer; accepted: None")
        return params.constraint.matcher(self.tokenizer, self.model.config.vocab_size, self.stop_ids)

    def _tokens(self, prompt: str | Sized[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("the prompt is text, but the engine has no tokenizer; accepted: token ids")
            prompt = self.tokenizer.encode(prompt)
        tokens = [int(token) for token in prompt]
        if not tokens:
            raise ValueError("the prompt is empty; accepted: at least one token")
        vocab = self.model.config.vocab_size
        if wrong := [token for token in tokens if not 0 <= token < vocab]:
            raise ValueError(f"the prompt holds token id {wrong[0]}; accepted: 0 to vocab_size - 1 = {vocab - 1}")
        return tokens

    def _max_tokens(self, tokens: list[int], params: SamplingParams) -> int:
        config, capacity = self.model.config, self.cache.num_blocks * self.cache.block_size
        limit = capacity if config.position == "none" else min(config.max_positions, capacity)
        most = limit - len(tokens)
        wanted = 1 if params.max_tokens is None else params.max_tokens
        if wanted > most:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens and max_tokens is {params.max_tokens}; accepted: together at most "
                f"{limit}, the lesser of max_positions = {config.max_positions} and the cache's {capacity} tokens"
            )
        if params.n > self.scheduler.max_sequences:
            raise ValueError(f"n is {params.n}; accepted: 1 to max_sequences = {self.scheduler.max_sequences}")
        if wrong := [t for t in params.logit_bias if t >= config.vocab_size]:
            raise ValueError(f"logit_bias names token id {wrong[0]}; accepted: 0 to {config.vocab_size - 1}")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop holds strings, but the engine has no tokenizer; accepted: stop_token_ids")
        return most if params.max_tokens is None else params.max_tokens

    def _new_sequence(self, request: Request, index: int) -> Sequence:
        seed = request.seed + index
        sequence = Sequence(
            id=next(self._ids),
            request=request,
            index=index,
            tokens=list(request.prompt),
            seed=(seed + 2**63) % 2**64 - 2**63,
            stream=TextStream(self.tokenizer, request.params.stop),
            matcher=request.matcher.fork() if request.matcher is not None else None,
        )
        request.sequences.append(sequence)
        return sequence

    def abort(self, request_id: str) -> list[Delta]:
        """Ends a request that has not finished, and frees what it holds. Unknown ids do nothing: it may just have
        finished."""
        request = self.requests.get(request_id)
        if request is None:
            return []
        return [self._end(s, Finish.ABORT) for s in request.sequences if s.finish is None]

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    # ---- steps

    def step(self) -> list[Delta]:
        """Runs one step. What it added to each choice; empty when prompts go on, or nothing is left to do."""
        work = [self._with_siblings(w) for w in self.scheduler.schedule()]
        if not work:
            return []
        drawn = self.runner.run(work)
        deltas: list[Delta] = []
        for w in work:
            deltas += self._take(w, drawn)
        return deltas

    def _with_siblings(self, work: Work) -> Work:
        sequence = work.sequence
        if not work.draws or not sequence.forks_to_come:
            return work
        indices = range(len(sequence.request.sequences), sequence.params.n)
        return work._replace(siblings=tuple(self._new_sequence(sequence.request, index) for index in indices))

    def _take(self, work: Work, drawn: dict[Sequence, Drawn]) -> list[Delta]:
        sequence, before = work.sequence, work.sequence.computed
        if sequence.index == 0 and sequence in drawn:
            self._take_prompt_logprobs(sequence.request, before, drawn[sequence])
        sequence.computed += work.count
        if not sequence.drafts:
            self._publish(sequence)
        for sibling in work.siblings:
            self.scheduler.fork(sequence, sibling)
        if not work.draws:
            return []
        return [self._advance(s, drawn[s]) for s in (sequence, *work.siblings)]

    def _take_prompt_logprobs(self, request: Request, before: int, drawn: Drawn) -> None:
        if request.params.prompt_logprobs is None:
            return
        told = request.prompt_logprobs = request.prompt_logprobs or [None]  # nothing comes before the first token
        for place, logprob in enumerate(drawn.prompt_logprobs, before + 1):
            if place == len(told) < request.prompt_len:  # not again, where a preempted sequence runs anew
                told.append(logprob)

    def _advance(self, sequence: Sequence, drawn: Drawn) -> Delta:
        """Adds drawn tokens to a sequence, up to one that ends it."""
        request, params = sequence.request, sequence.params
        if drawn.failed:
            return self._end(sequence, Finish.ERROR)
        request.first_token_time = request.first_token_time or time.monotonic()
        finish, count = None, 0
        for token in drawn.tokens:
            sequence.tokens.append(token)
            count += 1
            may_stop = sequence.num_output > params.min_tokens
            if (
                (token in request.stop_ids and may_stop)
                or sequence.stream.add(token, may_stop)
                or (sequence.matcher is not None and sequence.matcher.accept(token))
            ):
                finish = Finish.STOP
            elif sequence.num_output == request.max_tokens:
                finish = Finish.LENGTH
            if finish is not None:
                break
        sequence.logprobs += drawn.logprobs[:count]
        if finish is not None:
            return self._end(sequence, finish, drawn.tokens[:count])
        if sequence.drafts:
            sequence.drafts = []
            sequence.computed = len(sequence.tokens) - 1
            self.cache.truncate(sequence.id, sequence.computed)
            self._publish(sequence)
        return self._delta(sequence, drawn.tokens)

    def _publish(self, sequence: Sequence) -> None:
        if self.scheduler.prefix_caching:
            self.cache.publish(sequence.id, sequence.tokens)

    def _delta(self, sequence: Sequence, tokens: list[int]) -> Delta:
        request, count = sequence.request, len(tokens)
        first = sequence.index == 0 and sequence.num_output == count
        return Delta(
            request.id,
            sequence.index,
            sequence.stream.take(last=sequence.finish is not None),
            tokens,
            sequence.logprobs[-count:] if request.params.logprobs is not None and count else None,
            request.prompt_logprobs if first else None,
            sequence.finish,
        )

    def _end(self, sequence: Sequence, finish: Finish, tokens: Sized[int] = ()) -> Delta:
        request = sequence.request
        sequence.finish = finish
        self.scheduler.remove(sequence)
        delta = self._delta(sequence, list(tokens))
        request.outputs.append(completion(sequence))
        if all(s.finish is not None for s in request.sequences) and not sequence.forks_to_come:
            del self.requests[request.id]
            self.finished_request(request)
        return delta

    def finished_request(self, request: Request) -> None:
        """Called once for each request when its last choice has ended."""
        if request.id in self._collecting:
            self._collecting[request.id] = request.result()

    def generate(
        self,
        prompts: Sized[str | Sized[int]],
        params: SamplingParams | Sized[SamplingParams] | None = None,
        *,
        on_delta: Callable[[Delta], None] | None = None,
    ) -> list[RequestOutput]:
        """Continues every prompt, and steps until all have ended. Requests added before go on meanwhile.

        Args:
            prompts: texts or token ids.
            params: for all, or one for each.
            on_delta: called with what each step adds.
        """
        each = list(params) if isinstance(params, (list, tuple)) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(
                f"params has {len(each)} entries; accepted: one, or one for each of {len(prompts)} prompts"
            )
        ids: list[str] = []
        try:
            for prompt, wanted in zip(prompts, each):
                ids.append(self.add(prompt, wanted))
                self._collecting[ids[-1]] = None
            while any(self._collecting[i] is None for i in ids):
                for delta in self.step():
                    if on_delta is not None and delta.request_id in self._collecting:
                        on_delta(delta)
            return [self._collecting[i] for i in ids]
        finally:  # a wrong prompt, Ctrl-C: nothing of this call goes on
            for i in ids:
                self.abort(i)
                self._collecting.pop(i, None)
