"""The critic: V(s) or Q(s, a), on whatever trunk it sits."""
