"""The real code on simulated time, network and Postgres, in one thread, everything decided by one seed."""
