"""Routing traces: what a model routed where, pass by pass. docs/traces.md describes the file. No torch."""

from moespac.trace.files import read, write
from moespac.trace.importer import load
from moespac.trace.recorder import TraceRecorder
from moespac.trace.schema import Trace

__all__ = ["Trace", "TraceRecorder", "load", "read", "write"]
