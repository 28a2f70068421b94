"""The parts that every trainer here shares."""
