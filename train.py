"""Run Lightning Prompts: `python train.py fit --config configs/invert.yaml --data.images photo.png`."""

from lightning_prompts.commands.main import main

if __name__ == "__main__":
    main()
