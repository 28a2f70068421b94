"""Functions of any causal language model, and the modules that travel beside one."""
