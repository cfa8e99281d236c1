"""Policies to compare with, each behind the same interface."""
