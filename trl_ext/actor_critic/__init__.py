"""The trainer with a critic: a batch from prompt to loss."""
