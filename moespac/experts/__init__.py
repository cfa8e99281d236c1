"""Doing: the bytes of the experts, where they lie, how they move and how they are computed."""
