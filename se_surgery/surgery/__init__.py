"""Surgery: what a plan says, done to a model, all of it or nothing, and undone."""
