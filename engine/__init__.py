"""The rules of an auction. Pure: no asyncio, no Ray, no I/O, no clock, no randomness."""
