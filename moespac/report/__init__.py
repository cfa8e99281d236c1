"""REPORT: runs that were written as JSON, side by side."""
