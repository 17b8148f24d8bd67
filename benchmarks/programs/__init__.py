"""What a person starts with ``python -m``; each measures, prints a table and writes its result."""
