"""One file a command: what it calls, what it prints; its options are in `options`.

Bad input raises ValueError, with one line that says what was wrong and what would be right.
"""
