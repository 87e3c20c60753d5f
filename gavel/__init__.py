"""The front desk: the command line, settings and the wiring of the whole."""
