from __future__ import annotations


def test_metrics(tiny):
    """The numbers of a few requests, from a known state."""
    before = tiny.idle()

    def more(name):
        return tiny.idle().get(f"llmcore_{name}", 0.0) - before.get(f"llmcore_{name}", 0.0)

    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a rat and a cat and a dog " * 3}]}
    for _ in range(2):
        assert tiny.post("/v1/chat/completions", chat | {"max_tokens": 5})[0] == 200
    assert tiny.post("/v1/chat/completions", {"model": "tiny"})[0] == 400
    assert tiny.post("/v1/embeddings", {"model": "tiny", "input": "x"})[0] == 200
    assert more('requests_total{path="/v1/chat/completions",status="200"}') == 2
    assert more('requests_total{path="/v1/chat/completions",status="400"}') == 1
    assert more('requests_total{path="/v1/embeddings",status="200"}') == 1
    assert more("time_to_first_token_seconds_count") == 2
    assert more("time_per_token_seconds_count") == 2
    assert more('request_seconds_count{path="/v1/chat/completions"}') == 3
    assert more("generated_tokens_total") == 10
    assert more("prefix_cache_hit_tokens_total") >= 16  # the second found the first one's prompt
    assert 0 < tiny.metrics()["llmcore_prefix_cache_hit_rate"] < 1
    assert tiny.metrics()["llmcore_cache_use"] == 0
    assert tiny.metrics()["llmcore_cache_blocks_total"] == 256
