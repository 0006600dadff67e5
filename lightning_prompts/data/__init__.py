"""Where inputs come from: images, prompts, lists and shards."""
