"""Run the command line: `python -m lightning_prompts`."""

from lightning_prompts.commands.main import main

main()
