"""Rows in which a prompt is run once for all of its completions."""
