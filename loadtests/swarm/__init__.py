"""The parts of the Locust swarm (`loadtests/locustfile.py`)."""
