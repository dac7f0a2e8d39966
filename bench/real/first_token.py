"""From nothing to the first token of a prompt, once, in this process: prints {"import": s, "load": s}. Files that were
read before are in the system's cache.

    python bench/real/first_token.py llmcore | llama.cpp FILE THREADS

"load" is opening the file, making the model and the tokenizer, encoding the prompt, running it and choosing a token.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time

PROMPT = "The capital of France is"


def llmcore_side(path: str, threads: int) -> tuple[float, float, int]:
    begin = time.perf_counter()
    import torch

    import llmcore
    import llmcore.inference  # which `load` would import

    torch.set_num_threads(threads)
    imported = time.perf_counter()
    (done,) = llmcore.load(path).complete([PROMPT], max_tokens=1, temperature=0.0)
    return imported - begin, time.perf_counter() - imported, done.tokens[0]


def llama_cpp_side(path: str, threads: int) -> tuple[float, float, int]:
    begin = time.perf_counter()
    import llama_cpp as c
    import numpy as np

    imported = time.perf_counter()
    quiet = c.llama_log_callback(lambda level, text, data: None)
    c.llama_log_set(quiet, ctypes.c_void_p(0))
    model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
    params = c.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 512, threads, threads
    context = c.llama_init_from_model(model, params)
    vocab, text = c.llama_model_get_vocab(model), PROMPT.encode()
    ids = (c.llama_token * len(text))()
    count = c.llama_tokenize(vocab, text, len(text), ids, len(text), False, False)
    assert c.llama_decode(context, c.llama_batch_get_one(ids, count)) == 0
    logits = np.ctypeslib.as_array(c.llama_get_logits_ith(context, -1), (c.llama_vocab_n_tokens(vocab),))
    token = int(logits.argmax())
    return imported - begin, time.perf_counter() - imported, token


def main() -> None:
    side, path, threads = sys.argv[1:]
    imported, load, token = {"llmcore": llmcore_side, "llama.cpp": llama_cpp_side}[side](path, int(threads))
    print(json.dumps({"import": imported, "load": load, "token": token}))


if __name__ == "__main__":
    main()
