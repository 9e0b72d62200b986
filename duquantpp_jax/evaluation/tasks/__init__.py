"""Five small tasks for lm-eval that need no network, of public-domain books.

Written by experiments/make_tasks.py; each .yaml is a task and each .json its documents.
"""
