"""The rules by example, by property, against an independent model and against real auctions."""
