"""Promises that a port's real implementation and its in-memory twin both keep."""
