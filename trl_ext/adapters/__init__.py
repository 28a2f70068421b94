"""Several models as adapters on one frozen base, and reward models by path or as objects."""
