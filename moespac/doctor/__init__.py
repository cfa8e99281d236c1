"""EXAMINE this machine: what there is, what is slow, and how to mend it."""
