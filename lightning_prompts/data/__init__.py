"""Data modules and what they read."""
