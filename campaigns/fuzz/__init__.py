"""Coverage-guided fuzzing of every decoder: `python -m campaigns.fuzz` (see docs/assurance.md).

Not here: the listeners, which `python -m campaigns listeners` sends odd bytes.
"""
