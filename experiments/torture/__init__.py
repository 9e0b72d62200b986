"""Torture: what the project promises of files, kills, faults and load is tried, counted and noted.

    fuzz     every reader, on spoilt files: it returns, or says what is wrong in one line
    kills    every command, killed at random moments: the next run ends as an undisturbed one
    faults   a full disk, directories that are read-only, files that are replaced or removed
    load     a thousand cells, ten processes on one directory, fifty hostile clients of `serve`

Each is `python -m experiments.torture.NAME`, bounded in time by --seconds, prints its counts and
writes them to experiments/results/torture_NAME.json; `python -m experiments.torture.page` makes
docs/reliability.md of the four.
"""
