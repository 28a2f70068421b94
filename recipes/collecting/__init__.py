"""Collecting rankings: completions are sampled, people or judges rank them, and the rankings are exported."""
