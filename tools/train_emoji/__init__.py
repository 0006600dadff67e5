"""Training of the embedded model `emoji`, see docs/emoji.md."""
