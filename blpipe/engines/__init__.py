"""Engines: who executes the stages' programs, and where."""
