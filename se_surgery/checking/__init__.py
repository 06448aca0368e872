"""Checking: what surgery wrote, compared by values with what was there, before anything is kept."""
