"""Tests of what the benchmark and the swarms are made of."""
