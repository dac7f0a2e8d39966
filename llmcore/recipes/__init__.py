"""The recipes that come with llmcore, as TOML files. `llmcore pretrain NAME.toml` finds them by name."""
