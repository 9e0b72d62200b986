"""One file a command: its options, what it calls, what it prints.

Bad input raises ValueError, with one line that says what was wrong and what would be right.
"""
