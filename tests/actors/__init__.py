"""Tests of the shards: no Ray, no server, no database; clock, journal, outlets and death are stand-ins."""
