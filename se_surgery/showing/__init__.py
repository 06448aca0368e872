"""Showing: plans and what is found out as tables and drawings."""
