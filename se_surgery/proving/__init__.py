"""Proving: every promise that is made of an operated model, tried."""
