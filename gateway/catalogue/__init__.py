"""What is read from Postgres: lists, and what hangs together across auctions."""


class CatalogueUnavailable(Exception):
    """Postgres cannot be reached, or does not answer in time. Nothing was changed; ask again."""
