"""Tests of `gateway/`, without servers and without connections."""
