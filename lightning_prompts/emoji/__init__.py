"""The embedded model: its scenes, its tokenizer and its weights."""
