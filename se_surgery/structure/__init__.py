"""Structure: what a network is made of: units where an SE can sit, stages, and the SEs that are there."""
