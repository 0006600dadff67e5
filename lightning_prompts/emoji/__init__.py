"""The embedded model: the world it draws, its training and its weights."""
