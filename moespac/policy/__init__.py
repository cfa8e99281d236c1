"""Deciding: policies are numpy and plain Python; a test asserts that nothing here loads torch."""
