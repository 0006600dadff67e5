"""The command line: its entry point, the commands, and the checks of their settings."""
