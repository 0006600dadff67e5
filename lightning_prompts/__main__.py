"""`python -m lightning_prompts`."""

from lightning_prompts.main import main

main()
