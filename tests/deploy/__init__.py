"""Tests of the files that bring an engine onto machines: they start nothing, but import Ray."""
