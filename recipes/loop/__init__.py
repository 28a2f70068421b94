"""The parts of `rlhf.py`: its plan of stages, how they are run and remembered, and what they need of their own."""
