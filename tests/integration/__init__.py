"""Tests of parts that work together, with a real Postgres."""
