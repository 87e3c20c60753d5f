"""The HTTP API: thin routes, and the envelope that all their answers come in."""
