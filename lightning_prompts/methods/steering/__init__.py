"""Methods that move encoded prompts (arXiv 2308.12059)."""
