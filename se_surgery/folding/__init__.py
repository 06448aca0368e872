"""Folding: gates that are constants, put into the layers around them."""
