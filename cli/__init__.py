"""The command line: every function parses, calls and prints, and decides nothing."""
