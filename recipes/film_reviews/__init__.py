"""The world of the quickstart: film reviews, judges of them, and tiny models that learn to write them."""
