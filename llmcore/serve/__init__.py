"""The OpenAI-compatible HTTP server: `llmcore serve MODEL`. Needs `pip install 'llmcore[serve]'`."""
