"""The folder of a run: records, results, saved settings, and the lock."""
