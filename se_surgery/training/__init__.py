"""Training: the base held as it is, and the groups that an optimizer takes."""
