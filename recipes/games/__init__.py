"""Text games, players that imitate and play them, and how their episodes are shown."""
