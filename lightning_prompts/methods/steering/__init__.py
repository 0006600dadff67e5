"""Methods that change encoded prompts (arXiv 2308.12059)."""
